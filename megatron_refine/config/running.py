"""Sections on what goes on around training: folder and deadlines, rollout engine, evaluations, checkpoints."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_refine.config.base import Section
from megatron_refine.config.paths import PathText, ProgramText, RequiredPath
from megatron_refine.config.training import SELECTIONS, one_of

LONGEST = 1_000_000  # minutes or seconds of a deadline: what waits for it counts nanoseconds


class Run(Section):
    """Folder, seed, Weights & Biases, and deadlines."""

    dir: RequiredPath = Field(
        "runs/default",
        description="Folder of the run: configuration, metrics, checkpoints, logs, report. A run with a complete "
        "checkpoint is resumed.",
    )
    baseline: PathText = Field(
        "",
        description="Folder of a run to compare with, such as the same run with `refine.enabled=false`. Its last "
        "evaluation becomes the row `baseline` of the closing table and of the report. Empty: none.",
    )
    seed: int = Field(1, ge=0, description="Seed of the weights, the data order, the selection and the rollouts.")
    wandb: Literal["off", "offline", "online"] = Field(
        "off",
        description="Logging to Weights & Biases. `online` without an API key, or with one that is refused, ends the "
        "command with code 2 before data and model. Where the server does not answer, the attempt is logged offline.",
    )
    wandb_project: str = Field("megatron_refine", min_length=1, description="Project at Weights & Biases.")
    wandb_entity: str = Field("", description="User or team at Weights & Biases. Empty: the account's own.")
    wandb_group: str = Field("", description="Group of runs that belong together at Weights & Biases. Empty: none.")
    wandb_tags: list[str] = Field(default_factory=list, description="Tags of the run at Weights & Biases.")
    timeout_minutes: float = Field(10.0, gt=0, le=LONGEST, description="Deadline of every collective, in minutes.")
    phase_minutes: float = Field(
        120.0,
        gt=0,
        description="Deadline of a preparation, a resumption, a step, an evaluation or a save, in minutes. A rank that "
        "passes it prints its stacks, names rank and phase, and ends with code 8.",
    )
    reserve_minutes: float = Field(
        1.0,
        ge=0,
        description="Under SLURM: minutes before the end of the job's time by which the last step is saved.",
    )


class Engine(Section):
    """Engine that makes the rollouts. `engine.kind=sglang` and its keys: docs/sglang.md.

    The trainer scores every rollout again, and its log-probabilities alone are the old ones of the policy loss. The gap
    of a token is their distance from the engine's, in nats, both at `refine.rollout_temperature`: about 1e-7 with the
    native engine in fp32, more with an engine that has a copy of the weights and kernels of its own. An engine's
    log-probability that is not finite is an infinite gap. `engine.importance_cap`, `engine.mask_gap` and
    `engine.stop_gap` say what is done about gaps.
    """

    kind: Literal["native", "sglang"] = Field(
        "native",
        description="`native`: the trainer's own model, forked. `sglang`: SGLang servers with a copy of the weights, "
        "for the families that docs/sglang.md names.",
    )
    cuda_graphs: Literal["auto", "true", "false"] = Field(
        "auto",
        description="native: decode rollouts as recorded CUDA graphs. `auto`: where there is a GPU and "
        "`parallel.pp=1`; step by step, with a warning, where recording fails.",
    )
    python: ProgramText = Field(
        "",
        description="Python interpreter with SGLang, to launch servers with: a path, or a name that `PATH` finds. Not "
        "together with `engine.urls`.",
    )
    urls: list[str] = Field(
        default_factory=list, description="Servers that run already, each `http://host:port`. Empty: launch some."
    )
    servers: int = Field(1, ge=1, description="Number of servers to launch, on the first rank's machine.")
    tp: int = Field(1, ge=1, description="Tensor-parallel size of each server. Divides the heads of the mixer.")
    host: str = Field("127.0.0.1", description="Address that launched servers bind to.")
    port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of the first launched server. The others take the next ones. 0: free ports.",
    )
    args: list[str] = Field(default_factory=list, description="Further arguments of `sglang.launch_server`.")
    env: dict[str, str] = Field(default_factory=dict, description="Further environment variables of launched servers.")
    api_key_env: str = Field(
        "", description="Name of the environment variable that holds the servers' API key. Empty: no key."
    )
    sync: Literal["distributed", "disk"] = Field(
        "distributed",
        description="How weights reach the servers. `distributed`: a broadcast by NCCL or gloo. `disk`: a folder that "
        "trainer and servers can read.",
    )
    sync_dir: PathText = Field(
        "",
        description="Where each run makes a folder of its own for exported weights, under one path on all machines. "
        "Empty: `engine/` of `run.dir`.",
    )
    master_address: str = Field(
        "",
        description="Address of this machine as the servers reach it, for the broadcast. Empty: loopback where all are "
        "local, else the machine's name.",
    )
    bucket_mb: int = Field(0, ge=0, description="MiB of weights in a broadcast. 0: 512 with NCCL, 256 with gloo.")
    max_requests: int = Field(
        64, ge=1, description="Most sequences whose rollouts are in flight, per rank; each has c*n requests."
    )
    lag: int = Field(
        0,
        ge=0,
        le=1,
        description="1: servers write the rollouts of the next batch while the trainer updates, so with weights one "
        "step old. Needs `engine.importance_cap`. 0: the trainer waits for rollouts of its own weights.",
    )
    offload: bool = Field(
        False,
        description="Hold gradients and optimizer state in the host's memory while servers write rollouts: for servers "
        "on the trainer's GPUs. It changes no bit of a step. The bytes are `engine/offloaded_bytes`.",
    )
    start_timeout: float = Field(
        600.0, gt=0, le=LONGEST, description="Seconds within which a launched server must be healthy."
    )
    request_timeout: float = Field(
        120.0, gt=0, le=LONGEST, description="Deadline of a request in seconds. A server that passes it counts as dead."
    )
    sync_timeout: float = Field(
        300.0, gt=0, le=LONGEST, description="Deadline of each part of a weight sync, in seconds."
    )
    max_restarts: int = Field(
        3, ge=0, description="Most restarts and reloads of servers in a run. One more ends it with code 5."
    )
    probe_gap: float = Field(
        0.0,
        ge=0,
        description="Largest mean gap of the prompt that is scored after a sync, in nats. 0: 1e-3 in fp32, 0.05 in "
        "bf16.",
    )
    importance_cap: float = Field(
        0.0,
        ge=0,
        description="Cap of truncated importance weights (arXiv 1802.01561). The loss of a token is multiplied by "
        "min(p_trainer / p_engine, cap), without a gradient, which makes up for rollouts drawn from the engine's "
        "distribution. 2 is usual. 0: no weights. The mean weight is `rollout/importance_mean`.",
    )
    mask_gap: float = Field(
        1.0,
        gt=0,
        description="Largest gap of a token, in nats, at which its rollout is learned from. Above it all tokens of the "
        "rollout count as zero in the loss, which stays a mean over all rollout tokens, and its reward stays in its "
        "group. The share of such rollouts is `rollout/masked_fraction`.",
    )
    stop_gap: float = Field(
        0.2,
        gt=0,
        description="Largest mean gap of a REFINE step, in nats, over the rollout tokens of all ranks, masked ones too "
        "(`rollout/logprob_gap_mean`). Above it the run ends with code 6 and does not save that step. Evaluations "
        "never stop a run.",
    )


class Eval(Section):
    """Evaluations during training. The parts of a run are NTP only (up to `refine.start_step`) and REFINE."""

    every: int = Field(0, ge=0, description="Steps between evaluations. 0: before and after each part of the run only.")
    sequences: int = Field(16, ge=0, description="Number of held-out sequences to evaluate on. 0: none.")
    rollouts: bool = Field(
        True,
        description="Write rollouts of held-out sequences, for `eval/reward_mean` and `eval/greedy_match`. false: the "
        "losses alone, in a third of the time.",
    )
    selection: Annotated[str, one_of("", *SELECTIONS)] = Field(
        "",
        description="How the positions of those rollouts are selected; empty: by `refine.selection`. With `uniform` "
        "they are the same for every model, so that rewards of two models compare.",
    )
    tasks: list[str] = Field(
        default_factory=list, description="Tasks of `megatron-refine evaluate`, or groups of them: docs/evaluation.md."
    )
    lengths: list[int] = Field(
        default_factory=lambda: [4096], description="Context lengths of generated tasks, in tokens."
    )
    examples: int = Field(
        100, ge=1, description="Most examples of each task and length, and most prompts of `task.valid_paths`."
    )
    data: PathText = Field("", description="Folder of the files that tasks read.")
    essays: PathText = Field("", description="Folder of texts for essay haystacks. Empty: a built-in corpus.")
    batch_size: int = Field(
        0, ge=0, description="Prompts answered at once by each replica of the model. 0: `train.micro_batch_size`."
    )


class Checkpoint(Section):
    """Checkpoints: when they are written, which ones are kept, and which one a run starts from."""

    every: int = Field(0, ge=0, description="Steps between checkpoints. 0: by the clock and at the end only.")
    minutes: float = Field(
        30.0,
        ge=0,
        description="Most minutes of training that a crash may lose, a single step aside. A checkpoint is written once "
        "the next step could pass them, by the first rank's clock, and at `checkpoint.every`, whichever is earlier. 0: "
        "not by the clock.",
    )
    # the key is a word of Python's, so it is written as what a line `async: bool = Field(...)` would be
    __annotations__["async"] = bool
    locals()["async"] = Field(
        False,
        description="Write the files of a checkpoint while the training goes on. It is complete, and counts, some "
        "steps later. The end of a run, a stop and the next checkpoint wait for it.",
    )
    keep: int = Field(2, ge=1, description="Number of complete checkpoints to keep.")
    load: PathText = Field(
        "",
        description="Checkpoint folder whose weights a run starts from while it has no checkpoint of its own. The "
        "optimizer starts fresh. Empty: random weights.",
    )
    fallback: bool = Field(
        False,
        description="Where the newest checkpoint is damaged, say so and resume from the one before it. false: end with "
        "code 4.",
    )

    @property
    def waits(self) -> bool:
        """Whether the training waits until a checkpoint is complete."""
        return not getattr(self, "async")
