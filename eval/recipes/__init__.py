"""The paper's experiments, each a command of its own."""
