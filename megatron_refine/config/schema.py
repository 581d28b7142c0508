"""The sections of the configuration. Nothing here imports torch."""

import functools
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, create_model

from megatron_refine.config.paths import FilePaths, PathText, ProgramText, RequiredPath


class ConfigError(ValueError):
    """What is wrong with a configuration: one line a problem, each naming the key and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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


class ModelConfig(Section):
    """What every family has. A family subclasses it in `models/<family>/config.py`."""

    family: str = Field(description="a folder of models/")
    vocab_size: int = Field(ge=2, description="number of token ids; padded to a multiple of 128 inside")
    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    intermediate_size: int = Field(ge=1, description="width of the gated MLP")
    norm_eps: float = Field(1e-6, gt=0)
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    tie_embeddings: bool = Field(False, description="share the embedding with the output layer")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: a multiple of 128 whatever tp is; a padding that depended on tp would not reshard."""
        return -(-self.vocab_size // 128) * 128

    def tp_limit(self) -> int:
        """Number of heads that tensor parallelism shards: tp must divide it."""
        raise NotImplementedError


class Data(Section):
    paths: FilePaths = Field(
        default_factory=list,
        description="text, jsonl, json or parquet files, or folders; empty: the sources of Python's standard library",
    )
    text_column: str = Field("text", description="column of tables")
    valid_paths: FilePaths = Field(
        default_factory=list, description="held-out files; empty: a fraction of the documents of `paths`"
    )
    valid_fraction: float = Field(0.05, gt=0, lt=1, description="of the documents, when valid_paths is empty")
    tokenizer: PathText = Field(
        "",
        description="a tokenizer.json, a sentencepiece tokenizer.model, or a folder with one; empty: a BPE of "
        "model.vocab_size is trained on the corpus",
    )
    cache_dir: RequiredPath = Field(".cache/data", description="tokenizer and packed .bin/.idx files")
    seq_length: int = Field(16384, ge=8, description="tokens a row, T")
    min_length: int = Field(
        0, ge=0, description="shorter documents are dropped; 0: seq_length. Shorter rows are padded and masked"
    )
    split_documents: bool = Field(
        False, description="cut a document into rows of seq_length; false: keep its first seq_length tokens"
    )
    add_bos: bool = Field(False, description="begin every row with the tokenizer's BOS token")


class Task(Section):
    """Prompts with answers, of post-training and test-time training."""

    paths: FilePaths = Field(default_factory=list, description="jsonl, json or parquet files, a row a prompt")
    valid_paths: FilePaths = Field(
        default_factory=list, description="files whose prompts are answered and scored in evaluations"
    )
    prompt_column: str = "prompt"
    answer_column: str = Field("", description="text, or a list of accepted texts; empty: answers, or else answer")
    max_new_tokens: int = Field(32, ge=1, description="of an answer, where a file has no column max_gen_tokens")
    add_eos: bool = Field(False, description="posttrain: end answers with EOS; the official code does not")
    skip_too_long: bool = Field(
        False, description="leave out, and count, rows that data.seq_length cannot hold; false: they are an error"
    )
    inner_step: bool = Field(
        True, description="posttrain: a step on the prompts before that on the answers; false: plain SFT"
    )


class TestTime(Section):
    """Test-time training."""

    reset: Literal["per_batch", "online"] = Field(
        "per_batch",
        description="per_batch: every batch starts from the same weights and a fresh optimizer; online: the batches "
        "before it remain, as in the official code",
    )


class Parallel(Section):
    tp: int = Field(1, ge=1, description="tensor parallel size")
    sp: bool = Field(False, description="sequence parallel (with tp > 1)")
    cp: int = Field(1, ge=1, description="context parallel size")
    pp: int = Field(1, ge=1, description="pipeline parallel size")

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.cp * self.pp


class Optimizer(Section):
    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0, description="floor of the cosine and linear schedules")
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="in training steps (batches)")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0, description="not applied to norms and other vectors")
    clip_grad: float = Field(1.0, gt=0, description="global gradient norm")


class Train(Section):
    phase: Literal["midtrain", "posttrain", "testtime"] = Field(
        "midtrain",
        description="midtrain: on documents; posttrain: on prompts, then on their answers; testtime: on the prompts of "
        "each test batch, which is then answered",
    )
    match: Literal["data", "optimizer_steps", "compute"] = Field(
        "data",
        description="what a baseline (refine.enabled=false) shares with the REFINE run of the same configuration: its "
        "batches; these and the optimizer steps of each; or the optimizer steps of each batch and the FLOPs in all",
    )
    steps: int = Field(
        100, ge=1, description="batches in all, NTP-only ones included; testtime: one pass over task.paths instead"
    )
    global_batch_size: int = Field(128, ge=1, description="sequences a batch, over all ranks")
    micro_batch_size: int = Field(1, ge=1, description="sequences a forward pass, per rank")
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="recompute activations in the backward pass: of some modules of each layer, or whole layers"
    )
    recompute_modules: list[Literal["mixer", "mlp"]] = Field(
        ["mixer"], description="what recompute=selective recomputes"
    )
    backend: Literal["auto", "te", "local"] = Field(
        "local", description="linear layers of the MLP: Megatron's; Transformer Engine's; auto: these where installed"
    )
    max_skipped_steps: int = Field(3, ge=0, description="non-finite steps skipped in a row before the run stops")


class Refine(Section):
    enabled: bool = Field(True, description="false: next-token prediction only")
    start_step: int = Field(0, ge=0, description="batches of NTP-only warm-up before the first REFINE step")
    num_chunks: int = Field(8, ge=1, description="c: selected positions a sequence")
    rollout_len: int = Field(5, ge=1, description="k: tokens a rollout")
    num_rollouts: int = Field(1, ge=1, description="n: rollouts a position")
    selection: str = Field("entropy", description="entropy, uniform, argmax, argmin or an import path module:function")
    temperature: float = Field(1.0, gt=0, description="of the selection's softmax")
    margin: int = Field(20, ge=1, description="tokens at either end where no rollout starts")
    reward: str = Field("cosine", description="cosine, binary, hybrid or an import path module:function")
    rollout_temperature: float = Field(1.0, ge=0, description="of the rollouts and of their probabilities; 0: greedy")
    advantage_eps: float = Field(1e-6, gt=0, description="added to the group's standard deviation")
    ntp_coef: float = Field(1.0, ge=0)
    nsp_coef: float = Field(0.2, ge=0)
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float = Field(3.0, gt=1, description="bound of the loss for negative advantages")


class Update(Section):
    mode: Literal["auto", "fused", "two_pass"] = Field(
        "auto", description="auto: fused where it is the same algorithm (one optimizer step a batch, pp=1)"
    )
    mini_batch_size: int = Field(0, ge=0, description="sequences an optimizer step; 0: the whole batch")


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
    tasks: list[str] = Field(default_factory=list, description="tasks or groups, as of `megatron-refine evaluate`")
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


class Config(Section):
    model: ModelConfig
    run: Run = Run()
    data: Data = Data()
    task: Task = Task()
    ttt: TestTime = TestTime()
    parallel: Parallel = Parallel()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    refine: Refine = Refine()
    update: Update = Update()
    engine: Engine = Engine()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def mini_batch_size(self) -> int:
        return self.update.mini_batch_size or self.train.global_batch_size

    @property
    def fused(self) -> bool:
        """Whether the update keeps the graphs of scoring and rescoring."""
        exact = self.mini_batch_size == self.train.global_batch_size and self.parallel.pp == 1
        return self.update.mode == "fused" or (self.update.mode == "auto" and exact)

    def mini_batch_at(self, step: int, refine: bool) -> int:
        """Sequences an optimizer step of the batch `step`: all of an NTP-only one, but for a matched baseline."""
        matched = not self.refine.enabled and self.train.match != "data" and step >= self.refine.start_step
        return self.mini_batch_size if refine or matched else self.train.global_batch_size

    @property
    def resets(self) -> bool:
        """Whether each batch starts from the same weights, so that there are none to save."""
        return self.train.phase == "testtime" and self.ttt.reset == "per_batch"

    @property
    def branch_rows(self) -> int:
        """Rollout tokens a sequence, c * n * k."""
        return self.refine.num_chunks * self.refine.num_rollouts * self.refine.rollout_len

    @property
    def shortest_refine_row(self) -> int:
        """Fewest real tokens of a row on which rollouts start."""
        return max(self.refine.num_chunks, self.refine.margin + max(self.refine.margin, self.refine.rollout_len))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self.model), self.model_dump(serialize_as_any=True))  # its class is made by `load`

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(serialize_as_any=True), sort_keys=False)


@functools.cache
def with_model(schema: type[ModelConfig]) -> type[Config]:
    """Config with the family's own model section."""
    return create_model("Config", __base__=Config, model=(schema, ...))


def _restore(schema: type[ModelConfig], tree: dict[str, Any]) -> Config:
    return with_model(schema).model_validate(tree)
