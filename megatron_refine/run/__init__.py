"""The life of a run: what is checked before it, how it begins, its parts, signals and deadlines, and how it ends."""
