"""Gated DeltaNet (arXiv 2412.06464): the delta rule with a decay of the state, and a gated output norm."""
