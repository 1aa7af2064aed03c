"""What computes the blocks and the log-mel on a CPU, and the choice among it."""
