"""Descriptions of accelerators, and the space of designs around one."""
