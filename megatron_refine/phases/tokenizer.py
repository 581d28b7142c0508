"""Which tokenizer a run takes that names none: what the weights have read, they go on to read. Imports no torch."""

from pathlib import Path

from megatron_refine.checkpoint.manifest import complete_folders
from megatron_refine.checkpoint.source import CHECKPOINTS, find
from megatron_refine.config import Config
from megatron_refine.data.tokenizer import FILES


def with_tokenizer(config: Config) -> Config:
    """Return the configuration with data.tokenizer as it is meant.

    Of a run with a checkpoint it is its own, of a new one that of the model in checkpoint.load; else one is trained.
    Raises ConfigError, CheckpointError.
    """
    run = Path(config.run.dir)
    if config.data.tokenizer or config.train.phase != "midtrain":
        return config
    if complete_folders(run / CHECKPOINTS):
        places = [run]
    elif config.checkpoint.load:
        places = find(Path(config.checkpoint.load), "checkpoint.load").beside
    else:
        return config
    found = next((path for place in places for name in FILES if (path := place / name).exists()), None)
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(found or "")})})
