"""Training of BitNet models; the product loads what it exports but never imports it."""
