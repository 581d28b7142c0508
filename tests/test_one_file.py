"""Everyone's first corpus: one text file."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_refine.config import ConfigError, load
from megatron_refine.data.packing import RowRule
from megatron_refine.data.prepare import prepare
from megatron_refine.data.tokenizer import load_tokenizer
from tests.test_data import DOCUMENTS, VOCAB, Stub, contents, write

TEXT = " ".join(DOCUMENTS)


@pytest.mark.parametrize(
    ("fraction", "split", "bos"),
    [(0.2, False, False), (0.2, True, True), (1e-9, False, False), (0.999, False, False)],
)
def test_its_last_rows_are_held_out(tmp_path: Path, fraction: float, split: bool, bos: bool) -> None:
    """It is cut into rows; short files beside it are dropped; the line comes again where the rows are found."""
    tree = {
        "model": {"family": "stub", "vocab_size": VOCAB, "hidden_size": 8, "num_layers": 1, "intermediate_size": 8},
        "data": {
            "paths": [str(write(tmp_path / "text", [TEXT, "short"]))], "seq_length": 64, "valid_fraction": fraction,
            "split_documents": split, "add_bos": bos, "cache_dir": str(tmp_path / "cache"),
        },
        "refine": {"enabled": False},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    config, said = load(tmp_path / "config.yaml", [], {"stub": Stub}), list[str]()
    prepared = prepare(config, said.append)
    tokenizer = load_tokenizer(prepared.tokenizer, VOCAB, "")
    rule = RowRule(64, 64, True, tokenizer.bos_id if bos else None)
    whole = [row.tolist() for row in rule.rows(np.array(tokenizer.encode([TEXT])[0]))]
    held = min(max(1, round(fraction * len(whole))), len(whole) - 1)  # each side has a row
    assert contents(prepared.train) + contents(prepared.valid) == whole
    assert len(prepared.valid) == held and 20 < len(whole) < 500
    assert not bos or all(row[0] == tokenizer.bos_id for row in whole)
    rows = f"the last {held} of its {len(whole)} rows are held out"
    assert said[-1] == f"data.paths: one document has the length of a row: it is cut into rows, {rows}"
    prepare(config, said.append)
    assert said.count(said[-1]) == 2


def test_a_file_of_less_than_two_rows_is_refused(tmp_path: Path) -> None:
    """Copies of it count as one: no text may stand on both sides."""
    tree = {
        "model": {"family": "stub", "vocab_size": VOCAB, "hidden_size": 8, "num_layers": 1, "intermediate_size": 8},
        "data": {"paths": [str(write(tmp_path / "text", [TEXT[:300]] * 2 + ["short"]))], "seq_length": 64,
                 "cache_dir": str(tmp_path / "cache")},
        "refine": {"enabled": False},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ConfigError, match="only one document has the 64 tokens of a row, and not those of two"):
        prepare(load(tmp_path / "config.yaml", [], {"stub": Stub}))
