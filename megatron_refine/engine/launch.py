"""SGLang servers as processes of their own interpreter: command, environment, log, end."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from megatron_refine.config import Config, ConfigError, Engine
from megatron_refine.platform import hardware

PR_SET_PDEATHSIG = 1  # of prctl(2)
STOP_SECONDS = 10.0
MARGIN = 64  # tokens of a prompt beyond data.seq_length
# Of our own ranks: a server has ranks of its own.
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
# glibc: freed memory stays with the process. Else the kernel clears the pages of every bucket of weights anew, which
# takes longer than to receive it.
CPU_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
# SGLang's prefill graphs call a layer as no layer here can be called; its Triton backend asks for the width of a value
# head, which a model without softmax attention has none of.
GPU_ARGUMENTS = ["--disable-prefill-cuda-graph"]
CPU_ARGUMENTS = ["--device", "cpu", "--attention-backend", "torch_native", "--sleep-on-idle"]


class Process:
    """A server that this rank started. It ends with this rank, whatever ends that."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_end_with_parent,
                cwd=log.parent,  # python -m puts the working directory before all packages
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        """End it and all that it started."""
        if not self.ended():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def last_words(self) -> str:
        """The last line of the log that is of level ERROR, else names an error; and where the log is."""
        lines = self.log.read_text(errors="replace", encoding="utf-8").splitlines()
        named = [line.strip() for line in lines if "Error" in line and not line.startswith(" ")]
        named += [line.strip() for line in lines if "ERROR: " in line]
        return f"{named[-1][:300] if named else 'see its log'} ({self.log})"


def launch(config: Config, weights: Path, port: int, log: Path, gpu: int | None = None) -> Process:
    """Start a server of the model in `weights`, a folder in Hugging Face's format. gpu: as of `command`."""
    return Process(command(config, weights, port, log.parent, gpu=gpu), environment(config.engine), log)


def first_gpus(config: Config, gpus: int, trainers: int) -> list[int | None]:
    """Return the first GPU of each server on a machine with so many GPUs, of which ranks have the first `trainers`.

    Servers take the GPUs that are left, or share those of the ranks. None where the configuration says it, or without a
    GPU. Raises ConfigError.
    """
    engine = config.engine
    needed, placed = engine.servers * engine.tp, "--base-gpu-id" in engine.args or "CUDA_VISIBLE_DEVICES" in engine.env
    if not gpus or placed or engine.urls:
        return [None] * engine.servers
    if engine.tp > gpus:
        raise ConfigError(f"engine.tp={engine.tp}: this machine has {gpus} GPUs")
    if trainers + needed <= gpus:
        return [trainers + i * engine.tp for i in range(engine.servers)]
    if engine.sync == "distributed":
        raise ConfigError(
            f"engine.sync=distributed: {trainers} ranks and {needed} GPUs of servers share {gpus}, and NCCL refuses "
            "two processes on one GPU; set engine.sync=disk, or start servers elsewhere (engine.urls)"
        )
    room = gpus // engine.tp
    return [i % room * engine.tp for i in range(engine.servers)]


def command(
    config: Config, weights: Path, port: int, folder: Path, text: bool = False, gpu: int | None = None
) -> list[str]:
    """The command line. An API key goes into a file that only this user can read: command lines are public.

    text: the server takes text too, by the tokenizer beside the weights; else token ids alone. gpu: its first one.
    """
    engine = config.engine
    # without layers that keep keys and values SGLang has room for one sequence, its caches included
    tokens = engine.max_requests * positions(config)
    arguments = [
        "--model-path", str(weights), "--host", engine.host, "--port", str(port), "--tp", str(engine.tp),
        "--dtype", config.train.dtype,
        "--skip-server-warmup", "--random-seed", str(config.run.seed), "--max-total-tokens", str(tokens),
        # a state at the end of every prompt, wherever that is; it has no overlap
        "--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule",
    ]  # fmt: skip
    arguments += [] if gpu is None else ["--base-gpu-id", str(gpu)]
    arguments += [] if text else ["--skip-tokenizer-init"]
    arguments += GPU_ARGUMENTS if hardware.has_gpu() else CPU_ARGUMENTS
    if engine.api_key_env:
        secret = folder / f"server-{port}.yaml"
        secret.touch(0o600)
        secret.write_text(yaml.safe_dump({"api-key": os.environ[engine.api_key_env]}), encoding="utf-8")
        arguments += ["--config", str(secret)]
    return [
        os.path.abspath(shutil.which(engine.python) or engine.python),
        "-m",
        "sglang.launch_server",
        *arguments,
        *engine.args,
    ]


def positions(config: Config) -> int:
    """Return the length of the longest text that a rollout makes, and some tokens more."""
    return config.data.seq_length + config.refine.rollout_len + MARGIN


def environment(engine: Engine) -> dict[str, str]:
    """This process's, without its place among our ranks."""
    kept = {
        name: value for name, value in os.environ.items()
        if name not in NOT_INHERITED and not name.startswith(("TORCHELASTIC_", "SLURM_"))
    }  # fmt: skip
    # log-probabilities at the temperature that a token was drawn at, as the trainer's; not at 1
    kept |= {"SGLANG_RETURN_ORIGINAL_LOGPROB": "0", "HF_HUB_OFFLINE": "1"}
    if not hardware.has_gpu():
        kept |= {"SGLANG_USE_CPU_ENGINE": "1"} | CPU_MEMORY
        if engine.tp > 1:  # without it SGLang wants a NUMA node for each
            kept.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _cores(engine.tp))
    return kept | engine.env


def _cores(tp: int) -> str:
    """Our cores, shared out to the ranks of a server, as in 0,1|2,3; one core for several ranks where they are few."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::tp] or [cores[rank % len(cores)]] for rank in range(tp)]
    return "|".join(",".join(map(str, share)) for share in shares)


def _end_with_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a rank keeps its own stop signals from its helpers
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_until(done: Callable[[], bool], seconds: float, pause: float = 0.2) -> bool:
    """Whether `done()` came true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True
