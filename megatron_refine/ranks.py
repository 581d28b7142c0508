"""Start the ranks of a training command on this machine, by torch's elastic launcher, without its report of a failure.

torchrun does the same and adds forty lines to the one that says what is wrong; and it ends with 1, whatever the rank's
code was.
"""

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from megatron_refine import launcher
from megatron_refine.files import read, write

END = "MEGATRON_REFINE_END"  # names the file for the first rank's code
SAVES = "600"  # seconds that the ranks get to save in, after Ctrl-C


def start(ranks: int, arguments: Sequence[str]) -> int:
    """Run `megatron_refine` with `arguments` on `ranks` ranks. Return the exit code of the rank that failed first, 0
    where none did; 128 + the signal that ended them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVES)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    here = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, max_restarts=0, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
    )  # fmt: skip
    if hasattr(here, "signals_to_handle"):
        here.signals_to_handle += ",SIGUSR1"  # which the ranks save at, and which would end this process alone
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder, "code")
        os.environ[END] = str(left)
        try:
            elastic_launch(here, sys.executable)("-m", "megatron_refine", *arguments)
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            return code if code > 0 else 128 - code
        except SignalException as error:  # the launcher ends the ranks, whatever their codes are
            return int(read(left)) if left.exists() else 128 + int(error.sigval)
    return 0


def leave(code: int) -> int:
    """Return the code of a rank; the first one's is left where `start` finds it after a signal."""
    if os.environ.get(END) and launcher.read().rank == 0:
        write(Path(os.environ[END]), str(code))
    return code
