"""The typed configuration: one YAML file plus `key.sub=value` overrides.

Nothing here imports torch, so `--help`, `--dry-run` and every configuration error are instant.
"""

import difflib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model


class ConfigError(ValueError):
    """What is wrong with a configuration: one line a problem, each naming the key and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Run(Section):
    dir: str = Field("runs/default", description="the run folder: config, metrics, checkpoints, logs, report")
    seed: int = Field(1, ge=0, description="seed of the weights, the data order, the selection and the rollouts")
    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases logging")
    timeout_minutes: float = Field(10.0, gt=0, description="deadline of every collective")


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
    paths: list[str] = Field(
        default_factory=list,
        description="text, jsonl or parquet files or folders; empty: the sources of Python's standard library",
    )
    text_column: str = Field("text", description="column of jsonl and parquet files")
    valid_paths: list[str] = Field(
        default_factory=list, description="held-out files; empty: a fraction of the documents of `paths`"
    )
    valid_fraction: float = Field(0.05, gt=0, lt=1, description="of the documents, when valid_paths is empty")
    tokenizer: str = Field(
        "",
        description="a tokenizer.json, a sentencepiece tokenizer.model, or a folder with one; empty: a BPE of "
        "model.vocab_size is trained on the corpus",
    )
    cache_dir: str = Field(".cache/data", description="tokenizer and packed .bin/.idx files")
    seq_length: int = Field(16384, ge=8, description="tokens a row, T")
    min_length: int = Field(
        0, ge=0, description="shorter documents are dropped; 0: seq_length. Shorter rows are padded and masked"
    )
    split_documents: bool = Field(
        False, description="cut a document into rows of seq_length; false: keep its first seq_length tokens"
    )
    add_bos: bool = Field(False, description="begin every row with the tokenizer's BOS token")


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
    steps: int = Field(100, ge=1, description="batches in all, NTP-only ones included")
    global_batch_size: int = Field(128, ge=1, description="sequences a batch, over all ranks")
    micro_batch_size: int = Field(1, ge=1, description="sequences a forward pass, per rank")
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "full"] = Field("none", description="recompute activations in the backward pass")
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
    rollout_temperature: float = Field(1.0, ge=0, description="of the rollouts; 0: greedy")
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
    kind: Literal["native"] = Field("native", description="native: forks the trainer's own model")


class Eval(Section):
    every: int = Field(0, ge=0, description="steps between evaluations; 0: before and after each part only")
    sequences: int = Field(16, ge=0, description="held-out sequences; 0: no evaluation")


class Checkpoint(Section):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: at the end only")
    keep: int = Field(2, ge=1, description="complete checkpoints kept")
    load: str = Field("", description="a checkpoint folder to start from when the run has none of its own")


class Config(Section):
    model: ModelConfig
    run: Run = Run()
    data: Data = Data()
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


def load(paths: str | Path | list[str], overrides: list[str], families: dict[str, type[ModelConfig]]) -> Config:
    """Read a file, or several of which later ones win, apply `key.sub=value` overrides, validate.

    `families` maps model.family to its schema. Raises ConfigError with one line a problem.
    """
    files = paths if isinstance(paths, list) else [str(paths)]
    path, tree = " + ".join(files), _overlay([_read(Path(file)) for file in files])
    for override in overrides:
        _override(tree, override)
    model = tree.get("model")
    if not isinstance(model, dict) or "family" not in model:
        raise ConfigError(f"{path}: model.family: missing; choose one of {', '.join(sorted(families))}")
    schema = families.get(str(model["family"]))
    if schema is None:
        raise ConfigError(
            f"{path}: model.family={model['family']}: unknown; choose one of {', '.join(sorted(families))}"
        )
    full = _with_model(schema)
    try:
        config = full.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, path, full) for e in error.errors())) from None
    return cross_check(config)


def _overlay(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Sections merged key by key; a model section that names its family is a whole model and replaces the other."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for name, section in tree.items():
            old = merged.get(name)
            partial = isinstance(section, dict) and isinstance(old, dict) and "family" not in section
            merged[name] = old | section if partial and old else section
    return merged


@functools.cache
def _with_model(schema: type[ModelConfig]) -> type[Config]:
    """Config with the family's own model section."""
    return create_model("Config", __base__=Config, model=(schema, ...))


def _restore(schema: type[ModelConfig], tree: dict[str, Any]) -> Config:
    return _with_model(schema).model_validate(tree)


def check_world_size(config: Config, world_size: int) -> int:
    """The data parallel size of `world_size` ranks. Raises ConfigError where they do not fit the layout."""
    p = config.parallel
    if world_size < 1 or world_size % p.model_size:
        raise ConfigError(
            f"world size {world_size} is no multiple of tp*cp*pp = {p.tp}*{p.cp}*{p.pp} = {p.model_size}: "
            f"start a multiple of {p.model_size} processes or change parallel.*"
        )
    dp = world_size // p.model_size
    sequences = config.mini_batch_size
    if sequences % (dp * config.train.micro_batch_size):
        key = "update.mini_batch_size" if config.update.mini_batch_size else "train.global_batch_size"
        raise ConfigError(
            f"{key}={sequences} is no multiple of dp*train.micro_batch_size = {dp}*{config.train.micro_batch_size}"
        )
    return dp


class _Loader(yaml.SafeLoader):
    """YAML with floats as in YAML 1.2 (`1e-3` is a number), where a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections (model:, data:, ...)" + (", is empty" if tree is None else ""))
    return {key: value for key, value in tree.items() if value is not None}  # `train:` alone means the defaults


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)+", key):
        raise ConfigError(f"{text}: an override reads section.key=value")
    *path, last = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {name} is a value, not a section")
    try:
        tree[last] = yaml.load(value, _Loader)
    except yaml.YAMLError:
        tree[last] = value


def _explain(error: Any, path: str, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        names = [*schema.model_fields, *_keys(schema)]
        same = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
        close = same or difflib.get_close_matches(key, names, 1)
        return f"{path}: {key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if error["type"] == "missing":
        return f"{path}: {key}: missing; set it in the file or with {key}=..."
    message = error["msg"].removeprefix("Value error, ")
    hint = f"; write {key}=[{error['input']}]" if error["type"] == "list_type" else ""
    return f"{path}: {key}={error['input']!r}: {message[0].lower()}{message[1:]}{hint}"


def _keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in schema.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += _keys(inner, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def cross_check(c: Config) -> Config:
    """The configuration itself. Raises ConfigError for contradictions between its keys."""
    found = [message for wrong, message in (*_layout_problems(c), *_training_problems(c)) if wrong]
    if found:
        raise ConfigError("\n".join(found))
    return c


def _layout_problems(c: Config) -> Iterator[tuple[bool, str]]:
    p, heads = c.parallel, c.model.tp_limit()
    allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    yield heads % p.tp != 0, f"parallel.tp={p.tp}: must divide the {heads} heads of the model; choose one of {allowed}"
    width = c.model.intermediate_size
    yield width % p.tp != 0, f"parallel.tp={p.tp}: must divide model.intermediate_size={width}; change either"
    vocab = c.model.padded_vocab
    yield vocab % p.tp != 0, f"parallel.tp={p.tp}: must divide the vocabulary, padded to {vocab}; change either"
    layers = c.model.num_layers
    yield layers % p.pp != 0, f"parallel.pp={p.pp}: must divide model.num_layers={layers}; change either"
    yield p.sp and p.tp == 1, "parallel.sp=true: sequence parallelism needs parallel.tp > 1; set parallel.sp=false"
    yield p.cp > 1, f"parallel.cp={p.cp}: context parallelism is not available in this version; set parallel.cp=1"
    rollouts = c.refine.enabled or c.eval.sequences > 0
    yield (
        p.pp > 1 and rollouts,
        (
            f"parallel.pp={p.pp}: rollouts and evaluations do not cross pipeline stages in this version; "
            "set parallel.pp=1, or refine.enabled=false and eval.sequences=0"
        ),
    )
    yield (
        p.pp > 1 and c.update.mode == "fused",
        (
            f"update.mode=fused: parallel.pp={p.pp} interleaves the passes of micro-batches, kept graphs need them in "
            "turn; set update.mode=two_pass"
        ),
    )


def _training_problems(c: Config) -> Iterator[tuple[bool, str]]:
    batch, mini = c.train.global_batch_size, c.mini_batch_size
    yield (
        batch % mini != 0,
        f"update.mini_batch_size={mini}: must divide train.global_batch_size={batch}; change either",
    )
    yield (
        c.update.mode == "fused" and mini != batch,
        (
            "update.mode=fused: the kept graphs serve one optimizer step a batch; set update.mini_batch_size=0 or "
            "update.mode=two_pass"
        ),
    )
    length, needed = c.data.seq_length, c.shortest_refine_row
    yield (
        c.refine.enabled and length < needed,
        (
            f"data.seq_length={length}: too short for refine.num_chunks={c.refine.num_chunks} positions with "
            f"refine.margin={c.refine.margin}; set at least {needed}"
        ),
    )
    yield (
        c.data.min_length > length,
        (f"data.min_length={c.data.min_length}: exceeds data.seq_length={length}; 0 means data.seq_length"),
    )
    start, steps = c.refine.start_step, c.train.steps
    yield (
        c.refine.enabled and start > steps,
        (f"refine.start_step={start}: exceeds train.steps={steps}; set refine.enabled=false for NTP only"),
    )
    low, high = c.optimizer.min_lr, c.optimizer.lr
    yield low > high, f"optimizer.min_lr={low}: exceeds optimizer.lr={high}; lower it"
