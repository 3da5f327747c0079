"""Low-bit linear layers."""
