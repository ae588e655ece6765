"""From kernels to the operator library of a target."""
