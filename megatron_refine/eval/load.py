"""A model to ask: with its tokenizer, on every rank, without what training needs."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_refine.checkpoint.checkpoints import Checkpoints
from megatron_refine.checkpoint.source import Source
from megatron_refine.config import (
    Config,
    ConfigError,
    Data,
    Eval,
    Parallel,
    Refine,
    Run,
    Train,
    cross_check,
)
from megatron_refine.data.tokenizer import FILES, Tokenizer, bos_id, find_tokenizer, load_tokenizer
from megatron_refine.platform import hardware
from megatron_refine.trainer.model import RefineModel, build_module
from megatron_refine.trainer.parallel import Ranks, init_parallel


@dataclass(frozen=True)
class Text:
    """A model's tokenizer, and the token that begins its prompts."""

    path: Path
    tokenizer: Tokenizer
    bos: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt, BOS included."""
        return ([] if self.bos is None else [self.bos]) + self.tokenizer.encode([text])[0]

    def count(self, text: str) -> int:
        """Tokens of a prompt, BOS included."""
        return len(self.encode(text))


@dataclass(frozen=True)
class Loaded:
    model: RefineModel
    tokenizer: Tokenizer
    ranks: Ranks
    bos: int | None


def layout(
    source: Source, *, tp: int = 1, sp: bool = False, world: int = 1, precision: str = "", timeout: float = 10.0
) -> Config:
    """A configuration that only evaluates. `precision` "": bf16 on a GPU, fp32 without. Raises ConfigError."""
    precision = precision or ("bf16" if hardware.has_gpu() else "fp32")
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
    path = find_tokenizer(Path(tokenizer), "--tokenizer") if tokenizer else tokenizer_of(source)
    found = load_tokenizer(path, source.model.vocab_size, "--tokenizer")
    begins = _adds_bos(source.run) if add_bos is None else add_bos
    return Text(path, found, bos_id(found, path) if begins else None)


def tokenizer_of(source: Source) -> Path:
    """Return the tokenizer that came with the model. Raises ConfigError where there is none."""
    for path in (place / name for place in source.beside for name in FILES):
        if path.exists():
            return path
    raise ConfigError(f"{source.folder}: no {' or '.join(FILES)} came with the model; name one with --tokenizer")


def _adds_bos(run: Path | None) -> bool:
    """Whether the run that trained the model began its rows with BOS. Raises ConfigError."""
    path = run / "config.yaml" if run else None
    if not path or not path.exists():
        return False
    try:
        return bool(yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["add_bos"])
    except (ValueError, yaml.YAMLError, TypeError, KeyError):
        raise ConfigError(f"{path}: damaged: no data.add_bos; restore it, or say --bos or --no-bos") from None


def load(source: Source, config: Config, text: Text) -> Loaded:
    """Load the model for evaluation, on every rank. Raises ConfigError, ConversionError, CheckpointError."""
    ranks = init_parallel(config)
    model = build_module(config, ranks).eval()
    Checkpoints(source.folder.parent, config, ranks).load_model(source, model)
    return Loaded(model, text.tokenizer, ranks, text.bos)
