"""The page: words, widgets and wiring. It imports `core` only and computes nothing heavy itself."""
