"""Short distillation: train what a quantised model stores towards the float model."""
