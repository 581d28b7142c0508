"""The configuration as a whole, and the model's section. Nothing here imports torch."""

import functools
from typing import Any, ClassVar

import yaml
from pydantic import Field, create_model

from megatron_refine.config.base import Section
from megatron_refine.config.inputs import Data, Task
from megatron_refine.config.running import Checkpoint, Engine, Eval, Run
from megatron_refine.config.training import Optimizer, Parallel, Refine, TestTime, Train, Update


class ModelConfig(Section):
    """Shape of the model. `configs/models/` holds presets.

    A family is a folder of `models/` and adds keys of its own (in its `config.py`).
    """

    served: ClassVar[bool] = False
    """Whether there is a model of the family for SGLang."""

    family: str = Field(description="Name of the family. Each has its keys in a table below.")
    vocab_size: int = Field(ge=2, description="Number of token ids. The embedding is padded to a multiple of 128 rows.")
    hidden_size: int = Field(ge=1, description="Width of the residual stream.")
    num_layers: int = Field(ge=1, description="Number of layers.")
    intermediate_size: int = Field(ge=1, description="Width of the gated MLP. `parallel.tp` must divide it.")
    norm_eps: float = Field(1e-6, gt=0, description="Epsilon of the RMS norms.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    tie_embeddings: bool = Field(False, description="Use the embedding as the output layer.")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: a multiple of 128 whatever tp is; a padding that depended on tp would not reshard."""
        return -(-self.vocab_size // 128) * 128

    def tp_limit(self) -> int:
        """Return the number of heads that tensor parallelism shards: tp must divide it."""
        raise NotImplementedError


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
        """Return the sequences of an optimizer step of a batch: all of an NTP-only one, but in a matched baseline."""
        matched = not self.refine.enabled and self.train.match != "data" and step >= self.refine.start_step
        return self.mini_batch_size if refine or matched else self.train.global_batch_size

    def ahead(self, step: int, total: int) -> bool:
        """Whether the rollouts of a step of `total` begin before the update of the step before it, a REFINE one too."""
        return self.engine.lag > 0 and self.refine.enabled and self.refine.start_step < step < total

    @property
    def resets(self) -> bool:
        """Whether each batch starts from the same weights, so that there are none to save."""
        return self.train.phase == "testtime" and self.ttt.reset == "per_batch"

    @property
    def cuda_graphs(self) -> bool:
        """Whether rollouts are decoded as CUDA graphs on a GPU."""
        return self.engine.cuda_graphs != "false" and self.engine.kind == "native" and self.parallel.pp == 1

    @property
    def branch_rows(self) -> int:
        """Rollout tokens of a sequence, c * n * k."""
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
    """Return Config with the family's own model section."""
    return create_model("Config", __base__=Config, model=(schema, ...))


def _restore(schema: type[ModelConfig], tree: dict[str, Any]) -> Config:
    return with_model(schema).model_validate(tree)
