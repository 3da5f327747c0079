"""Measures of a model, each a pure function of a model and tokens; results are plain numbers."""
