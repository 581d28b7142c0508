"""Checkpoints: when a folder is one, what it may hold, how a run writes it and resumes from it, how it is converted."""
