"""What can be asked of a simulated model: generation, breakdown, exploration, plots."""
