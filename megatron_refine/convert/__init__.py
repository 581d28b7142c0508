"""Checkpoints in Hugging Face's format: tensor mappings in both directions, config.json, safetensors files.

Nothing here needs Megatron: `checkpoint/conversion.py` joins it to checkpoints, and weight sync to an engine can use
the same mappings on tensors gathered over tp.
"""
