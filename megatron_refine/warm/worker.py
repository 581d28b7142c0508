"""One of the processes that compile a configuration's kernels: python -m megatron_refine.warm.worker REQUEST.

All of them run the same passes. Each kernel's compilation is done by the one that is first to make its file in a folder
that they share; the others go on without it. The process pretends to have a GPU, and computes nothing.

REQUEST is JSON: files, overrides, architecture, kinds, pinned, claims. Every line of the output is JSON too: a kernel's
name as soon as it is compiled, and all that is known of each at the end of a pass.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_refine import config as configuration
from megatron_refine.models.family import FAMILIES


def main(request: dict[str, Any]) -> None:
    """Compile this process's share."""
    import torch

    torch.set_num_threads(1)
    from megatron_refine.kernels import tuning
    from megatron_refine.warm.driver import Compiled, pretend
    from megatron_refine.warm.passes import passes, shape

    config = configuration.load(request["files"], request["overrides"], FAMILIES)
    compiled = Compiled(functools.partial(claim, Path(request["claims"])), functools.partial(_say, "kernel"))
    pretend(request["architecture"], compiled)
    for kind, run in passes(config, torch.device("cpu")).items():
        if kind not in request["kinds"]:
            continue
        compiled.kind = kind
        _import_kernels()
        listed = bool(tuning.choices(request["architecture"], shape(config)))
        for pinned in [True] if request["pinned"] else [False, True][: 1 + listed]:
            for tuner in tuning.autotuners().values():
                tuner.cache.clear()  # a pass tries all of its candidates: in a run of its own it may be the first
            tuning.pin(request["architecture"], shape(config) if pinned else "")
            run()
    _say("binaries", [dataclasses.asdict(binary) for binary in compiled.binaries])


def _import_kernels() -> None:
    """Those of `fla_delta_rule`, so that their autotuners are there."""
    from megatron_refine.kernels.delta_rule.fla import _parts

    _parts()


def claim(folder: Path, key: str) -> bool:
    """Whether this process is the first to ask for it."""
    try:
        os.close(os.open(folder / hashlib.sha256(key.encode()).hexdigest(), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _say(what: str, value: Any) -> None:
    sys.stdout.write(json.dumps({what: value}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
