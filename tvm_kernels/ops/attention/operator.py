"""`GroupQueryAttention`, and its kernels as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

from pmpd.tvm_kernels.codegen.isa import ISAS, Isa, Portable, isa_named
from pmpd.tvm_kernels.ops.attention.attention import append, attend, queries_together
from pmpd.tvm_kernels.ops.base import Demand, Function, Kernel, Operator
from pmpd.tvm_kernels.targets import Target

__all__ = ["AttentionKernel", "GroupQueryAttention"]

_NAME = "GroupQueryAttention"


@dataclass(frozen=True, kw_only=True)
class AttentionKernel(Kernel):
    """Attention over a float16 cache: instruction set, elements of a head, queries taken together."""

    operator: ClassVar[str] = _NAME
    isa: Isa
    dim: int
    queries: int

    def to_json(self) -> dict[str, Any]:
        """Return the kernel as JSON-ready data."""
        return {"isa": self.isa.name, "dim": self.dim, "queries": self.queries}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the kernel that `to_json` describes."""
        return cls(**{**values, "isa": isa_named(values["isa"])})

    @property
    def name(self) -> str:
        """The C symbol of attention."""
        return f"pmpd_attention_f16d{self.dim}_q{self.queries}__{self.isa.name}"

    @property
    def limited_name(self) -> str:
        """The C symbol of attention with a window or a softcap."""
        return f"pmpd_limited_attention_f16d{self.dim}_q{self.queries}__{self.isa.name}"

    @property
    def append_name(self) -> str:
        """The C symbol of the function that extends the cache."""
        return f"pmpd_append_f16d{self.dim}__{self.isa.name}"

    @property
    def functions(self) -> Mapping[str, Function]:
        """Attention, without and with limits, and the extension of the cache, which all numbers of queries share."""
        return {
            **{
                name: Function(
                    "pmpd_attend_fn",
                    partial(attend, self.isa, name=name, dim=self.dim, queries=self.queries, limited=limited),
                )
                for name, limited in ((self.name, False), (self.limited_name, True))
            },
            self.append_name: Function(
                "pmpd_append_fn", partial(append, self.isa, name=self.append_name, dim=self.dim)
            ),
        }

    def fields(self) -> dict[str, object]:
        """Return the members of its `struct pmpd_attention`."""
        return {
            "name": f'"{self.name}"',
            "features": self.features,
            "dim": self.dim,
            "queries": self.queries,
            "append": self.append_name,
            "attend": self.name,
            "attend_limited": self.limited_name,
        }


class GroupQueryAttention(Operator):
    """Attention with rotary embedding over the KV cache."""

    name: ClassVar[str] = _NAME
    header: ClassVar[str] = "attention.h"
    struct: ClassVar[str] = "pmpd_attention"
    array: ClassVar[str] = "pmpd_attentions"
    count: ClassVar[str] = "pmpd_attention_count"

    def kernels(self, target: Target, demand: Demand) -> list[Kernel]:
        """Return kernels for every instruction set that has float arithmetic of its own, and for any machine."""
        isas = [isa for isa in ISAS if isa.name in target.isa and not isa.integers_only]
        return [
            AttentionKernel(isa=isa, dim=dim, queries=queries)
            for isa in (*isas, Portable())
            for dim in demand.head_dims
            for queries in sorted({queries_together(isa, dim), 1}, reverse=True)
        ]

    def from_json(self, values: Mapping[str, Any]) -> Kernel:
        """Return the kernel that `AttentionKernel.to_json` describes."""
        return AttentionKernel.from_json(values)
