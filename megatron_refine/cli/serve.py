"""An SGLang server of a run on a node of its own; it gets its weights from the trainer.

    megatron-refine serve --hosts 10.0.0.3,10.0.0.4 --port 30000 --config FILE [key.sub=value ...]

A job's script starts it once on each engine node (`megatron-refine submit --engine-nodes`). It begins with random
weights.
"""

import os
import sys
from pathlib import Path

from megatron_refine import config as configuration
from megatron_refine import launcher, preflight, usage
from megatron_refine.files import write_json
from megatron_refine.models.family import FAMILIES


def main(arguments: list[str]) -> int:
    """Become the server. Returns only where it cannot: 2."""
    parser = usage.parser("serve", __doc__)
    parser.add_argument("--hosts", required=True, help="addresses of all servers; a node takes its own and binds to it")
    parser.add_argument("--port", type=int, required=True, help="of every server")
    usage.add_config(parser)
    options = parser.parse_intermixed_args(arguments)
    try:
        node, hosts = launcher.read().node, options.hosts.split(",")
        if node >= len(hosts):
            raise configuration.ConfigError(f"--hosts={options.hosts}: none for SLURM_NODEID={node}; name one a node")
        host = hosts[node]
        config = configuration.load(options.config, [*options.overrides, f"engine.host={host}"], FAMILIES)
        return serve(config, options.port, Path(config.run.dir) / "engine" / f"node_{node}")
    except (configuration.ConfigError, launcher.LaunchError) as error:
        print(error, file=sys.stderr)
        return 2


def serve(config: configuration.Config, port: int, folder: Path) -> int:
    """Write config.json, which is all of the model that the server needs, into `folder`, and start."""
    from megatron_refine.convert.fields import CONFIG, fresh_config
    from megatron_refine.engine.launch import command, environment

    if not config.engine.python:
        raise configuration.ConfigError("engine.python: missing; name the interpreter that has SGLang")
    preflight.engine(config)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.train.precision]
    write_json(folder / CONFIG, fresh_config(config.model, dtype))
    line = [*command(config, folder, port, folder), "--load-format", "dummy"]
    os.chdir(folder)  # python -m puts the working directory before all packages
    os.execve(line[0], line, environment(config.engine))
