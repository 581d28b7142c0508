"""How a family is stored in Hugging Face's format, described as data: no torch, no Megatron.

A family's `hf.py` holds one `Format`. Tensors are listed once, as mappings between full (not sharded) tensors: those of
a layer in its `Layer`, with {} for its number, those around the layers in the format's frame. `convert/mapping.py`
follows them in both directions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Same:
    """One tensor under two names."""

    ours: str
    theirs: str
    shape: Shape

    def sources(self) -> dict[str, Shape]:
        return {self.theirs: self.shape}


@dataclass(frozen=True)
class Vocab:
    """A row a token id; ours has more rows, to a multiple of 128, that stand for no id."""

    ours: str
    theirs: str
    rows: int
    padded: int
    width: int

    @property
    def shape(self) -> Shape:
        return self.padded, self.width

    def sources(self) -> dict[str, Shape]:
        return {self.theirs: (self.rows, self.width)}


@dataclass(frozen=True)
class Heads:
    """Several of their tensors in one of ours, head by head: for each head its rows of every part in turn.

    A name that stands several times is one tensor with those parts one below the other, each with all heads, as a
    fused [q | k | v]. Or its parts are `interleaved`: it has them head by head too.
    """

    ours: str
    parts: tuple[tuple[str, int], ...]  # their name, rows a head
    heads: int
    rest: Shape  # dimensions after the rows
    interleaved: tuple[tuple[int, ...], ...] = ()  # of each such tensor the numbers of its parts, in its order

    @property
    def shape(self) -> Shape:
        return self.heads * sum(rows for _, rows in self.parts), *self.rest

    def sources(self) -> dict[str, Shape]:
        total: dict[str, int] = {}
        for name, rows in self.parts:
            total[name] = total.get(name, 0) + self.heads * rows
        return {name: (rows, *self.rest) for name, rows in total.items()}


Mapping = Same | Vocab | Heads


def stack(ours: str, theirs: tuple[str, ...], rows: int, *rest: int) -> Heads:
    """Their tensors of [rows, *rest] one below the other."""
    return Heads(ours, tuple((name, rows) for name in theirs), 1, rest)


def at_layer(mapping: Mapping, layer: int) -> Mapping:
    """The mapping with {} filled in."""
    if isinstance(mapping, Heads):
        parts = tuple((name.format(layer), rows) for name, rows in mapping.parts)
        return replace(mapping, ours=mapping.ours.format(layer), parts=parts)
    return replace(mapping, ours=mapping.ours.format(layer), theirs=mapping.theirs.format(layer))


REQUIRED: Any = object()


@dataclass(frozen=True)
class Key:
    """A field of config.json that is a key of ours."""

    ours: str
    default: Any = REQUIRED  # what a config.json without the field means
    null: Any = None  # what null means


@dataclass(frozen=True)
class Format:
    """A family in Hugging Face's format. Each field of config.json is in one of `fields`, `constants`, `ignored`."""

    model_type: str
    architecture: str
    fields: dict[str, Key]
    constants: dict[str, tuple[Any, ...]]  # the values that we compute; the first is the default and what we write
    ignored: dict[str, Any]  # no part of the maths, with what we write (ABSENT: nothing)
    frame: Callable[[Any], tuple[Mapping, ...]]  # the tensors of a model around its layers
    library: str = "flash-linear-attention"  # whose files these are
    also: tuple[str, ...] = ()  # other model types with these fields and tensors
    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda tree: tree  # config.json -> its fields, without depth
    write: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields
    renamed: dict[str, str] = field(default_factory=dict)  # a name in other checkpoints -> the one here
    not_written: tuple[str, ...] = ("quantization_config",)  # constants of some checkpoints only
    unused: tuple[str, ...] = ()  # tensors in some checkpoints that no computation reads; * is any name
    probe: Callable[[Any], Any] = lambda model: model  # the model at a size of chunk or window that a short text fills


ABSENT: Any = object()

FIELDS = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "num_hidden_layers": Key("num_layers"),
    "norm_eps": Key("norm_eps", 1e-6),
    "initializer_range": Key("init_std", 0.02),
    "tie_word_embeddings": Key("tie_embeddings", False),
}
WIDTH = ("intermediate_size", "hidden_ratio")  # together they are model.intermediate_size
CONSTANTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swish", "silu"),
    "quantization_config": (None,),
}
IGNORED: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "use_cache": True,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "fuse_cross_entropy": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
} | dict.fromkeys(
    (
        # how fla computes and trains
        "attn_mode", "fuse_linear_cross_entropy", "last_layer_fuse_norm", "use_l2warp",
        # what transformers writes for every model
        "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "auto_map", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "decoder_start_token_id", "dtype", "finetuning_task", "gradient_checkpointing",
        "id2label", "is_decoder", "is_encoder_decoder", "label2id", "name_or_path", "output_attentions",
        "output_hidden_states", "prefix", "problem_type", "return_dict", "sep_token_id", "task_specific_params",
        "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript",
        "transformers_version", "use_bfloat16",
        # how transformers would generate; older versions wrote it here
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p",
        "typical_p",
    ),
    ABSENT,
)  # fmt: skip


def mlp_width(hidden_size: int, ratio: float) -> int:
    """Width of the gated MLP where intermediate_size is null: two thirds of ratio * hidden, up to a multiple of 256."""
    return -(-int(hidden_size * ratio * 2 / 3) // 256) * 256


def frame(model: Any, embedding: str = "model.embeddings.weight") -> tuple[Mapping, ...]:
    """The tensors around the layers; the embedding's name is flash-linear-attention's."""
    vocab = model.vocab_size, model.padded_vocab, model.hidden_size
    found: list[Mapping] = [
        Vocab("embedding.word_embeddings.weight", embedding, *vocab),
        Same("decoder.final_layernorm.weight", "model.norm.weight", (model.hidden_size,)),
        Vocab("output_layer.weight", "lm_head.weight", *vocab),
    ]
    return tuple(found[:-1] if model.tie_embeddings else found)


def layer_tensors(
    model: Any, mixer: list[Mapping], norms: tuple[str, str] = ("attn_norm", "mlp_norm"), behind: bool = False
) -> tuple[Mapping, ...]:
    """All tensors of a layer: a family's mixer, the MLP and their norms, whose names are flash-linear-attention's.
    behind: as in `Layer`."""
    hidden, width = model.hidden_size, model.intermediate_size
    ours, theirs = "decoder.layers.{}.", "model.layers.{}."
    own = ("self_attention.post_norm", "mlp.post_norm") if behind else ("input_layernorm", "pre_mlp_layernorm")
    gate_up = theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"
    return (
        Same(f"{ours}{own[0]}.weight", f"{theirs}{norms[0]}.weight", (hidden,)),
        *mixer,
        Same(f"{ours}{own[1]}.weight", f"{theirs}{norms[1]}.weight", (hidden,)),
        stack(ours + "mlp.linear_fc1.weight", gate_up, width, hidden),
        Same(ours + "mlp.linear_fc2.weight", theirs + "mlp.down_proj.weight", (hidden, width)),
    )
