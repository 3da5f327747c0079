"""Sweeps: many recipes by several processes, one row each, resumable."""
