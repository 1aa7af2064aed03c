"""What the bundled model's pre-training is tried and measured with."""
