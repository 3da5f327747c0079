"""The probe: what a choice of bits and clusters costs in divergence, predicted without a pass or measured on a short text."""
