"""What is asked of a model, and how answers are scored."""
