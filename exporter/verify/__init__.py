"""What an export checks before it publishes."""
