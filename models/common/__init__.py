"""What the model families share: norms, rotary positions, delta-rule mixers."""
