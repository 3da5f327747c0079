"""Baselines: what other libraries make of a float model, measured by the same evaluation as our own methods."""
