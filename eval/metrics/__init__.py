"""Scores of texts: what is computed per sample, and how samples become the score of a corpus."""
