"""Searches the fastest kernels for a machine (`pmpd-tune`)."""
