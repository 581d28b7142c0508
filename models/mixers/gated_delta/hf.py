"""A Gated DeltaNet mixer in Hugging Face's format: a part of a family's."""

from collections.abc import Mapping as Names
from collections.abc import Sequence

from megatron_refine.models.hf import Heads, Mapping, Same
from megatron_refine.models.mixers.gated_delta import GatedDelta

PROJECTIONS = {part: f"{part}_proj" for part in "qkvgab"}  # g: the gate
CONVOLUTIONS = {part: f"{part}_conv1d" for part in "qkv"}


def tensors(
    shape: GatedDelta, ours: str, theirs: str, projections: Names[str, str] = PROJECTIONS,
    convolutions: Names[str, str] = CONVOLUTIONS, norm: str = "o_norm", out: str = "o_proj",
    together: Sequence[str] = (),
) -> list[Mapping]:  # fmt: skip
    """List those of a mixer. Ours are head-major by key head, with the rows of the value heads that share it.

    ours, theirs: what stands before the names, with {} for the number of the layer; the rest: their names, where parts
    of one name lie one below the other. together: letters of parts of one name that lie key head by key head instead,
    in that order. The defaults are flash-linear-attention's.
    """
    group = shape.value_heads // shape.num_heads
    value = group * shape.head_dim_v
    widths = {"q": shape.head_dim, "k": shape.head_dim, "v": value}
    rows = widths | ({"g": value} if shape.use_gate else {}) | {"a": group, "b": group}
    projected = tuple((f"{theirs}{projections[part]}.weight", count) for part, count in rows.items())
    interleaved = tuple(tuple(list(rows).index(part) for part in parts) for parts in together)
    convolved = tuple((f"{theirs}{convolutions[part]}.weight", count) for part, count in widths.items())
    return [
        Heads(ours + "in_proj.weight", projected, shape.num_heads, (shape.hidden_size,), interleaved),
        Heads(ours + "conv", convolved, shape.num_heads, (1, shape.conv_size)),
        Same(ours + "A_log", theirs + "A_log", (shape.value_heads,)),
        Same(ours + "dt_bias", theirs + "dt_bias", (shape.value_heads,)),
        Same(ours + "o_norm.weight", f"{theirs}{norm}.weight", (shape.head_dim_v,)),
        Same(ours + "out_proj.weight", f"{theirs}{out}.weight", (shape.hidden_size, shape.num_heads * value)),
    ]
