"""SGLang's plug-in: it teaches a server our families. Loaded by SGLang through the entry point `sglang.srt.plugins`, in
each of its processes; needs no Megatron.

SGLang logs what a plug-in raises and goes on: without the registrations a server then refuses the model by its name.
"""

from typing import Any

import torch
from sglang.srt.configs.linear_attn_model_registry import LinearAttnModelSpec, register_linear_attn_model
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType, Mamba2StateShape
from sglang.srt.distributed import divide
from sglang.srt.layers.attention.linear.short_conv_backend import ShortConvAttnBackend
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import get_parallel
from transformers import AutoConfig, PretrainedConfig

from megatron_refine.config import ModelConfig
from megatron_refine.convert import inventory
from megatron_refine.convert.fields import model_of
from megatron_refine.convert.mapping import Converter
from megatron_refine.models import family
from megatron_refine.models.family import Family

BACKENDS = "sglang.srt.layers.attention.hybrid_linear_attn_backend"


class StateBackend(ShortConvAttnBackend):
    """SGLang's handle on a request's state, without copies of it to the host: the kernels here index by slot."""

    needs_extend_host_mirrors = False


class ServedConfig(PretrainedConfig):
    """A family's config.json, every field honoured or refused by name, with what SGLang asks of a linear model."""

    family = ""  # a folder of models/

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        self.fields = {name: value for name, value in fields.items() if not name.startswith("_")}
        if fields:  # transformers also makes an empty one, to see the defaults
            model = self.typed_model
            self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size
            self.num_hidden_layers = model.num_layers
            self.num_attention_heads = self.num_key_value_heads = model.tp_limit()
            self.head_dim = 128  # of no layer; SGLang's attention backends take powers of two alone
            self.mamba_chunk_size = 64

    @property
    def typed_model(self) -> ModelConfig:
        """Raises ConfigError, one line a problem."""
        return model_of(self.fields | {"model_type": self.model_type}, "config.json")

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by today's name."""
        return Converter(self.typed_model).hf_shapes

    def todays_name(self, stored: str) -> str | None:
        """Return the model's name of a folder's tensor; None where no computation reads it."""
        return inventory.todays_name(family.of(self.family).format, stored)

    @property
    def full_attention_layer_ids(self) -> list[int]:
        return []

    @property
    def linear_layer_ids(self) -> list[int]:
        return list(range(self.num_hidden_layers))

    @property
    def mamba2_cache_params(self) -> Mamba2CacheParams:
        """Shapes and dtypes of a slot: fp32, which holds rows of any dtype."""
        state, tp = family.serve(self.family).state_shape(self.typed_model), get_parallel().attn_tp_size
        heads, key_heads = divide(state.heads, tp), divide(state.key_heads, tp)
        keys = state.key_heads * state.key_dim
        shape = Mamba2StateShape(
            conv=[(divide(state.channels, tp), state.conv_size - 1)],
            temporal=(heads, state.key_dim, state.value_dim),
            intermediate_size=state.heads * state.value_dim,
            conv_dim=state.channels,
            ssm_state_size=state.key_dim,
            num_heads=state.heads,
            head_dim=state.value_dim,
            state_size=state.key_dim,
            conv_kernel=state.conv_size,
            num_k_heads_per_tp=key_heads,
            conv_shard_groups=[keys, keys, state.heads * state.value_dim],
        )
        dtype = Mamba2StateDType(conv=torch.float32, temporal=torch.float32)
        return Mamba2CacheParams(shape=shape, layers=self.linear_layer_ids, dtype=dtype)


def _config_of(each: Family) -> type[ServedConfig]:
    """Make the class of a family's config.json, under a name of this module: SGLang sends its objects to processes."""

    def __init__(self: Any, **fields: Any) -> None:  # transformers replaces that of a subclass without one
        ServedConfig.__init__(self, **fields)

    own = {"family": each.name, "model_type": each.format.model_type, "__init__": __init__, "__module__": __name__}
    return type(f"{each.format.architecture}Config", (ServedConfig,), own)


CONFIGS = {each.name: _config_of(each) for each in family.every() if each.serving}
globals().update({config.__name__: config for config in CONFIGS.values()})


def register() -> None:
    """Teach SGLang the config, state and model of every family that is served."""
    for name, config in CONFIGS.items():
        described = family.of(name).format
        AutoConfig.register(described.model_type, config, exist_ok=True)
        register_linear_attn_model(
            LinearAttnModelSpec(
                config_class=config,
                backend_class_name=f"{StateBackend.__module__}.{StateBackend.__name__}",
                hybrid_backend_class_name=f"{BACKENDS}.ShortConvHybridAttnBackend",
                arch_names=[described.architecture],
                uses_mamba_radix_cache=True,
                support_mamba_cache=True,
            )
        )
        ModelRegistry.models[described.architecture] = family.serve(name).MODEL
