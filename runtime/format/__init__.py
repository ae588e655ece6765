"""The files of a bundle: nested weight layout, manifest, and how both are opened. Contracts."""
