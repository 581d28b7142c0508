"""Scaling experiments: the points of a sweep, their runs, and what came out of them."""
