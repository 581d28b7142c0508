"""An SGLang server: of a run, which gets its weights from the trainer, or of a model.

    megatron-refine serve --model MODEL --port 30000 engine.python=.venv-sglang/bin/python
    megatron-refine serve --hosts 10.0.0.3,10.0.0.4 --port 30000 --config FILE [key.sub=value ...]

MODEL is a run, a checkpoint, or a folder in Hugging Face's format. Where a tokenizer came with it, the server takes
text. Without --model the server begins with random weights: a job's script starts it so, once on each engine node
(`megatron-refine submit --engine-nodes`).
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from megatron_refine import config as configuration
from megatron_refine import launcher, usage
from megatron_refine.checkpoint.source import Source, find
from megatron_refine.config.paths import path_argument
from megatron_refine.config.words import spell
from megatron_refine.convert.fields import CONFIG
from megatron_refine.errors import CheckpointError
from megatron_refine.files import TornError, read, read_json, temporary, write_json
from megatron_refine.models import family
from megatron_refine.models.family import FAMILIES
from megatron_refine.run import preflight

EXIT_CONFIG, EXIT_CHECKPOINT = 2, 4


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ends the process with 2 where it is wrong."""
    parser = usage.parser("serve", __doc__)
    parser.add_argument("--model", type=path_argument, metavar="MODEL", help="weights to serve (default: random ones)")
    parser.add_argument("--hosts", default="127.0.0.1", help="addresses of all servers; a node binds to its own")
    parser.add_argument("--port", type=int, required=True, help="of every server")
    usage.add_config(parser, required=False)
    options = parser.parse_intermixed_args(arguments)
    if not options.config and not options.model:
        parser.error("name --config FILE, or --model MODEL")
    return options


def main(arguments: list[str]) -> int:
    """Become the server. Returns only where it cannot: 2, or 4 for a checkpoint or its weights."""
    options = parse(arguments)
    try:
        node, hosts = launcher.read().node, options.hosts.split(",")
        if node >= len(hosts):
            raise configuration.ConfigError(f"--hosts={options.hosts}: none for SLURM_NODEID={node}; name one a node")
        source = find(options.model, "--model") if options.model else None
        words = [*(_settings(source) if source else []), *options.overrides, f"engine.host={hosts[node]}"]
        config = configuration.load(options.config, words, FAMILIES)
        return serve(config, options.port, Path(config.run.dir) / "engine" / f"node_{node}", source)
    except (configuration.ConfigError, launcher.LaunchError) as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    except (CheckpointError, TornError) as error:
        print(error, file=sys.stderr)
        return EXIT_CHECKPOINT


def _settings(source: Source) -> list[str]:
    """Overrides of a configuration that serves this model."""
    from megatron_refine.platform import hardware

    precision = "bf16" if hardware.has_gpu() else "fp32"
    fields = [f"model.{key}={spell(value)}" for key, value in source.model.model_dump().items()]
    run = [f"run.dir={source.run}"] if source.run else []
    return [*fields, *run, "engine.kind=sglang", f"train.precision={precision}"]


def serve(config: configuration.Config, port: int, folder: Path, source: Source | None = None) -> int:
    """Start a server of `source`, or one of random weights, for which config.json, written into `folder`, is all."""
    from megatron_refine.convert.fields import fresh_config
    from megatron_refine.data.tokenizer import FILES
    from megatron_refine.engine.launch import command, environment, positions

    if not config.engine.python:
        raise configuration.ConfigError("engine.python: missing; name the interpreter that has SGLang")
    preflight.engine(config)
    folder.mkdir(parents=True, exist_ok=True)
    if source:
        weights = _known(_weights(source, folder), source, folder)
        line = command(config, weights, port, folder, text=any((weights / name).exists() for name in FILES))
    else:
        tree = fresh_config(config.model, config.train.dtype, positions(config))
        write_json(folder / CONFIG, tree | family.served_as(family.of(config.model.family)))
        line = [*command(config, folder, port, folder), "--load-format", "dummy"]
    os.chdir(folder)  # python -m puts the working directory before all packages
    os.execve(line[0], line, environment(config.engine))


def _known(weights: Path, source: Source, folder: Path) -> Path:
    """Return the folder by a config.json that servers know: itself, or one in `folder` that links to its files."""
    told, tree = family.served_as(family.of(source.model.family)), read_json(weights / CONFIG)
    if told["model_type"] == tree.get("model_type"):
        return weights
    files = sorted(path.name for path in weights.iterdir())
    key = hashlib.sha256(json.dumps([str(weights), tree, files]).encode()).hexdigest()[:12]
    target = folder.absolute() / f"served-{key}"  # of this model alone: other servers read theirs
    unfinished = temporary(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name in files:
        (unfinished / name).symlink_to(weights / name)
    (unfinished / CONFIG).unlink()
    write_json(unfinished / CONFIG, tree | told)
    try:
        unfinished.rename(target)
    except OSError:  # it is there
        shutil.rmtree(unfinished)
    return target


def _weights(source: Source, folder: Path) -> Path:
    """Return the model as a folder in Hugging Face's format: a checkpoint is exported into `folder`, once."""
    if not source.is_checkpoint:
        return source.folder.absolute()
    from megatron_refine.checkpoint.manifest import COMPLETE
    from megatron_refine.convert.errors import ConversionError
    from megatron_refine.platform.megatron.install import install
    from megatron_refine.publish import export

    install()
    target = folder.absolute() / f"{source.folder.name}-{read(source.folder / COMPLETE)[:12]}"  # the manifest's digest
    if not target.exists():
        try:
            export(source, target)
        except ConversionError as error:
            raise CheckpointError(str(error)) from None
    return target
