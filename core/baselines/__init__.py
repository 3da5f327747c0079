"""Baselines: what other libraries make of a float model, measured like our own methods."""
