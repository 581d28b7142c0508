"""Sections on what a run reads: documents and prompts."""

from typing import Literal

from pydantic import Field

from megatron_refine.config.base import Section
from megatron_refine.config.paths import FilePaths, PathText, RequiredPath


class Data(Section):
    """Documents of mid-training, and the tokenizer and row length of all phases. What files may hold: docs/data.md."""

    paths: FilePaths = Field(
        default_factory=list,
        description="Files of documents, or folders of them: a text file is a document, and so is each row of a jsonl, "
        "json or parquet file. Empty: the sources of Python's standard library.",
    )
    text_column: str = Field("text", description="Column of jsonl, json and parquet files that holds the document.")
    valid_paths: FilePaths = Field(
        default_factory=list,
        description="Files of held-out documents, or folders of them. Empty: `data.valid_fraction` of those in "
        "`data.paths`.",
    )
    valid_fraction: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Fraction of the documents that is held out when `data.valid_paths` is empty. A hash of its text "
        "decides for each document, so equal documents stay on one side.",
    )
    tokenizer: PathText = Field(
        "",
        description="A `tokenizer.json` (any name in .json), a sentencepiece `tokenizer.model`, or a folder with one; "
        "`tokenizer.json` is preferred. Empty: a BPE of `model.vocab_size` ids is trained on the corpus.",
    )
    cache_dir: RequiredPath = Field(
        ".cache/data",
        description="Folder of the trained tokenizer and of packed rows (.bin, .idx). Later runs find both by their "
        "fingerprint.",
    )
    seq_length: int = Field(
        16384, ge=8, description="T: length of a row in tokens. A prompt must fit; in posttrain, with its answer."
    )
    min_length: int = Field(
        0,
        ge=0,
        description="Least length of a row in tokens: shorter documents are dropped, rows between it and "
        "`data.seq_length` are padded and masked. 0: `data.seq_length`.",
    )
    valid_min_length: int = Field(
        0,
        ge=0,
        description="The same for held-out documents. Those too short for rollouts count in the NTP loss alone. 0: as "
        "for training.",
    )
    split_documents: bool = Field(
        False, description="Cut a document into rows of `data.seq_length` tokens. false: keep the first row only."
    )
    add_bos: bool = Field(False, description="Begin every row and every prompt with the tokenizer's BOS token.")


class Task(Section):
    """Prompts with answers, for post-training and test-time training: docs/phases.md."""

    paths: FilePaths = Field(
        default_factory=list,
        description="Jsonl, json or parquet files of prompts, or folders of them. Each row is a prompt.",
    )
    valid_paths: FilePaths = Field(
        default_factory=list,
        description="Jsonl, json or parquet files of prompts, or folders of them, that evaluations answer and score.",
    )
    prompt_column: str = Field("prompt", description="Column of the prompt.")
    answer_column: str = Field(
        "", description="Column of the answer: a text, or a list of accepted texts. Empty: `answers`, or else `answer`."
    )
    max_new_tokens: int = Field(
        32, ge=1, description="Most tokens that are written as an answer, where a file has no column `max_gen_tokens`."
    )
    add_eos: bool = Field(False, description="posttrain: end each answer with EOS. The official code does not.")
    answer_mean: Literal["token", "micro_batch"] = Field(
        "token",
        description="posttrain: the answers' loss is a mean over their tokens. `micro_batch`: over the means of "
        "micro-batches, as in the official code, so that tokens of short answers count more.",
    )
    skip_too_long: bool = Field(
        False, description="Leave out and count rows that `data.seq_length` cannot hold. false: they are an error."
    )
    inner_step: bool = Field(
        True, description="posttrain: take a step on the prompts before the one on the answers. false: plain SFT."
    )
