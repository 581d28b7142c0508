"""Sequence mixers that are no family of their own: layers of a hybrid."""
