"""All that drives Megatron-Core: process groups, model, passes, optimizer, checkpoints. Imports nothing by itself."""
