"""Samples into numbers: scores of texts and of logits, and metrics over samples with their intervals."""
