"""Programs that a model wrote: found in its answers, and run under limits."""
