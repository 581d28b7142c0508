"""The model as Megatron-Core's GPTModel: our mixers through its layer specs, our output through its one hook."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from megatron_refine.config import Config, Parallel
from megatron_refine.models import family
from megatron_refine.models.layer import alike
from megatron_refine.platform import hardware
from megatron_refine.trainer.gathering import Gathering
from megatron_refine.trainer.gradients import finalize_gradients
from megatron_refine.trainer.layers import block_spec, recompute_layers
from megatron_refine.trainer.parallel import Ranks
from megatron_refine.trainer.shards import full_shape, shard


class RefineModel(GPTModel):
    """GPTModel that returns its final-norm rows; trainer/head.py turns rows into log-probabilities."""

    gathering: Gathering | None = None  # where weights are gathered in the forward pass

    def __init__(self, *args: Any, real_vocab: int, stacked: bool, **kwargs: Any):
        """real_vocab: ids at or above it only pad the vocabulary. stacked: whether all layers have the same tensors."""
        super().__init__(*args, **kwargs)
        self.real_vocab, self.stacked = real_vocab, stacked

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """On the last stage rows [S, B, hidden], all in order on every tp rank; before it, hidden states to send on.

        Gradients into the rows must be partial over tp, as those of the vocabulary-parallel head are: the backward pass
        sums them here, once for all uses of the rows.
        """
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        return copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)

    def complete(self) -> None:
        """Have the weights of the last optimizer step. A forward pass does so by itself; other readers call this."""
        if self.gathering:
            self.gathering.finish()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's, complete; a layer's tensors have its number in their names where layers differ."""
        self.complete()
        own = (metadata or {}) | ({} if self.stacked else {"non_homogeneous_layers": True})
        found: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, own)
        return found

    def units(self) -> list[tuple[nn.Module, list[nn.Parameter]]]:
        """In the order of their calls, (module, parameters that nothing reads before it is called)."""
        first = [self.embedding] if self.pre_process else []
        found = [(module, list(module.parameters())) for module in (*first, *self.decoder.layers)]
        given = {parameter for _, parameters in found for parameter in parameters}
        last = [parameter for parameter in self.parameters() if parameter not in given]  # final norm, output layer
        return [*found, *([(self.decoder.final_layernorm, last)] if last else [])]

    def output_weight(self) -> Tensor:
        """Of the output layer, on the last stage: [V/tp, hidden]."""
        shared = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if shared else self.output_layer.weight

    def logits(self, rows: Tensor) -> Tensor:
        """Complete rows [R, hidden] -> this rank's logits [R, V/tp], at least fp32; padding ids at a very low value."""
        logits = rows @ self.output_weight().mT
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        real = self.real_vocab - self.pg_collection.tp.rank() * logits.shape[-1]
        if real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= real
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min / 2)
        return logits


def transformer_config(config: Config, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of our model."""
    model, parallel = config.model, config.parallel
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.tp_limit(),
        kv_channels=model.hidden_size // model.tp_limit() or 1,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=hardware.has_gpu(),  # one compiled kernel, which keeps its input alone
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,  # drops gradients of a weight that is used twice in a step
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        pipeline_model_parallel_layout=_stages(parallel),
        sequence_parallel=parallel.sp,
        perform_initialization=True,  # overwritten by `initialize`; without it tensors lack the marks of their sharding
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )


def _stages(parallel: Parallel) -> list[list[str]] | None:
    """The parts of the model by pipeline stage, in Megatron's words; None: as many layers in each."""
    if not parallel.stages:
        return None
    found = [["decoder"] * count for count in parallel.stages]
    return [["embedding", *found[0]], *found[1:-1], [*found[-1], "loss"]] if parallel.pp > 1 else None


def build_module(config: Config, ranks: Ranks, dtype: torch.dtype | None = None) -> RefineModel:
    """This rank's part of the model, initialised from config.run.seed: the same weights at any layout.

    `dtype` overrides train.precision.
    """
    dtype = dtype or getattr(torch, config.train.dtype)
    megatron = transformer_config(config, dtype)
    module = RefineModel(
        megatron,
        block_spec(config, megatron),
        vocab_size=config.model.padded_vocab,
        max_sequence_length=config.data.seq_length,
        pre_process=ranks.pp_rank == 0,
        post_process=ranks.is_last_stage,
        position_embedding_type="none",
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        real_vocab=config.model.vocab_size,
        stacked=alike(family.layers(config.model)),
    )
    for layer in module.decoder.layers:  # gate above up, whoever built it
        layer.mlp.linear_fc1.weight.partition_stride = 2
    initialize(module, config, ranks)
    recompute_layers(module.decoder.layers, config)
    return module.to(hardware.device())


def build_model(config: Config, ranks: Ranks, dtype: torch.dtype | None = None) -> DistributedDataParallel:
    """`build_module`, wrapped for data parallelism. `dtype` overrides train.precision (tests in fp64)."""
    module = build_module(config, ranks, dtype)
    megatron = module.config
    whole: nn.Module = Float16Module(megatron, module) if megatron.bf16 else module
    wanted = config.train.overlap == "true" or (config.train.overlap == "auto" and hardware.has_gpu())
    overlaps = wanted and ranks.replica_group.size() > 1
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=config.optimizer.distributed, grad_reduce_in_fp32=megatron.bf16,
        overlap_grad_reduce=overlaps, overlap_param_gather=overlaps and config.optimizer.distributed,
        bucket_size=max(1, int(config.train.bucket_millions * 1e6)),
    )  # fmt: skip
    model = DistributedDataParallel(megatron, ddp, whole)
    model.broadcast_params()
    if overlaps:
        megatron.no_sync_func = model.no_sync  # of several micro-batches the last one reduces
        if config.optimizer.distributed:
            module.gathering = Gathering(model, module.units())
    megatron.finalize_model_grads_func = finalize_gradients
    return model


def unwrap(model: nn.Module) -> RefineModel:
    """The RefineModel inside Megatron's wrappers."""
    while not isinstance(model, RefineModel):
        model = model.module  # type: ignore[assignment]
    return model


def global_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter), layers counted over the whole pipeline, a tied output layer under the embedding's name."""
    model = unwrap(module)
    model.complete()
    layers = {
        f"decoder.layers.{i}.": f"decoder.layers.{x.layer_number - 1}." for i, x in enumerate(model.decoder.layers)
    }
    for name, parameter in model.named_parameters():
        prefix = next((local for local in layers if name.startswith(local)), "")
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield layers.get(prefix, "") + name[len(prefix) :], parameter


@torch.no_grad()
def initialize(module: nn.Module, config: Config, ranks: Ranks) -> None:
    """Draw every full weight from a generator of (seed, name), and keep this rank's part of it.

    Vectors are ones, matrices normal(0, init_std); a parameter with an `initialize(full, generator)` attribute fills
    itself.
    """
    for name, parameter in global_parameters(module):
        digest = hashlib.sha256(f"{config.run.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.ones(full_shape(parameter, ranks.tp))
        if hasattr(parameter, "initialize"):
            parameter.initialize(full, generator)
        elif full.dim() > 1:
            full.normal_(0.0, config.model.init_std, generator=generator)
        parameter.copy_(shard(full, parameter, ranks.tp_rank, ranks.tp))
