"""`megatron-refine kernels` from a checkout."""

import sys

from megatron_refine.cli import run

if __name__ == "__main__":
    sys.exit(run("kernels"))
