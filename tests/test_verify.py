"""The comparison after a conversion sees what is wrong, and leaves nothing behind."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.models import family
from tests.conversions import convert, hf_folder, rewrite, to_hf, to_megatron
from tests.test_convert import done


def swap_parts() -> None:
    """On a rank: a mapping that takes q for k and k for q, in both directions."""
    original = family.layers

    def swapped(m: Any) -> Any:
        wrong = m.ours.endswith("in_proj.weight")
        return dataclasses.replace(m, parts=(m.parts[1], m.parts[0], *m.parts[2:])) if wrong else m

    def layers(model: Any) -> Any:
        return [dataclasses.replace(x, tensors=tuple(map(swapped, x.tensors))) for x in original(model)]

    family.layers = layers


def test_verify_sees_a_wrong_mapping(ranks: Any, tmp_path: Path) -> None:
    source, megatron = hf_folder(tmp_path / "source"), tmp_path / "megatron"
    end = ranks(1, convert, arguments=to_megatron(source, megatron, "--verify"), patch=swap_parts)[0]
    assert end.code == 4 and "logits differ by" in end.err and len(end.err.splitlines()) == 1


def verified(hf: Path, megatron: Path) -> str:
    """On a rank: the error of a comparison."""
    from megatron_refine.checkpoint.verify import verify
    from megatron_refine.convert.errors import ConversionError

    with pytest.raises(ConversionError) as error:
        verify(hf, megatron, to_hf=True)
    return str(error.value)


def test_verify_sees_a_wrong_tensor(ranks: Any, tmp_path: Path) -> None:
    source, megatron, back = hf_folder(tmp_path / "source"), tmp_path / "megatron", tmp_path / "back"
    done(ranks, to_megatron(source, megatron), to_hf(megatron, back))
    (back / "checksums.json").unlink()
    own = "model.layers.1.mlp.down_proj.weight"
    rewrite(back, lambda found: found[own][3, 4].mul_(1 + 1e-6))
    assert re.search(rf"{own}: differs from .*linear_fc2\.weight", ranks(1, verified, hf=back, megatron=megatron)[0])


def verified_alone(hf: Path, megatron: Path) -> Any:
    """On a rank without a group: whether one is left behind; then the error where a model's logits are not numbers."""
    import torch.distributed as dist

    from megatron_refine.checkpoint import verify
    from megatron_refine.convert.errors import ConversionError

    dist.destroy_process_group()
    assert verify.verify(hf, megatron, to_hf=True).tensors > 5
    left = dist.is_initialized()
    verify._megatron_logits = lambda *_: torch.full((1, 48, 97), float("nan"))  # type: ignore[assignment]
    with pytest.raises(ConversionError) as error:
        verify.verify(hf, megatron, to_hf=True)
    return left, str(error.value)


def test_verify_leaves_no_group_and_takes_nan_for_no_agreement(ranks: Any, tmp_path: Path) -> None:
    source, megatron = hf_folder(tmp_path / "source"), tmp_path / "megatron"
    done(ranks, to_megatron(source, megatron))
    left, error = ranks(1, verified_alone, hf=source, megatron=megatron)[0]
    assert not left and "logits differ by nan" in error
