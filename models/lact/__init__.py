"""LaCT (arXiv 2505.23884): sliding-window attention beside fast weights that are trained on each large chunk."""
