"""Which precision a decode step runs at."""
