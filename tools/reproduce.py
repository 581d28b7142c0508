"""`megatron-refine reproduce` under an older name."""

import sys

from megatron_refine.cli import run

if __name__ == "__main__":
    sys.exit(run("reproduce"))
