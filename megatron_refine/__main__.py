"""`python -m megatron_refine COMMAND`: how torchrun and srun start a command on every rank."""

import sys

from megatron_refine.cli import main

if __name__ == "__main__":
    sys.exit(main())
