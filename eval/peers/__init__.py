"""A bundle beside other programs on the same weights: size, speed and perplexity in one run."""
