"""A family outside of the project: DeltaNet layers, and every second one gated, with other heads."""

from typing import Literal

from megatron_refine.config import ModelConfig
from megatron_refine.models import delta_net, gated_delta_net
from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.family import Family
from megatron_refine.models.gated_delta_net.config import GatedDeltaNetConfig
from megatron_refine.models.hf import ABSENT, CONSTANTS, FIELDS, IGNORED, Format, Key, frame
from megatron_refine.models.layer import Layer


class ToyConfig(ModelConfig):
    """Two kinds of layers in turn."""

    family: Literal["tests.toy"]
    num_heads: int

    def tp_limit(self) -> int:
        return self.num_heads

    def kinds(self) -> tuple[DeltaNetConfig, GatedDeltaNetConfig]:
        """The two models that the layers are taken from."""
        own = self.model_dump()
        more = {"family": "gated_delta_net", "head_dim": 16, "num_v_heads": 2 * self.num_heads, "expand_v": 1.0}
        plain = DeltaNetConfig.model_validate(own | {"family": "delta_net"})
        return plain, GatedDeltaNetConfig.model_validate(own | more)


def layers(model: ToyConfig) -> list[Layer]:
    plain, gated = model.kinds()
    pair = delta_net.layers(plain)[0], gated_delta_net.layers(gated)[0]
    return [pair[i % 2] for i in range(model.num_layers)]


FAMILY = Family(
    "tests.toy", ToyConfig, layers, reference="tests.toy.reference:logits",
    format=Format(
        model_type="tests.toy", architecture="ToyForCausalLM", fields=FIELDS | {"num_heads": Key("num_heads")},
        constants=CONSTANTS, ignored=IGNORED | {"norm_first": ABSENT}, frame=frame,
    ),
)  # fmt: skip
