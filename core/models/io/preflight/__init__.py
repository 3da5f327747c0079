"""Bounded checks of model files before any library reads them."""
