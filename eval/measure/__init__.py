"""Models under measurement, the reference, and metrics."""
