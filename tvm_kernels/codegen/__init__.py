"""TIR building blocks: instruction sets, bit-planes, look-up tables."""
