"""The network: log-mel front end, encoder, windows, pooling, heads."""
