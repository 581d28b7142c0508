"""The typed configuration: YAML files plus `key.sub=value` overrides.

Nothing here imports torch, so `--help`, `--dry-run` and every configuration error are instant.
"""

from megatron_refine.config.checks import check_world_size, cross_check
from megatron_refine.config.load import absolute, absolute_file, files_and_overrides, load, read_as
from megatron_refine.config.schema import (
    Checkpoint,
    Config,
    ConfigError,
    Data,
    Engine,
    Eval,
    ModelConfig,
    Optimizer,
    Parallel,
    Refine,
    Run,
    Section,
    Task,
    TestTime,
    Train,
    Update,
)

__all__ = [
    "Checkpoint", "Config", "ConfigError", "Data", "Engine", "Eval", "ModelConfig", "Optimizer", "Parallel", "Refine",
    "Run", "Section", "Task", "TestTime", "Train", "Update", "absolute", "absolute_file", "check_world_size",
    "cross_check", "files_and_overrides", "load", "read_as",
]  # fmt: skip
