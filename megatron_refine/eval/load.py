"""A model to evaluate, from any folder that holds one: in Hugging Face's format, a checkpoint, or a run."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_refine import platform
from megatron_refine.config import (
    Config,
    ConfigError,
    Data,
    Eval,
    ModelConfig,
    Parallel,
    Refine,
    Run,
    Train,
    cross_check,
)
from megatron_refine.convert.fields import CONFIG, model_of, read_config
from megatron_refine.convert.source import HFSource
from megatron_refine.data.tokenizer import FILES, Tokenizer, bos_id, load_tokenizer
from megatron_refine.trainer import parity
from megatron_refine.trainer.checkpoint import Checkpoints
from megatron_refine.trainer.manifest import COMPLETE, ORIGIN, complete_folders, model_in, read_manifest
from megatron_refine.trainer.model import RefineModel, build_module
from megatron_refine.trainer.parallel import Ranks, init_parallel


@dataclass(frozen=True)
class Source:
    """Where a model lies and what it is. Found without torch having started anything."""

    folder: Path  # the checkpoint or the folder in Hugging Face's format
    model: ModelConfig
    is_checkpoint: bool
    run: Path | None = None  # the run that wrote the checkpoint

    @property
    def add_bos(self) -> bool:
        """Whether the run that trained the model began its rows with BOS."""
        path = self.run / "config.yaml" if self.run else None
        if not path or not path.exists():
            return False
        try:
            return bool(yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["add_bos"])
        except (ValueError, yaml.YAMLError, TypeError, KeyError):
            raise ConfigError(f"{path}: damaged: no data.add_bos; restore it, or say --bos or --no-bos") from None

    def tokenizer(self, named: str = "") -> Path:
        """`named`, or the tokenizer that came with the model. Raises ConfigError where there is none."""
        if named:
            return Path(named)
        places: list[Path | None] = [self.folder, self.run, self.folder / ORIGIN]  # a run may train with another one
        for path in (place / name for place in places if place for name in FILES):
            if path.exists():
                return path
        raise ConfigError(f"{self.folder}: no {' or '.join(FILES)} came with the model; name one with --tokenizer")


@dataclass(frozen=True)
class Text:
    """A model's tokenizer, and the token that begins its prompts."""

    path: Path
    tokenizer: Tokenizer
    bos: int | None

    def count(self, text: str) -> int:
        """Tokens of a prompt, BOS included."""
        return len(self.tokenizer.encode([text])[0]) + (self.bos is not None)


@dataclass(frozen=True)
class Loaded:
    model: RefineModel
    tokenizer: Tokenizer
    ranks: Ranks
    bos: int | None


def find(path: Path) -> Source:
    """The model at `path`; of a run the newest complete checkpoint. Raises ConfigError, CheckpointError."""
    if (path / CONFIG).exists():
        return Source(path, model_of(read_config(path), str(path / CONFIG)), is_checkpoint=False)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; name a checkpoint, a run or a model in Hugging Face's format")
    steps = complete_folders(path) or complete_folders(path / "checkpoints")
    folder = path if (path / COMPLETE).exists() or not steps else steps[-1]
    model = model_in(folder, read_manifest(folder))
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    return Source(folder, model, is_checkpoint=True, run=run)


def layout(
    source: Source, *, tp: int = 1, sp: bool = False, world: int = 1, precision: str = "", timeout: float = 10.0
) -> Config:
    """A configuration that only evaluates. `precision` "": bf16 on a GPU, fp32 without. Raises ConfigError."""
    precision = precision or ("bf16" if platform.has_gpu() else "fp32")
    return cross_check(
        Config(
            run=Run(timeout_minutes=timeout),
            model=source.model,
            data=Data(seq_length=1 << 20),
            parallel=Parallel(tp=tp, sp=sp),
            train=Train(precision=precision, global_batch_size=max(world // tp, 1)),  # type: ignore[arg-type]
            refine=Refine(enabled=False),
            eval=Eval(sequences=0),
        )
    )


def text(source: Source, tokenizer: str = "", add_bos: bool | None = None) -> Text:
    """`tokenizer`, or what came with the model. `add_bos` None: as the run trained; without a run, no BOS.

    Raises ConfigError.
    """
    path = source.tokenizer(tokenizer)
    found = load_tokenizer(path, source.model.vocab_size, "--tokenizer")
    begins = source.add_bos if add_bos is None else add_bos
    return Text(path, found, bos_id(found, path) if begins else None)


def load(source: Source, config: Config, text: Text) -> Loaded:
    """On every rank: the model without what training needs. Raises ConfigError, ConversionError, CheckpointError."""
    ranks = init_parallel(config)
    model = build_module(config, ranks).eval()
    if source.is_checkpoint:
        Checkpoints(source.folder.parent, config, ranks).load_model(source.folder, model)
    else:
        parity.load(model, HFSource(source.folder), ranks)
    return Loaded(model, text.tokenizer, ranks, text.bos)
