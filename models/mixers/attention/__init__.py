"""Softmax attention as a mixer: grouped key heads, with or without output gate, norms of queries and keys, RoPE."""

MIXER = f"{__name__}.mixer:AttentionMixer"
