"""Train a fast-weight model with next-token prediction and REFINE.

    megatron-refine train --config configs/quickstart.yaml [--ranks 8] [--dry-run] [key.sub=value ...]

--ranks starts ranks on this machine; without it torchrun or SLURM does. The same command resumes the run.

Exit codes: 0 done, 2 configuration or data, 3 loss or gradient not finite, 4 checkpoint, 5 engine cannot go on, 6
engine and trainer disagree on the rollouts, 7 another attempt has taken the run over, 8 a rank was lost or hung, 75
stopped after saving, by Ctrl-C, a signal or the end of the job's time, 130 ended at once by Ctrl-C, 1 anything else.
After 7, 8 and 75 run the same command again to go on.
"""

import contextlib
import gc
import sys
from typing import TYPE_CHECKING, Any

from megatron_refine import launcher, ranks, usage
from megatron_refine.files import speak_utf8, start_in_utf8
from megatron_refine.run import interrupt

if TYPE_CHECKING:
    from megatron_refine import config as configuration
    from megatron_refine.run.session import Session

EXIT_CONFIG, EXIT_CHECKPOINT, EXIT_REQUEUE = 2, 4, 75


def train(session: "Session") -> int:
    """The run, on this rank. Returns the exit code."""
    config = session.config
    last, start = session.total_steps, config.refine.start_step
    session.say(f"run {config.run.dir}: {config.train.phase} step {session.progress.step}/{last}, "
                f"{usage.ranks(session.ranks.world)}, {'fused' if config.fused else 'two-pass'} update")  # fmt: skip
    session.say(session.used)
    if session.resumed and session.progress.step < last:
        session.say(session.resumed)
    watch = session.watch
    if session.progress.step == 0:
        with watch("evaluation"):
            metrics: dict[str, Any] = session.evaluate()
        session.record({"step": 0, "consumed_samples": 0} | metrics)
    gc.freeze()  # what is there by now stays: it is no longer searched for garbage
    gc.set_threshold(1000, 10, 10)  # but what steps leave is, soon: it may hold a GPU's memory
    session.stop.hear_interrupts()
    while session.progress.step < last:
        refine = config.refine.enabled and session.progress.step >= start
        with watch("step"):
            metrics = session.train_step(refine)
        step = session.progress.step
        if _due(step, config.eval.every) or step in (start, last):
            with watch("evaluation"):
                metrics |= session.evaluate()
        verdict = session.stop.agreed()
        session.record(metrics)  # before the save: a run that goes on from a checkpoint has the rows of all its steps
        with watch("save"):
            session.settle(wait=False)
            if _due(step, config.checkpoint.every) or verdict or step == last:
                session.save()
            if verdict.stops or step == last:
                session.settle()
        if verdict.stops and step < last:
            session.say(
                f"stopped by {session.stop.name or 'another rank'} after step {step}: run the same command to go on"
            )
            return EXIT_REQUEUE
    session.finish()
    return 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, then dry-run or train. Every failure ends in one line."""
    parser = usage.parser("train", __doc__)
    usage.add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="print configuration and estimate; start nothing")
    parser.add_argument("--ranks", type=int, default=0, metavar="N", help="start N ranks on this machine, one a GPU")
    parser.add_argument("--gpus", type=int, help="world size of the dry run (default: that of the environment)")
    options = parser.parse_intermixed_args(arguments)
    from megatron_refine import config as configuration  # late, as all that takes long: Ctrl-C is one line
    from megatron_refine import extras
    from megatron_refine.errors import CheckpointError
    from megatron_refine.models.family import FAMILIES
    from megatron_refine.run import preflight

    try:
        config = configuration.load(options.config, options.overrides, FAMILIES)
        world = launcher.read().world
        if options.dry_run:
            from megatron_refine.estimate.hardware import Hardware
            from megatron_refine.estimate.plan import plan

            world = options.gpus or max(world, config.parallel.model_size)
            print(config.to_yaml() + "\n" + plan(config, world, Hardware()))
            configuration.check_world_size(config, world)
            preflight.check(config)
            return 0
        if options.ranks < 0 or (options.ranks and world > 1):
            what = "must be 1 or more" if options.ranks < 0 else f"a launcher has started {world} ranks; leave it out"
            raise configuration.ConfigError(f"--ranks={options.ranks}: {what}")
        configuration.check_world_size(config, options.ranks or world)
        launch = launcher.check()
        extras.check_transformer_engine()
        checked = bool(options.ranks) or world == 1 or (launcher.under_torchrun() and launch.rank == 0)
        if checked:  # ranks of SLURM have it when they have met: the first of them tells the others
            preflight.check(config)
        if options.ranks:
            files = [word for file in options.config for word in ("--config", file)]
            return ranks.start(options.ranks, ["train", *files, *options.overrides])
        return ranks.leave(_run(config, checked))
    except (configuration.ConfigError, launcher.LaunchError) as error:
        if launcher.speaks() or isinstance(error, launcher.LaunchError):
            print(error, file=sys.stderr)
        return EXIT_CONFIG
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return EXIT_CHECKPOINT


def _run(config: "configuration.Config", checked: bool) -> int:
    """`train` with its failures as exit codes, and all that it started ended. checked: by this process's preflight."""
    interrupt.listen()  # before threads that would not block its signal
    if launcher.speaks():
        print("importing PyTorch and Megatron-Core", flush=True)
    from megatron_refine.platform.megatron.install import install

    install()
    import torch.distributed as dist

    from megatron_refine.run.exits import ending_of
    from megatron_refine.run.session import Session
    from megatron_refine.run.watchdog import Watchdog

    watch = Watchdog(config.run.phase_minutes)
    ending, session = contextlib.ExitStack(), None
    ending.callback(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    with ending:
        try:
            session = ending.enter_context(Session(config, watch, checked))
            session.code = train(session)
            return session.code
        except Exception as error:  # said before servers are ended: torchrun gives the ranks little time
            if session:
                session.note(error)
            found = ending_of(error, watch.where, launcher.speaks())
            if found is None:
                raise
            code, line = found
            if session:
                session.code = code
            if line:
                print(line, file=sys.stderr, flush=True)
            return code


if __name__ == "__main__":
    start_in_utf8()
    speak_utf8()
    sys.exit(interrupt.quiet(main))
