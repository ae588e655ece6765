"""Records that tasks read."""
