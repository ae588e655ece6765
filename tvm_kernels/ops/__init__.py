"""The operators that have compiled kernels."""
