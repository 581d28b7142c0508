"""What the families' costs share: the frame around the mixer."""

from megatron_refine.config import ModelConfig
from megatron_refine.models.family import Saved


def rank_parameters(model: ModelConfig, tp: int, pp: int, stage: int, *, sharded: int, head_norm: int) -> int:
    """Trained parameters of each tensor parallel rank of one pipeline stage.

    sharded: of a layer, over all ranks: heads and MLP columns; head_norm: width of the norm of a head's output. The
    vocabulary is sharded, norms are whole on every rank. The first stage has the embedding, the last one the final norm
    and the output layer (tied: a copy of the embedding, unless it has that already).
    """
    assert 0 <= stage < pp and model.num_layers % pp == 0 and model.tp_limit() % tp == 0
    first, last = stage == 0, stage == pp - 1
    table, layers = model.padded_vocab * model.hidden_size, model.num_layers // pp
    own_output = last and not (model.tie_embeddings and first)
    cut = layers * sharded + table * (first + own_output)
    assert cut % tp == 0, "tp divides the heads, the MLP and the padded vocabulary"
    return cut // tp + layers * (2 * model.hidden_size + head_norm) + last * model.hidden_size


def head_flops(model: ModelConfig) -> int:
    """Forward FLOPs of the output layer, a row."""
    return 2 * model.hidden_size * model.padded_vocab


def saved_frame(model: ModelConfig, gpu: bool) -> Saved:
    """Elements kept for the backward pass of a layer around its mixer, a row. On a GPU the norms and the gated MLP are
    one kernel each, which keeps its input."""
    norm = 2 if gpu else 3  # input and output; x / rms(x)
    mlp = 3 if gpu else 5  # gate, up, their product; gate again, SiLU(gate)
    return Saved(rows=2 * norm * model.hidden_size, heads=0, mlp=mlp * model.intermediate_size)
