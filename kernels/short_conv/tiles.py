"""The Triton kernels of gpu.py.

A program has tiles [BT tokens, BD columns] of a part of a group: its queries, its keys, or BD of its values. All of it
is computed in fp32.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)  # under the root of a length, as in `l2_normalize`


@triton.jit
def _part(K: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """-> the group, the part in it, its columns among the group's, and which of them it has."""
    PARTS: tl.constexpr = 2 + (C - 2 * K + BD - 1) // BD
    group, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    columns = part * K + tl.arange(0, BD)
    inside = tl.arange(0, BD) < K
    if part >= 2:
        columns = 2 * K + (part - 2) * BD + tl.arange(0, BD)
        inside = columns < C
    return group, part, columns, inside


@triton.jit
def _input(
    rows, tail, at, columns, inside, step, tail_step, length,
    W: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The tokens `at`, some of which may lie before the first one."""
    here = ((at >= 0) & (at < length))[:, None] & inside[None, :]
    x = tl.load(rows + at.to(tl.int64)[:, None] * step + columns[None, :], mask=here, other=0.0).to(tl.float32)
    if TAIL:
        before = ((at < 0) & (at > -W))[:, None] & inside[None, :]
        place = (at + (W - 1))[:, None] * tail_step + columns[None, :]
        x += tl.load(tail + place, mask=before, other=0.0).to(tl.float32)
    return x


@triton.jit
def _sum(
    rows, tail, weight, at, columns, inside, step, tail_step, length,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The convolution at the tokens `at`."""
    found = tl.zeros([BT, BD], tl.float32)
    for tap in range(W):
        x = _input(rows, tail, at + (tap - (W - 1)), columns, inside, step, tail_step, length, W, TAIL)
        found += x * tl.load(weight + columns * W + tap, mask=inside, other=0.0).to(tl.float32)[None, :]
    return found


@triton.jit
def _place(at, columns, group, groups, length, first, WIDTH: tl.constexpr):
    """Where the columns from `first` lie in a tensor [N, T, G, WIDTH]."""
    row = (tl.program_id(2).to(tl.int64) * length + at) * groups + group
    return row[:, None] * WIDTH + (columns - first)[None, :]


@triton.jit
def forward_kernel(
    rows, weight, tail, q, k, v, sequence, step, stride, length,
    groups, K: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Strides of rows: of a sequence, a token, a group. Grid: blocks of tokens, groups x parts, sequences."""
    n = tl.program_id(2).to(tl.int64)
    group, part, columns, inside = _part(K, C, BD)
    at = tl.program_id(0) * BT + tl.arange(0, BT)
    rows += n * sequence + group * stride
    if TAIL:
        tail += n * (W - 1) * groups * C + group * C
    y = _sum(rows, tail, weight + group * C * W, at, columns, inside, step, groups * C, length, W, BT, BD, TAIL)
    y *= tl.sigmoid(y)
    here = (at < length)[:, None] & inside[None, :]
    if part < 2:
        y *= (1 / tl.sqrt(tl.sum(y * y, 1) + EPS))[:, None]
        place = _place(at, columns, group, groups, length, part * K, K)
        tl.store(q + place, y.to(q.dtype.element_ty), mask=here & (part == 0))
        tl.store(k + place, y.to(k.dtype.element_ty), mask=here & (part == 1))
    else:
        place = _place(at, columns, group, groups, length, 2 * K, C - 2 * K)
        tl.store(v + place, y.to(v.dtype.element_ty), mask=here)


@triton.jit
def _through(
    q, k, v, y, at, columns, inside, part, group, groups, length,
    K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v at the tokens `at`, y the convolution there -> the gradient of y; 0 beyond the tokens."""
    here = ((at >= 0) & (at < length))[:, None] & inside[None, :]
    slope = tl.sigmoid(y)
    silu, slope = y * slope, slope * (1 + y * (1 - slope))
    if part < 2:
        place = _place(at, columns, group, groups, length, part * K, K)
        grad = tl.load(q + place, mask=here & (part == 0), other=0.0).to(tl.float32)
        grad += tl.load(k + place, mask=here & (part == 1), other=0.0).to(tl.float32)
        inverse = (1 / tl.sqrt(tl.sum(silu * silu, 1) + EPS))[:, None]
        unit = silu * inverse
        grad = inverse * (grad - unit * tl.sum(unit * grad, 1)[:, None])
    else:
        place = _place(at, columns, group, groups, length, 2 * K, C - 2 * K)
        grad = tl.load(v + place, mask=here, other=0.0).to(tl.float32)
    return tl.where(here, grad * slope, 0.0)


@triton.jit
def backward_kernel(
    q, k, v, rows, weight, tail, into_rows, into_weight, into_tail,
    sequence, step, stride, into_sequence, into_step, into_stride, length,
    groups, blocks, K: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    TAIL: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Gradients q, k, v -> into_rows, into_tail, and a program's part of into_weight [*, G, W, C].

    A token's gradient is a sum over the W tokens from it on of the convolution's gradient, which is computed for each
    of them again. Strides as in `forward_kernel`. blocks: of BT tokens that a program walks over.
    """
    n = tl.program_id(2).to(tl.int64)
    group, part, columns, inside = _part(K, C, BD)
    rows += n * sequence + group * stride
    into_rows += n * into_sequence + group * into_stride
    weight += group * C * W
    tail_step = groups * C
    start = tl.program_id(0) * blocks * BT
    if TAIL:
        start -= W - 1
        tail += n * (W - 1) * tail_step + group * C
        into_tail += n * (W - 1) * tail_step + group * C
    taps = tl.arange(0, BW)
    sums = tl.zeros([BW, BD], tl.float32)
    for block in range(blocks):
        at = start + block * BT + tl.arange(0, BT)
        x = _input(rows, tail, at, columns, inside, step, tail_step, length, W, TAIL)
        found = tl.zeros([BT, BD], tl.float32)
        for shift in range(W):  # not unrolled: that would take all registers
            there, tap = at + shift, W - 1 - shift
            y = _sum(rows, tail, weight, there, columns, inside, step, tail_step, length, W, BT, BD, TAIL)
            grad = _through(q, k, v, y, there, columns, inside, part, group, groups, length, K, C)
            found += grad * tl.load(weight + columns * W + tap, mask=inside, other=0.0).to(tl.float32)[None, :]
            sums += tl.where((taps == tap)[:, None], tl.sum(grad * x, 0)[None, :], 0.0)
        here = ((at >= 0) & (at < length))[:, None] & inside[None, :]
        place = at.to(tl.int64)[:, None] * into_step + columns[None, :]
        tl.store(into_rows + place, found.to(into_rows.dtype.element_ty), mask=here)
        if TAIL:
            before = ((at < 0) & (at > -W))[:, None] & inside[None, :]
            place = (at + (W - 1))[:, None] * tail_step + columns[None, :]
            tl.store(into_tail + place, found.to(into_tail.dtype.element_ty), mask=before)
    part_of = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    place = ((part_of * groups + group) * W + taps)[:, None] * C + columns[None, :]
    tl.store(into_weight + place, sums, mask=(taps < W)[:, None] & inside[None, :])
