"""Kernels of `pmpd::GroupQueryAttention`."""
