"""What a LaCT model costs: parameters, matmul FLOPs, bytes. Plain arithmetic.

A multiply-add counts 2 FLOPs. Letters: h hidden size, H fast-weight heads, D = h/H and I their widths.
"""

from megatron_refine.models.common import cost
from megatron_refine.models.family import Saved
from megatron_refine.models.lact.config import LactConfig

FP32 = 4
NEWTON_SCHULZ_STEPS = 5


def parameters(model: LactConfig) -> int:
    """Trained parameters of the whole model, vocabulary padding included."""
    return rank_parameters(model, tp=1, pp=1, stage=0)


def rank_parameters(model: LactConfig, tp: int, pp: int, stage: int) -> int:
    """Trained parameters of each tensor parallel rank of one pipeline stage."""
    return cost.rank_parameters(model, tp, pp, stage, sharded=_sharded_of_layer(model), head_norm=model.head_dim)


def layer_flops(model: LactConfig, length: int) -> dict[str, int]:
    """Forward FLOPs of a layer, a token of a stream of `length` tokens, by matmul.

    Every chunk but the last is also an update; a stream shorter than a chunk (a branch) only reads.
    """
    h, window = model.hidden_size, min(model.window_size, length)
    seen = window - window * (window - 1) // (2 * length)  # keys a query sees, on average
    fast = model.num_lact_heads * model.head_dim * model.inner_dim
    updates = -(-length // model.lact_chunk_size) - 1
    trained = updates * model.lact_chunk_size / length  # share of the tokens
    small, large = sorted((model.head_dim, model.inner_dim))
    gram = 2 * small * small * large + 2 * small**3 + 2 * small * small * large  # X X^T, its square, times X
    muon = 3 * NEWTON_SCHULZ_STEPS * model.num_lact_heads * gram if model.use_muon else 0
    return {
        "in_proj": 2 * h * _columns(model),
        "window": 4 * seen * h,
        "read": 6 * fast,
        "update": round(12 * fast * trained),
        "muon": round(muon * updates / length),
        "out_proj": 2 * h * h,
        "mlp": 6 * h * model.intermediate_size,
    }


def fork_flops(model: LactConfig) -> int:
    """Forward FLOPs of a layer to read the state at one position: none, a branch shares the weights of its chunk."""
    return 0


def head_flops(model: LactConfig) -> int:
    """Forward FLOPs of the output layer, a row."""
    return cost.head_flops(model)


def state_bytes(model: LactConfig, itemsize: int) -> int:
    """Bytes of a layer's state at one position: the weights that it reads, the window's keys and values."""
    return (_matrices(model) + 2 * (model.window_size - 1) * model.hidden_size) * itemsize


def head_norm_width(model: LactConfig) -> int:
    """Width of the norm of a head's output."""
    return model.head_dim


def exchanged_columns(model: LactConfig) -> tuple[int, int]:
    """Columns that context parallel ranks exchange before the mixing of a row, and after it."""
    return _columns(model), model.hidden_size


def handle_bytes(model: LactConfig, itemsize: int, length: int, gpu: bool, cp: int) -> float:
    """Keys and values of the attention, keys twice and values of the fast weights, their rates and momenta; at each
    chunk the weights as used, as they add up and as they move."""
    updates = -(-length // model.lact_chunk_size) - 1
    weights = (updates * (itemsize + 2 * FP32) + FP32) * _matrices(model) / length
    return 5 * model.hidden_size * itemsize + 4 * model.num_lact_heads * FP32 + weights


def delta_rule(model: LactConfig) -> None:
    """It has none, and no Triton kernels of its own: FlexAttention's are Inductor's."""


def saved_bytes(model: LactConfig, itemsize: int, length: int, gpu: bool) -> Saved:
    """Bytes kept for the backward pass of a layer, around and in `kernels/lact`. On a CPU held to measurements by
    tests; on a GPU (compiled chains keep their inputs, FlexAttention its own) counted in the sources."""
    h, inner, window = model.hidden_size, model.num_lact_heads * model.inner_dim, model.window_size
    frame = cost.saved_frame(model, gpu)
    updates = -(-length // model.lact_chunk_size) - 1
    trained = min(1.0, updates * model.lact_chunk_size / length)  # share of the tokens
    attended = -(-length // window) * window if length > window else length
    # queries, keys twice and values of the fast weights, what was read of them and its sum with the attention; on a CPU
    # also their queries and keys in and after SiLU, the norm of what was read, its product with the scale
    mixer = _columns(model) + (6 if gpu else 12) * h
    attention = 4 * h * attended / length  # q, k, v and what is read
    if not gpu:
        attention += 4 * h * max(0, attended - window) / length  # keys and values of two windows side by side
    fast = (2 + 3 * trained) * inner  # gate, up; for the update also the gradient of their product
    position = 2 * (window - 1) * h * itemsize  # keys and values before a branch
    angles = (2 if model.ttt_nope else 4) * length * h // model.num_attn_heads * FP32  # cosines and sines
    mask = 2 * window * window * FP32 if length > window else 0
    return Saved(
        rows=frame.rows * itemsize,
        heads=(mixer + attention + fast) * itemsize + _saved_matrices(model, updates, itemsize, gpu) / length,
        mlp=frame.mlp * itemsize,
        fixed=0 if gpu else angles + mask,
        position=position,
    )


def _saved_matrices(model: LactConfig, updates: int, itemsize: int, gpu: bool) -> int:
    """Bytes of the fast weights, and of what their updates keep, a sequence."""
    each = 2 * itemsize + FP32  # as used, by the chunks' reads and by the update; as they add up
    each += FP32 * model.use_momentum  # what moved
    each += (itemsize if gpu else FP32) * model.use_muon  # what Muon starts from
    return (updates * each + FP32) * _matrices(model)


def _matrices(model: LactConfig) -> int:
    """Elements of the fast weights."""
    return 3 * model.num_lact_heads * model.head_dim * model.inner_dim


def _columns(model: LactConfig) -> int:
    extra = 3 + int(model.use_momentum) + int(model.learnable_ttt_scale)
    return 3 * model.hidden_size + model.num_lact_heads * extra


def _sharded_of_layer(model: LactConfig) -> int:
    h, heads, inner, rank = model.hidden_size, model.num_lact_heads, model.inner_dim, model.w0_w2_low_rank
    bias = _columns(model) - (0 if model.qkv_bias else 3 * h)
    whole = h * inner  # of one matrix, all heads
    initial = whole + 2 * (heads * rank * (inner + model.head_dim) if rank > 0 else whole)
    return h * _columns(model) + bias + 4 * h + initial + h * h + 3 * h * model.intermediate_size
