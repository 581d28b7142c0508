"""What a layer is made of, and what of it is computed again in the backward pass."""

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_refine.config import Config, ConfigError
from megatron_refine.models import family
from megatron_refine.models.layer import Layer

_SEQUENCE_FLAGS = ("sequence_parallel", "reduce_scatter_embeddings")  # where Megatron's modules keep the choice


def block_spec(config: Config, megatron: TransformerConfig) -> TransformerBlockSubmodules:
    """Describe this pipeline stage's layers to Megatron. Raises ConfigError."""
    mlp, first = get_mlp_module_spec_for_backend(provider(linears(config))), get_transformer_layer_offset(megatron)
    own = family.layers(config.model)[first : first + get_num_layers_to_build(megatron)]
    return TransformerBlockSubmodules([_layer_spec(layer, mlp) for layer in own], layer_norm=own[-1].norm_class())


def _layer_spec(layer: Layer, mlp: Any) -> ModuleSpec:
    mixer, norm, before = layer.mixer_class(), layer.norm_class(), layer.norm_class()
    if layer.behind:
        mixer, mlp, before = normed(mixer, norm), _normed_mlp(mlp, norm), IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=ModuleSpec(module=mixer, params={"model": layer.settings}),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _normed_mlp(mlp: Any, norm: type[Any]) -> Any:
    """Megatron's description of an MLP, with a norm behind it. Up to 0.16 it is a ModuleSpec, since then a function."""
    if isinstance(mlp, ModuleSpec):
        return replace(mlp, module=normed(mlp.module, norm))
    return partial(normed(mlp.func.__self__, norm).as_mlp_submodule, **mlp.keywords)


def normed(module: Any, norm: type[Any]) -> type[Any]:
    """Return the class of modules like these whose output, of which there is a bias beside, is normed: `post_norm`."""

    class Norm(norm):
        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> dict[str, Any]:
            """Declare it replicated: Megatron's MLP asks each of its modules."""
            tp = parallel_state.get_tensor_model_parallel_group()
            groups = {"tp_group": tp, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
            own = self.state_dict(keep_vars=True)
            found: dict[str, Any] = make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets, **groups)
            return found

    class Normed(module):
        def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any):
            super().__init__(*args, config=config, **kwargs)
            self.post_norm = Norm(config, config.hidden_size, config.layernorm_epsilon)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, bias = super().forward(*args, **kwargs)
            return self.post_norm(out), bias

    return Normed


def linears(config: Config) -> str:
    """`te` or `local`: whose linear layers the MLP has; `auto` takes Transformer Engine where it is installed.

    Raises ConfigError where it is asked for in vain.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if config.train.backend == "te" and not installed:
        raise ConfigError("train.backend=te: Transformer Engine is not installed; install it, or choose auto or local")
    return "te" if installed and config.train.backend != "local" else "local"


def provider(kind: str) -> BackendSpecProvider:
    """Megatron's provider of the kind. Norms stay ours: one fused into its linear would hide the rows that `whole_rows`
    and the marks of sequence parallel gradients are about."""
    if kind == "local":
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class Separate(TESpecProvider):
        def fuse_layernorm_and_linear(self) -> bool:
            return False

    return Separate()


def recompute_layers(layers: nn.ModuleList, config: Config) -> None:
    """Recompute, by train.recompute, whole layers or the modules of train.recompute_modules."""
    train = config.train
    names = {"mixer": "self_attention", "mlp": "mlp"}  # in Megatron's layers
    for layer in layers:
        if train.recompute == "full":
            recompute(layer)
        elif train.recompute == "selective":
            for name in train.recompute_modules:
                recompute(layer.get_submodule(names[name]))


def recompute(module: nn.Module) -> None:
    """Have the module run again in the backward pass instead of keeping its activations.

    Megatron's own checkpoint is reentrant: it runs the module without grad first, so states taken from it would be
    silently detached. torch's non-reentrant one keeps the graph through the layout (states in, handles out).
    """
    first, config = module.forward, cast(Any, module.config)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return first(*args, **kwargs)
        # the backward pass runs it again when `whole_rows` has long been left: enter it as it is now
        again = contextlib.nullcontext if config.sequence_parallel else partial(whole_rows, module)
        return checkpoint(
            first, *args, use_reentrant=False, preserve_rng_state=False,  # no dropout
            context_fn=lambda: (contextlib.nullcontext(), again()), **kwargs,
        )  # fmt: skip

    module.forward = forward


@contextlib.contextmanager
def whole_rows(module: nn.Module) -> Iterator[None]:
    """No sequence parallelism inside: the few rows of branches cost less whole than their gathers and scatters would.

    Exact with gradients too: each rank then holds the whole gradient of a norm's weight, and RMSNorm takes its share.
    """
    owners = [module.config, *module.modules()]
    flags = [(o, name) for o in owners for name in _SEQUENCE_FLAGS if getattr(o, name, False)]
    for owner, name in flags:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in flags:
            setattr(owner, name, True)
