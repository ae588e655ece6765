"""Times kernels, alone and beside others."""
