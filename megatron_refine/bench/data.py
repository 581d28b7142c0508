"""From text to batches: tokens a second of the preparation, and of reading what it wrote, beside a training step."""

import tempfile

from megatron_refine.bench.timing import Timings
from megatron_refine.config import Config


def run(config: Config, rounds: int) -> str:
    """`rounds` preparations into empty folders, and as many batches. Returns a table."""
    import numpy as np

    from megatron_refine.data.order import sample_rows
    from megatron_refine.data.prepare import prepare

    rows, size = prepare(config).train, config.train.global_batch_size
    tokenizer = str(prepare(config).tokenizer)  # training a tokenizer is not what is measured

    def preparation(_: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            update = {"cache_dir": folder, "tokenizer": tokenizer}
            prepare(config.model_copy(update={"data": config.data.model_copy(update=update)}))

    def batch(i: int) -> None:
        rows.batch(sample_rows(config.run.seed, i * size, size, len(rows)), np.arange(i * size, (i + 1) * size))

    timings = Timings({"preparation": preparation, "batch": batch}, rounds)
    tokens = {"preparation": len(rows) * config.data.seq_length, "batch": size * config.data.seq_length}
    notes = {name: f"{tokens[name] / min(timings.seconds[name]) / 1e6:.2f} M tokens/s" for name in tokens}
    return f"{len(rows)} rows of {config.data.seq_length}; medians of {rounds}\n{timings.table('batch', notes)}"
