"""The probe: what bits and clusters cost in divergence, predicted or measured on a short text."""
