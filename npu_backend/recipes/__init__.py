"""Recipes: one module per table or figure of a paper that the backend regenerates."""
