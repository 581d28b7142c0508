"""The typed configuration: YAML files plus `key.sub=value` overrides.

Nothing here imports torch, so `--help`, `--dry-run` and every configuration error are instant.

schema.py   the whole, and the model's section; its other sections are in inputs.py, training.py and running.py
load.py     files and overrides -> a checked configuration;  checks.py  contradictions between keys
words.py    what a word of a file or an override means;  paths.py  what is expanded in a path
document.py  the keys, their types, defaults and meanings, as docs/configuration.md
"""

from megatron_refine.config.base import ConfigError, LayoutError, Section
from megatron_refine.config.checks import check_world_size, cross_check
from megatron_refine.config.inputs import Data, Task
from megatron_refine.config.load import absolute, absolute_file, files_and_overrides, load, read_as
from megatron_refine.config.running import Checkpoint, Engine, Eval, Run
from megatron_refine.config.schema import Config, ModelConfig
from megatron_refine.config.training import Optimizer, Parallel, Refine, TestTime, Train, Update

__all__ = [
    "Checkpoint", "Config", "ConfigError", "Data", "Engine", "Eval", "LayoutError", "ModelConfig", "Optimizer",
    "Parallel", "Refine", "Run", "Section", "Task", "TestTime", "Train", "Update", "absolute", "absolute_file",
    "check_world_size", "cross_check", "files_and_overrides", "load", "read_as",
]  # fmt: skip
