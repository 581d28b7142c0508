"""What a DeltaNet costs: parameters, matmul FLOPs, bytes. Plain arithmetic.

A multiply-add counts 2 FLOPs. Norms, activations and the depthwise convolution are no matmuls and are left out.
Letters: h hidden size, H heads, K and V the widths of a head's keys and values, C the chunk of the delta rule.
"""

from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.family import Saved

CHUNK = 64  # tokens a chunk of kernels/delta_rule
FP32 = 4


def parameters(model: DeltaNetConfig) -> int:
    """Trained parameters of the whole model, vocabulary padding included."""
    return rank_parameters(model, tp=1, pp=1, stage=0)


def rank_parameters(model: DeltaNetConfig, tp: int, pp: int, stage: int) -> int:
    """Trained parameters of each tensor parallel rank of one pipeline stage.

    Heads, MLP columns and vocabulary are sharded, norms are whole on every rank. The first stage has the embedding, the
    last one the final norm and the output layer (tied: a copy of the embedding, unless it has that already).
    """
    assert 0 <= stage < pp and model.num_layers % pp == 0 and model.num_heads % tp == 0
    first, last = stage == 0, stage == pp - 1
    table = model.padded_vocab * model.hidden_size
    own_output = last and not (model.tie_embeddings and first)
    sharded = model.num_layers // pp * _sharded_of_layer(model) + table * (first + own_output)
    replicated = model.num_layers // pp * (2 * model.hidden_size + model.head_dim_v) + last * model.hidden_size
    assert sharded % tp == 0, "tp divides the heads, the MLP and the padded vocabulary"
    return sharded // tp + replicated


def layer_flops(model: DeltaNetConfig, length: int) -> dict[str, int]:
    """Forward FLOPs of a layer, a token of a stream of `length` tokens, by matmul.

    The delta rule is in the chunked form of arXiv 2406.06484 section 3: [U|W] = (I + A)^-1 [beta V | beta K],
    u = U - W S, o = q S + tril(q k^T) u, S' = S + k^T u. A stream shorter than a chunk (a branch) is one chunk.
    """
    h, heads, k, v = model.hidden_size, model.num_heads, model.head_dim_k, model.head_dim_v
    chunk = min(CHUNK, length)
    return {
        "in_proj": 2 * h * heads * (2 * k + v + 1),
        "k k^T": 2 * heads * chunk * k,
        "solve": heads * chunk * (k + v),  # triangular: half a matmul; counters that hook matmuls see 0
        "W S": 2 * heads * k * v,
        "q S": 2 * heads * k * v,
        "q k^T": 2 * heads * chunk * k,
        "(q k^T) u": 2 * heads * chunk * v,
        "k^T u": 2 * heads * k * v,
        "out_proj": 2 * heads * v * h,
        "mlp": 6 * h * model.intermediate_size,
    }


def fork_flops(model: DeltaNetConfig) -> int:
    """Forward FLOPs of a layer to read the state at one position: the masked product S + k[:r]^T u[:r]."""
    return 2 * model.num_heads * CHUNK * model.head_dim_k * model.head_dim_v


def head_flops(model: DeltaNetConfig) -> int:
    """Forward FLOPs of the output layer, a row."""
    return 2 * model.hidden_size * model.padded_vocab


def state_bytes(model: DeltaNetConfig, itemsize: int) -> int:
    """Bytes of a layer's state at one position: S [H, K, V] in fp32 and the tail of the convolution."""
    matrix = model.num_heads * model.head_dim_k * model.head_dim_v * FP32
    return matrix + (model.conv_size - 1) * _conv_channels(model) * itemsize


def saved_bytes(model: DeltaNetConfig, itemsize: int) -> Saved:
    """Bytes kept for the backward pass of a layer, a token: what autograd saves around and in the chunked delta rule in
    torch, which computes in fp32 (`kernels/delta_rule/chunk.py`). The fla kernels keep less."""
    k, v, heads = model.head_dim_k, model.head_dim_v, model.num_heads
    rows = 4 * model.hidden_size  # input and output of both norms
    mixer = 3 * _conv_channels(model)  # before the convolution, once more with the tail in front, before SiLU
    mixer += heads * (2 * k + 2 * v)  # q, k before their norm; o before and after its norm
    rule = heads * (7 * k + 3 * v + 2 * CHUNK + k * v // CHUNK + 1)  # q, k, beta k, v, U, W, u, both [C, C], S, beta
    mlp = 4 * model.intermediate_size  # gate, up, SiLU(gate), their product
    return Saved(rows=rows * itemsize, heads=(mixer + mlp) * itemsize + rule * FP32)


def _sharded_of_layer(model: DeltaNetConfig) -> int:
    h, heads, k, v = model.hidden_size, model.num_heads, model.head_dim_k, model.head_dim_v
    in_proj, out_proj = h * heads * (2 * k + v + 1), heads * v * h
    return in_proj + _conv_channels(model) * model.conv_size + out_proj + 3 * h * model.intermediate_size


def _conv_channels(model: DeltaNetConfig) -> int:
    return model.num_heads * (2 * model.head_dim_k + model.head_dim_v)
