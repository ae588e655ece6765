"""Kernels of `pmpd::BitplaneMatMul`."""
