"""SGLang's plug-in: it teaches a server our families. Loaded by SGLang through the entry point `sglang.srt.plugins`, in
each of its processes; needs no Megatron.

SGLang logs what a plug-in raises and goes on: without the registrations a server then refuses the model by its name.
"""

import copy
from typing import Any

import torch
from sglang.srt.configs.linear_attn_model_registry import LinearAttnModelSpec, register_linear_attn_model
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType, Mamba2StateShape
from sglang.srt.layers.attention.linear.short_conv_backend import ShortConvAttnBackend
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import get_parallel
from transformers import AutoConfig, PretrainedConfig

from megatron_refine.config import ModelConfig
from megatron_refine.convert import inventory
from megatron_refine.convert.fields import model_of
from megatron_refine.convert.mapping import Converter
from megatron_refine.models import family
from megatron_refine.models.cost import attending
from megatron_refine.models.family import Family

OTHERS = ("window_size", "text_config", "vision_config")  # from which SGLang would make something of its own
BACKENDS = "sglang.srt.layers.attention.hybrid_linear_attn_backend"


class StateBackend(ShortConvAttnBackend):
    """SGLang's handle on a request's state, without copies of it to the host: the kernels here index by slot."""

    needs_extend_host_mirrors = False


class ServedConfig(PretrainedConfig):
    """A family's config.json, every field honoured or refused by name, with what SGLang asks of a linear model."""

    family = ""  # a folder of models/

    def __init__(self, **fields: Any):
        own = copy.deepcopy(fields)  # transformers writes into what it is given
        super().__init__(**{name: value for name, value in fields.items() if name not in OTHERS})
        self.fields = {name: value for name, value in own.items() if not name.startswith("_")}
        if fields:  # transformers also makes an empty one, to see the defaults
            model = self.typed_model
            self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size
            self.num_hidden_layers = model.num_layers
            self.num_attention_heads = self.num_key_value_heads = model.tp_limit()
            self.head_dim = 128  # of no layer; SGLang's attention backends take powers of two alone
            for i in self.full_attention_layer_ids[:1]:
                full = family.layers(model)[i].settings
                self.num_attention_heads, self.num_key_value_heads = full.heads, full.kv_heads
                self.head_dim = full.head_dim
            self.mamba_chunk_size = 64

    @property
    def typed_model(self) -> ModelConfig:
        """Raises ConfigError, one line a problem."""
        return model_of(self.fields | {"model_type": family.of(self.family).format.model_type}, "config.json")

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by today's name."""
        return Converter(self.typed_model).hf_shapes

    def todays_name(self, stored: str) -> str | None:
        """Return the model's name of a folder's tensor; None where no computation reads it."""
        return inventory.todays_name(family.of(self.family).format, stored)

    @property
    def full_attention_layer_ids(self) -> list[int]:
        """Layers that keep keys and values, in SGLang's pages; the others have slots of states."""
        return attending(self.typed_model)

    @property
    def linear_layer_ids(self) -> list[int]:
        return sorted(set(range(self.num_hidden_layers)) - set(self.full_attention_layer_ids))

    @property
    def mamba2_cache_params(self) -> Mamba2CacheParams:
        """Shapes and dtypes of a slot: fp32, which holds rows of any dtype."""
        tp = get_parallel().attn_tp_size
        serving = family.of(self.family).serving
        assert serving
        slot = serving.slot(self.typed_model, tp)
        conv, temporal = slot.conv[0], slot.temporal
        shape = Mamba2StateShape(
            conv=slot.conv, temporal=temporal,
            # of no use but to SGLang's own models
            intermediate_size=conv[0] * tp, conv_dim=conv[0] * tp, ssm_state_size=temporal[-1],
            num_heads=temporal[0] * tp, head_dim=temporal[-1], state_size=temporal[-1], conv_kernel=conv[-1] + 1,
        )  # fmt: skip
        dtype = Mamba2StateDType(conv=torch.float32, temporal=torch.float32)
        return Mamba2CacheParams(shape=shape, layers=self.linear_layer_ids, dtype=dtype)


def _config_of(each: Family) -> type[ServedConfig]:
    """Make the class of a family's config.json, under a name of this module: SGLang sends its objects to processes."""

    def __init__(self: Any, **fields: Any) -> None:  # transformers replaces that of a subclass without one
        ServedConfig.__init__(self, **fields)

    told = family.served_as(each)
    own = {"family": each.name, "model_type": told["model_type"], "__init__": __init__, "__module__": __name__}
    return type(f"{told['architectures'][0]}Config", (ServedConfig,), own)


CONFIGS = {each.name: _config_of(each) for each in family.every() if each.serving}
globals().update({config.__name__: config for config in CONFIGS.values()})


def register() -> None:
    """Teach SGLang the config, state and model of every family that is served."""
    for name, config in CONFIGS.items():
        told = family.served_as(family.of(name))
        (architecture,) = told["architectures"]
        AutoConfig.register(told["model_type"], config, exist_ok=True)
        register_linear_attn_model(
            LinearAttnModelSpec(
                config_class=config,
                backend_class_name=f"{StateBackend.__module__}.{StateBackend.__name__}",
                hybrid_backend_class_name=f"{BACKENDS}.ShortConvHybridAttnBackend",
                arch_names=[architecture],
                uses_mamba_radix_cache=True,
                support_mamba_cache=True,
            )
        )
        ModelRegistry.models[architecture] = family.serve(name).MODEL
