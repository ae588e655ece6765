"""Recipes: one module per table or figure of a paper that the backend regenerates."""

__all__: list[str] = []
