"""DeltaNet (arXiv 2406.06484): linear attention whose state is written by the delta rule."""
