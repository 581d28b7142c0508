"""What the model families share: norms and the short convolution."""
