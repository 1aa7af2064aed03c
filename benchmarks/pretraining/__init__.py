"""What the bundled model's pre-training was tried and measured with; see README.md."""
