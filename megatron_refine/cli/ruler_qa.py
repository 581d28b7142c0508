"""Make the REFINE paper's files of RULER-QA for any tokenizer, to train on and to test with.

    megatron-refine ruler-qa --data DIR --tokenizer FILE --lengths 4096,8192,16384 --name MODEL --out DIR

The folder --data has squad.json (SQuAD 2.0's dev-v2.0.json) and hotpotqa.json (HotpotQA's
hotpot_dev_distractor_v1.json). For each of them and each length two files are made, as
ruler_squadqa_MODEL_4096_1600_train.parquet. Files that are there are kept. Exit codes: 0 done, 2 what was asked
cannot be.
"""

import argparse
import sys

from megatron_refine import usage
from megatron_refine.config import ConfigError
from megatron_refine.config.paths import path_argument, text_argument


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line; ends the process with 2 where it is wrong."""
    parser = usage.parser("ruler-qa", __doc__)
    add = parser.add_argument
    add("--data", required=True, type=text_argument, metavar="DIR", help="folder of squad.json and hotpotqa.json")
    add("--tokenizer", required=True, type=path_argument, metavar="FILE", help="a tokenizer, or a model's folder")
    add("--lengths", type=_numbers, default=[4096, 8192, 16384], help="tokens of prompt and answer (4096,8192,16384)")
    add("--out", required=True, type=path_argument, metavar="DIR", help="folder of the files")
    add("--name", default="", help="the model in the files' names; evaluate takes those of the model's family")
    add("--train", type=int, default=1600, metavar="N", help="prompts of a file to train on (1600)")
    add("--test", type=int, default=200, metavar="N", help="prompts of a file to test with (200)")
    add("--seed", type=int, default=1, help="the same seed gives the same prompts (1)")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def main(arguments: list[str]) -> int:
    """Make the files and print each. Return the exit code."""
    options = parse(arguments)
    from megatron_refine.eval.ruler.qa_files import Wanted, make  # late: --help is quick

    try:
        make(Wanted(**vars(options)), print)
    except (ConfigError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
