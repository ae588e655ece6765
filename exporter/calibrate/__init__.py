"""Statistics that quantizers ask for."""
