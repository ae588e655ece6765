"""Tokens per second, beside other runtimes."""
