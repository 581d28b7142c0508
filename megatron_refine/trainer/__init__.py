"""All that drives Megatron-Core: process groups, model, passes, optimizer, checkpoints."""

from megatron_refine import platform

platform.install()  # before any module of this package imports megatron.core
