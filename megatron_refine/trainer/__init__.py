"""What drives Megatron-Core: process groups, model, passes, head, optimizer. Imports nothing by itself."""
