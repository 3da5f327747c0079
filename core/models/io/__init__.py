"""Find, check, load, convert and save models by name."""
