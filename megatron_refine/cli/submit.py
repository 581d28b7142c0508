"""Submit a run, a sweep or a chain of jobs to SLURM.

    megatron-refine submit CONFIG [CONFIG ...] --nodes 4 --site launch/site.yaml [key.sub=value ...] [--dry-run]

The job resumes by itself: it saves and requeues itself before the end of its time, when it is pre-empted, and after
failures that may pass. See docs/operations.md.
"""

import argparse
import sys
from pathlib import Path

from megatron_refine import config as configuration
from megatron_refine import usage
from megatron_refine.config.load import read_as
from megatron_refine.config.paths import path_argument
from megatron_refine.errors import CheckpointError
from megatron_refine.estimate.hardware import Hardware
from megatron_refine.estimate.plan import plan
from megatron_refine.models.family import FAMILIES
from megatron_refine.run import preflight
from megatron_refine.slurm.job import Job
from megatron_refine.slurm.site import Site
from megatron_refine.slurm.submit import submit
from megatron_refine.slurm.sweep import points


def main(arguments: list[str]) -> int:
    """Check everything, then submit. Returns the exit code: 0, or 2 with a line that says what is wrong."""
    options = parse(arguments)
    try:
        job = build(options)
        if options.dry_run:
            world = job.nodes * job.site.ranks_per_node
            print(job.script() + "\n" + plan(job.config, world, Hardware()))
        for line in preflight.warnings(job.config, job.nodes):
            print(f"warning: {line}", file=sys.stderr)
        if options.preflight:
            check(job)
        if options.dry_run:
            return 0
        ids = submit(job, options.chain)
    except (configuration.ConfigError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"submitted {', '.join(ids)}: logs in {job.run_dir / 'logs'}")
    return 0


def check(job: Job) -> None:
    """Raise ConfigError, a line a problem, for what would end the run, or a point of the sweep, at its start."""
    for config in job.runs:
        preflight.check(config, job.site.in_image)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = usage.parser("submit", __doc__)
    parser.add_argument("config", nargs="+", metavar="CONFIG", help="YAML files, later ones win; then key.sub=value")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that train (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, help="overrides the site's gpus_per_node")
    parser.add_argument("--engine-nodes", type=int, default=0, help="further nodes, with an SGLang server each")
    parser.add_argument("--site", type=path_argument, help="a YAML file of launch/site.yaml's keys")
    parser.add_argument(
        "--array", type=path_argument, metavar="FILE", help="a sweep: {key: [values]} or [{key: value}, ...]"
    )
    parser.add_argument("--at-once", type=int, default=0, help="runs of the sweep at the same time (default: all)")
    parser.add_argument(
        "--chain", type=int, default=1, help="jobs one after the other, where requeueing is not allowed"
    )
    parser.add_argument("--name", default="", help="of the job (default: the run's folder)")
    parser.add_argument(
        "--no-preflight", dest="preflight", action="store_false",
        help="do not check files and services, where this machine does not see what the nodes see",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print script and estimate; submit nothing")
    return parser.parse_intermixed_args(arguments)


def build(options: argparse.Namespace) -> Job:
    """The job of the command line, checked. Raises ConfigError."""
    for name in ("nodes", "chain"):
        if getattr(options, name) < 1:
            raise configuration.ConfigError(f"--{name}={getattr(options, name)}: must be 1 or more")
    site = read_as(options.site, Site) if options.site else Site()
    if options.gpus_per_node is not None:
        site = site.model_copy(update={"gpus_per_node": options.gpus_per_node})
    files, given = configuration.files_and_overrides(options.config)
    files = [configuration.absolute_file(file) for file in files]
    overrides = configuration.absolute(files, given, FAMILIES)
    config = configuration.load(files, overrides, FAMILIES)
    world = options.nodes * site.ranks_per_node
    swept = points(options.array, config) if options.array else []
    runs = [configuration.load(files, [*overrides, *point], FAMILIES) for point in swept] or [config]
    for each in runs:
        configuration.check_world_size(each, world)
    swept = [configuration.absolute(files, point, FAMILIES, before=overrides) for point in swept]
    command = [argument for file in files for argument in ("--config", file)] + overrides
    name = options.name or Path(config.run.dir).name
    job = Job(name, config, command, options.nodes, site, options.engine_nodes, swept, options.at_once, runs=runs)
    job.check()
    return job
