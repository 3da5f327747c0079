"""Training of BitNet models. The product loads exported models but does not import this package."""
