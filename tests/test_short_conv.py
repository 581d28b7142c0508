"""The short convolution before the delta rule as a GPU's kernel: what torch knows of it, and its values, interpreted.

The torch path is held to torch's own convolution in test_delta_rule.py.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_refine.kernels.short_conv import convolved, gpu

ROOT = Path(__file__).parents[1]
GROUPS, WIDTH = 2, 3
# queries and keys, values, other columns: of a DeltaNet, of a Gated DeltaNet, without its gate, values in three parts
SHAPES = {"plain": (8, 8, [1]), "gated": (4, 8, [8, 1, 1]), "no gate": (4, 6, [0, 2, 2]), "odd": (3, 10, [1])}


def inputs(shape: str, length: int, with_tail: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Of two sequences side by side, as a projection leaves them."""
    keys, values, others = SHAPES[shape]
    channels, generator = 2 * keys + values, torch.Generator().manual_seed(length)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    rows = normal(length, 2, GROUPS, channels + sum(others))
    tail = normal(2, WIDTH - 1, GROUPS, channels) if with_tail else None
    return {"rows": rows, "weight": normal(GROUPS, channels, WIDTH), "tail": tail, "keys": keys, "others": others}


def results(path: Any, x: dict[str, Any]) -> list[Tensor]:
    """Outputs, and the gradients of every tensor."""
    found = path(x["rows"].transpose(0, 1), x["weight"], x["tail"], x["keys"], x["others"])
    leaves = [value for value in x.values() if isinstance(value, Tensor)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in found]
    loss = sum((o * w).sum() for o, w in zip(found, weights, strict=True))
    return [*found, *torch.autograd.grad(loss, leaves)]  # type: ignore[arg-type]


@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_torch_knows_of_the_kernels(shape: str, with_tail: bool) -> None:
    """As a counter of launches sees them: operators on fake tensors of a GPU, whose results are shaped as on a CPU."""
    x = inputs(shape, 5, with_tail)
    expected = [r.shape for r in results(convolved, x)]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        rows, weight, tail = (
            None if v is None else torch.ops.aten.empty_like(v, device="cuda", dtype=torch.bfloat16)  # not platform's
            for v in (x["rows"], x["weight"], x["tail"])
        )
        rows = rows.transpose(0, 1)
        found = convolved(rows, weight, tail, x["keys"], x["others"])
        into_rows, into_weight, into_tail = gpu._backward(*found[:3], rows, weight, tail)
        into_weight = into_weight.sum(0).mT
    assert all(f.dtype == torch.bfloat16 and f.device.type == "cuda" for f in found)
    assert into_rows.stride() == rows.stride() and into_weight.dtype == torch.float32
    gradients = [into_rows.transpose(0, 1), into_weight, *([into_tail] if with_tail else [])]
    assert [f.shape for f in (*found, *gradients)] == expected


def interpreted() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter: make test-kernels")
    from tests import interpreter

    interpreter.prepare()


@pytest.mark.kernels
@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize(("shape", "length"), [("plain", 2), ("plain", 19), ("gated", 5), ("odd", 11)])
def test_kernels_equal_the_torch_path(shape: str, length: int, with_tail: bool, monkeypatch: Any) -> None:
    """In fp32, which rounds at 6e-8, against fp64; in tiles so small that a sequence has several to walk over."""
    interpreted()
    monkeypatch.setattr(gpu, "TILE", 64)
    monkeypatch.setattr(gpu, "TOKENS", 10)
    low = inputs(shape, length, with_tail, torch.float32)
    exact = {n: v.detach().double().requires_grad_() if isinstance(v, Tensor) else v for n, v in low.items()}
    for mine, truth in zip(results(gpu.gpu_convolved, low), results(convolved, exact), strict=True):
        assert mine.shape == truth.shape
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)


WHOLE = ("step", "stride", "into_step", "into_stride", "length", "groups", "blocks")  # arguments of 32 bits


def compile_for_an_h100(keys: int, channels: int, tail: bool) -> None:
    """Prints what each kernel takes of the card. No GPU is needed; the interpreter must be off."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_refine.kernels.short_conv import tiles

    constants = {"K": keys, "C": channels, "W": 4, "BT": gpu.TILE // keys, "BD": keys, "TAIL": tail}
    constants |= {} if tail else {"tail": None}
    for kernel in (tiles.forward_kernel, tiles.backward_kernel):
        own = constants | ({"BW": 4} if kernel is tiles.backward_kernel else {})
        strides = {"sequence": "i64", "into_sequence": "i64"}
        numbers = strides | dict.fromkeys(WHOLE, "i32")
        types = {name: numbers.get(name, "*fp32" if name == "into_weight" else "*bf16") for name in kernel.arg_names}
        signature = {name: "constexpr" if name in own else kind for name, kind in types.items()}
        values = {(kernel.arg_names.index(name),): value for name, value in own.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values)
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        Path("kernel.cubin").write_bytes(found.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        subprocess.run([tool, "--dump-resource-usage", "kernel.cubin"], check=True)


@pytest.mark.kernels
@pytest.mark.parametrize(("keys", "channels", "tail"), [(128, 384, False), (256, 1024, True)])
def test_kernels_compile_for_an_h100(keys: int, channels: int, tail: bool, tmp_path: Path) -> None:
    """Of the presets: without a spilled register."""
    interpreted()
    code = f"from tests.test_short_conv import compile_for_an_h100 as c; c({keys}, {channels}, {tail})"
    own = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | own
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" STACK:0 ") == 2, done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_on_a_gpu(shape: str) -> None:
    """Compiled, in bf16, against fp64 of the same numbers."""
    from megatron_refine.platform import hardware

    x = inputs(shape, 700, True, torch.bfloat16)
    exact = {n: v.detach().double().requires_grad_() if isinstance(v, Tensor) else v for n, v in x.items()}
    low = {n: v.detach().to(hardware.device()).requires_grad_() if isinstance(v, Tensor) else v for n, v in x.items()}
    for mine, truth in zip(results(convolved, low), results(convolved, exact), strict=True):
        assert (mine.cpu().double() - truth).norm() <= 2e-2 * truth.norm() + 1e-6
