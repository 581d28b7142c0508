"""Sections on what a run reads: documents and prompts."""

from pydantic import Field

from megatron_refine.config.base import Section
from megatron_refine.config.paths import FilePaths, PathText, RequiredPath


class Data(Section):
    paths: FilePaths = Field(
        default_factory=list,
        description="text, jsonl, json or parquet files, or folders; empty: the sources of Python's standard library",
    )
    text_column: str = Field("text", description="column of tables")
    valid_paths: FilePaths = Field(
        default_factory=list, description="held-out files; empty: a fraction of the documents of `paths`"
    )
    valid_fraction: float = Field(0.05, gt=0, lt=1, description="of the documents, when valid_paths is empty")
    tokenizer: PathText = Field(
        "",
        description="a tokenizer.json, a sentencepiece tokenizer.model, or a folder with one; empty: a BPE of "
        "model.vocab_size is trained on the corpus",
    )
    cache_dir: RequiredPath = Field(".cache/data", description="tokenizer and packed .bin/.idx files")
    seq_length: int = Field(16384, ge=8, description="tokens a row, T")
    min_length: int = Field(
        0, ge=0, description="shorter documents are dropped; 0: seq_length. Shorter rows are padded and masked"
    )
    split_documents: bool = Field(
        False, description="cut a document into rows of seq_length; false: keep its first seq_length tokens"
    )
    add_bos: bool = Field(False, description="begin every row with the tokenizer's BOS token")


class Task(Section):
    """Prompts with answers, of post-training and test-time training."""

    paths: FilePaths = Field(default_factory=list, description="jsonl, json or parquet files, a row a prompt")
    valid_paths: FilePaths = Field(
        default_factory=list, description="files whose prompts are answered and scored in evaluations"
    )
    prompt_column: str = "prompt"
    answer_column: str = Field("", description="text, or a list of accepted texts; empty: answers, or else answer")
    max_new_tokens: int = Field(32, ge=1, description="of an answer, where a file has no column max_gen_tokens")
    add_eos: bool = Field(False, description="posttrain: end answers with EOS; the official code does not")
    skip_too_long: bool = Field(
        False, description="leave out, and count, rows that data.seq_length cannot hold; false: they are an error"
    )
    inner_step: bool = Field(
        True, description="posttrain: a step on the prompts before that on the answers; false: plain SFT"
    )
