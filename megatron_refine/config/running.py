"""Sections on what goes on around training: folder and deadlines, rollout engine, evaluations, checkpoints."""

from typing import Literal

from pydantic import Field

from megatron_refine.config.base import Section
from megatron_refine.config.paths import PathText, ProgramText, RequiredPath


class Run(Section):
    dir: RequiredPath = Field("runs/default", description="config, metrics, checkpoints, logs and report of the run")
    seed: int = Field(1, ge=0, description="seed of the weights, the data order, the selection and the rollouts")
    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases logging")
    wandb_project: str = Field("megatron_refine", min_length=1, description="project there")
    wandb_entity: str = Field("", description="user or team there; empty: the account's own")
    wandb_group: str = Field("", description="group there, of runs that belong together")
    wandb_tags: list[str] = Field(default_factory=list, description="tags there")
    timeout_minutes: float = Field(10.0, gt=0, description="deadline of every collective")
    phase_minutes: float = Field(
        120.0, gt=0, description="deadline of every phase: preparation, resumption, a step, an evaluation, a save"
    )
    reserve_minutes: float = Field(
        1.0, ge=0, description="before the end of a SLURM job: left over when the last step and save are done"
    )


class Engine(Section):
    kind: Literal["native", "sglang"] = Field(
        "native", description="native: forks the trainer's own model; sglang: SGLang servers with a copy of the weights"
    )
    cuda_graphs: bool = Field(
        False, description="native: record the decoding of rollouts as CUDA graphs (DeltaNet, Gated DeltaNet)"
    )
    python: ProgramText = Field("", description="interpreter of the environment with SGLang, to launch servers with")
    urls: list[str] = Field(default_factory=list, description="servers that run already; empty: launch them")
    servers: int = Field(1, ge=1, description="servers to launch, on the first rank's machine")
    tp: int = Field(1, ge=1, description="tensor parallel size of each server")
    host: str = Field("127.0.0.1", description="address that launched servers bind to")
    port: int = Field(0, ge=0, le=65535, description="of the first launched server, the others follow; 0: free ones")
    args: list[str] = Field(default_factory=list, description="further arguments of sglang.launch_server")
    env: dict[str, str] = Field(default_factory=dict, description="further environment variables of launched servers")
    api_key_env: str = Field("", description="the environment variable that holds the servers' API key")
    sync: Literal["distributed", "disk"] = Field(
        "distributed", description="how weights reach the servers: NCCL or gloo broadcast; a folder that all can read"
    )
    sync_dir: PathText = Field(
        "", description="folder of exported weights, the same for all; empty: engine/ of run.dir"
    )
    master_address: str = Field(
        "", description="this machine as the servers reach it, for the broadcast; empty: loopback if they are local"
    )
    bucket_mb: int = Field(0, ge=0, description="MiB of weights a broadcast; 0: 512 with NCCL, 256 with gloo")
    max_requests: int = Field(64, ge=1, description="requests in flight, a rank")
    start_timeout: float = Field(600.0, gt=0, description="seconds until a launched server must be healthy")
    request_timeout: float = Field(120.0, gt=0, description="seconds of a request, after which its server is dead")
    sync_timeout: float = Field(300.0, gt=0, description="seconds of each part of a weight sync")
    max_restarts: int = Field(3, ge=0, description="restarts and reloads of servers in a run before it stops")
    probe_gap: float = Field(
        0.0, ge=0, description="mean gap in nats that a sync's probe may show; 0: 1e-3 in fp32, 0.05 in bf16"
    )
    importance_cap: float = Field(
        0.0, ge=0, description="truncated importance weights: highest trainer/engine probability ratio; 0: no weights"
    )
    mask_gap: float = Field(1.0, gt=0, description="no learning from a rollout with a token of a larger gap, in nats")
    stop_gap: float = Field(0.2, gt=0, description="mean gap of a step, in nats, above which the run stops")


class Eval(Section):
    every: int = Field(0, ge=0, description="steps between evaluations; 0: before and after each part only")
    sequences: int = Field(16, ge=0, description="held-out sequences; 0: no evaluation on them")
    tasks: list[str] = Field(default_factory=list, description="tasks or groups, as of tools/evaluate.py")
    lengths: list[int] = Field(default_factory=lambda: [4096], description="context lengths of generated tasks")
    examples: int = Field(100, ge=1, description="most examples of a task and length, and of task.valid_paths")
    data: PathText = Field("", description="folder of the files that tasks read")
    essays: PathText = Field("", description="folder of texts for essay haystacks; empty: a built-in corpus")
    batch_size: int = Field(0, ge=0, description="prompts answered at once, a replica; 0: train.micro_batch_size")


class Checkpoint(Section):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: by the clock and at the end only")
    minutes: float = Field(
        30.0,
        ge=0,
        description="most minutes of training that a crash may lose, a single step aside; 0: not by the clock",
    )
    keep: int = Field(2, ge=1, description="complete checkpoints kept")
    load: PathText = Field("", description="a checkpoint folder to start from when the run has none of its own")
    fallback: bool = Field(False, description="where the newest checkpoint is damaged, go on from the one before it")
