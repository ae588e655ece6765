"""What a speed measurement compares: this project's bundle and its peers, each in a process of its own."""

from pmpd.eval.speed.contenders.peers import IMPORTANCE, PEERS, ModelShape, Peer, parse_peers, weights_name
from pmpd.eval.speed.contenders.process import Process, make_models

__all__ = ["IMPORTANCE", "PEERS", "ModelShape", "Peer", "Process", "make_models", "parse_peers", "weights_name"]
