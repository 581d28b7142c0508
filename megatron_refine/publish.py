"""What makes an export of a run a model that others can use: tokenizer, special ids, generation settings, a card.

A model that came in Hugging Face's format and was not trained since goes back as it came, to the byte.
"""

import filecmp
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_refine import __version__
from megatron_refine.checkpoint.conversion import megatron_to_hf
from megatron_refine.checkpoint.manifest import ORIGIN, read_manifest
from megatron_refine.checkpoint.source import Source
from megatron_refine.convert.fields import CONFIG
from megatron_refine.data.special_tokens import KEPT
from megatron_refine.data.tokenizer import FILES, Tokenizer, load_tokenizer
from megatron_refine.files import copy, read_json, write, write_json
from megatron_refine.models import cost

CARD, GENERATION, TOKENIZER_CONFIG = "README.md", "generation_config.json", "tokenizer_config.json"
_DECLARED = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", GENERATION)
_CLASSES = {"tokenizer.json": "PreTrainedTokenizerFast", "tokenizer.model": "LlamaTokenizer"}
_CODE = '''"""The configuration of this model, for transformers' AutoConfig with trust_remote_code=True."""

from transformers import PretrainedConfig


class Config(PretrainedConfig):
    model_type = "{model_type}"

    def __init__(self, **fields):
        super().__init__(**fields)
        for name, value in fields.items():
            if not hasattr(self, name):
                setattr(self, name, value)
'''


def export(source: Source, folder: Path, dtype: torch.dtype | None = None, size: int | None = None) -> None:
    """Write a checkpoint as a model in Hugging Face's format into `folder`, which must not exist.

    dtype: of the weights, None: as they are. size: most bytes of a file of weights. Raises CheckpointError and
    ConversionError for the checkpoint, ConfigError for its tokenizer, OSError.
    """
    megatron_to_hf(source.folder, folder, dtype, size, beside=lambda beside: _complete(beside, source))


def _complete(folder: Path, source: Source) -> None:
    """Put into an export what its weights lack. Raises ConfigError for a damaged tokenizer, OSError."""
    trained = read_manifest(source.folder).get("config")
    if source.run is None or trained is None:  # a conversion
        return
    came = (source.folder / ORIGIN / CONFIG).is_file()  # its config.json and its card are those that it came with
    config = read_json(folder / CONFIG)
    before = dict(config)
    if not came:
        config["max_position_embeddings"] = trained["data"]["seq_length"]
    tokenizer = next((path for name in FILES if (path := source.run / name).is_file()), None)
    if tokenizer:
        config |= _put_tokenizer(tokenizer, folder, source.model.vocab_size, trained, came)
    if not came:
        config["auto_map"] = {"AutoConfig": "configuration.Config"}
        write(folder / "configuration.py", _CODE.format(model_type=config["model_type"]))
    if config != before:
        write_json(folder / CONFIG, config, indent=2)
    if not (folder / CARD).is_file():
        write(folder / CARD, _card(source, trained, tokenizer))


def _put_tokenizer(
    path: Path, folder: Path, vocab_size: int, trained: Mapping[str, Any], came: bool
) -> dict[str, Any]:  # fmt: skip
    """Copy the run's tokenizer and declare its special tokens. Returns the fields of config.json about them.

    The files of the same tokenizer that the model came with stay as they are, and so do those fields.
    """
    tokenizer = load_tokenizer(path, vocab_size, "data.tokenizer")
    ids = {f"{role}_token_id": getattr(tokenizer.special, role) for role in ("bos", "eos", "pad")}
    ends = list(tokenizer.ends)
    theirs = folder / path.name
    if came and theirs.is_file() and filecmp.cmp(path, theirs, shallow=False):
        return {}
    for name in (*FILES, *_DECLARED, KEPT):
        (folder / name).unlink(missing_ok=True)
    copy(path, theirs)
    write_json(folder / TOKENIZER_CONFIG, _declared(path, tokenizer, trained), indent=2)
    known = {key: value for key, value in ids.items() if value is not None}
    write_json(folder / GENERATION, known | ({"eos_token_id": ends} if len(ends) > 1 else {}), indent=2)
    return ids


def _declared(path: Path, tokenizer: Tokenizer, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    special, data = tokenizer.special, trained.get("data", {})
    tree: dict[str, Any] = {"tokenizer_class": _CLASSES[path.name], "clean_up_tokenization_spaces": False}
    for role in ("bos", "eos", "pad"):
        number = getattr(special, role)
        tree[f"{role}_token"] = special.names.get(role) or (None if number is None else tokenizer.token(number))
        if role in special.names:
            tree.setdefault("added_tokens_decoder", {})[str(number)] = {"content": special.names[role], "special": True}
    if path.name == "tokenizer.model":
        tree |= {"add_bos_token": False, "add_eos_token": False, "legacy": False}
    return tree | {"model_max_length": data.get("seq_length", 2048)}


def _card(source: Source, trained: Mapping[str, Any], tokenizer: Path | None) -> str:
    """The README of the export: what the model is, what it was trained on, how to use it."""
    model, get = source.model, lambda section, key: trained.get(section, {}).get(key)
    parameters = cost.parameters(model)
    paths = get("data", "paths") or get("task", "paths") or []
    data = ", ".join(Path(path).name for path in paths) or "the sources of Python's standard library"
    refine = get("refine", "enabled")
    rows = [
        ("family", model.family), ("parameters", f"{parameters:,}"), ("layers", model.num_layers),
        ("width", model.hidden_size), ("vocabulary", model.vocab_size), ("phase", get("train", "phase")),
        ("steps", read_manifest(source.folder)["step"]), ("sequences a step", get("train", "global_batch_size")),
        ("tokens a sequence", get("data", "seq_length")), ("data", data), ("learning rate", get("optimizer", "lr")),
        ("precision", get("train", "precision")), ("seed", get("run", "seed")),
        ("REFINE", "no: next-token prediction only" if not refine else
         f"reward {get('refine', 'reward')}, {get('refine', 'num_chunks')} positions a sequence, "
         f"{get('refine', 'num_rollouts')} rollouts of {get('refine', 'rollout_len')} tokens, from step "
         f"{get('refine', 'start_step')}"),
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value is not None)
    text = "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n" if tokenizer else ""
    names = "AutoConfig, AutoTokenizer" if tokenizer else "AutoConfig"
    return f"""---
library_name: transformers
tags: [{model.family}, refine]
---

# {source.run.resolve().name if source.run else model.family}

A {model.family} model, trained with megatron_refine {__version__} (REFINE, arXiv 2602.16704).

| | |
|---|---|
{table}

```python
from transformers import {names}

config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
{text}```

`megatron-refine generate FOLDER` continues text with it, `megatron-refine evaluate FOLDER` scores it.
"""
