"""The analytical model of the accelerator: instructions, their cost, their order in time."""
