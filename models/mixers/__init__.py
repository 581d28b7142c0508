"""Mixers that several families use."""
