"""The mappings between full tensors of both sides, kind by kind."""

import pytest
import torch

from megatron_refine.convert.mapping import Converter, _views, common_dtype
from megatron_refine.models.hf import Heads, Mapping, Same, Vocab, at_layer, stack
from tests.test_golden import FOLDERS, golden_model


def to_megatron(mapping: Mapping, *parts: torch.Tensor) -> torch.Tensor:
    full = torch.zeros(mapping.shape, dtype=parts[0].dtype)
    named = dict(zip(mapping.sources(), parts, strict=True))
    assert {n: tuple(t.shape) for n, t in named.items()} == mapping.sources()
    for ours, theirs in _views(mapping, full, named):
        ours.copy_(theirs)
    return full


def rows(*numbers: int) -> torch.Tensor:
    """Rows of a matrix of width 2 that hold their numbers."""
    return torch.tensor(numbers)[:, None].expand(-1, 2).contiguous()


def order(full: torch.Tensor) -> list[int]:
    return full[:, 0].tolist()


def test_one_tensor_under_two_names() -> None:
    assert order(to_megatron(Same("o", "t", (3, 2)), rows(1, 2, 3))) == [1, 2, 3]


def test_a_padded_vocabulary() -> None:
    assert order(to_megatron(Vocab("o", "t", 3, 5, 2), rows(1, 2, 3))) == [1, 2, 3, 0, 0]


def test_heads_of_several_tensors() -> None:
    mapping = Heads("o", (("q", 2), ("b", 1)), heads=2, rest=(2,))
    assert order(to_megatron(mapping, rows(1, 2, 3, 4), rows(8, 9))) == [1, 2, 8, 3, 4, 9]


def test_one_below_the_other() -> None:
    assert order(to_megatron(stack("o", ("gate", "up"), 2, 2), rows(1, 2), rows(3, 4))) == [1, 2, 3, 4]


def test_a_fused_tensor_is_split_third_by_third() -> None:
    mapping = Heads("o", (("qkv", 2), ("qkv", 2), ("qkv", 2), ("lr", 1)), heads=2, rest=(2,))
    assert mapping.sources() == {"qkv": (12, 2), "lr": (2, 2)} and mapping.shape == (14, 2)
    full = to_megatron(mapping, rows(*range(12)), rows(20, 21))
    assert order(full) == [0, 1, 4, 5, 8, 9, 20, 2, 3, 6, 7, 10, 11, 21]


def test_interleaved_parts_lie_head_by_head_in_an_order_of_their_own() -> None:
    mapping = Heads(
        "o", (("qk", 2), ("qk", 1), ("ba", 1), ("ba", 1), ("z", 1)), heads=2, rest=(2,), interleaved=((3, 2),)
    )
    assert mapping.sources() == {"qk": (6, 2), "ba": (4, 2), "z": (2, 2)}
    full = to_megatron(mapping, rows(1, 2, 3, 4, 5, 6), rows(20, 10, 21, 11), rows(30, 31))
    assert order(full) == [1, 2, 5, 10, 20, 30, 3, 4, 6, 11, 21, 31]


def test_layers() -> None:
    mapping = at_layer(Heads("a.{}", (("b.{}", 1), ("c.{}.d", 2)), 1, ()), 7)
    assert mapping == Heads("a.7", (("b.7", 1), ("c.7.d", 2)), 1, ())
    assert at_layer(Same("a.{}.b", "c.{}", (1,)), 3) == Same("a.3.b", "c.3", (1,))


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_direction_undoes_the_other(name: str, dtype: torch.dtype) -> None:
    converter = Converter(golden_model(name))
    hf = {n: torch.randn(shape).to(dtype) for n, shape in converter.hf_shapes.items()}
    back = {}
    for own in converter.megatron_shapes:
        full = converter.to_megatron(own, hf)
        assert full.dtype == dtype and tuple(full.shape) == converter.megatron_shapes[own]
        parts = dict(converter.to_hf(own, full))
        assert list(parts) == converter.sources(own) and not parts.keys() & back.keys()
        assert all(t.is_contiguous() for t in parts.values())
        back |= parts
    assert back.keys() == hf.keys() and all(back[n].equal(t) for n, t in hf.items())


def test_a_dtype_that_holds_both() -> None:
    assert common_dtype([torch.bfloat16, torch.float16]) == torch.float32
    assert common_dtype([torch.bfloat16, torch.bfloat16]) == torch.bfloat16
