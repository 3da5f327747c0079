"""BitNet b1.58 and a4.8: training with quantised weights and activations."""
