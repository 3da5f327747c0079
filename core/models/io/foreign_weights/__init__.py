"""Open checkpoints that other tools have quantised, by dequantising them."""
