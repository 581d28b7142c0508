"""Mixers with a delta-rule memory: a short convolution, the rule with or without decay, a norm a head."""
