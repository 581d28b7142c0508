"""The files of a checkpoint, written by a process of each rank while the training goes on."""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_refine.checkpoint.manifest import Files, fingerprints, payload
from megatron_refine.errors import CheckpointError
from megatron_refine.platform.megatron.saves import forget, shield
from megatron_refine.platform.megatron.version import since

# of Megatron's save: since 0.17 its default way needs a package of NVIDIA's
ARGUMENTS: dict[str, Any] = {"async_sharded_save": True} | ({"async_strategy": "mcore"} if since(0, 17) else {})


class Pending:
    """This rank's part of a checkpoint in `folder`, being written.

    The process is forked: it has the state as it is now, whatever the training makes of it. Of a GPU's state it has a
    copy in the host's memory.
    """

    def __init__(self, request: Any, folder: Path, rank: int, contents: dict[str, Any]):
        """request: Megatron's, of an asynchronous save; contents: of the manifest, without its files."""
        self.folder, self.contents, self.finish = folder, contents, list[Callable[[], None]](request.finalize_fns)
        arguments = [*request.async_fn_args]
        if request.preload_fn:
            arguments[1] = request.preload_fn()
        forget()
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(
            target=_write, args=(sender, request.async_fn, arguments, request.async_fn_kwargs, folder, rank)
        )
        self._process.start()
        sender.close()

    def running(self) -> bool:
        """Tell whether the process still writes."""
        return not self._receiver.poll()  # a process that has ended has closed its end

    def files(self) -> Files:
        """Wait for the process and return its files. Raises CheckpointError where it failed."""
        try:
            found: Files | str = self._receiver.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            found = f"the process that wrote it ended with code {code}"
        self._process.join()
        if isinstance(found, str):
            raise CheckpointError(f"{self.folder}: save failed: {found}; earlier checkpoints are intact")
        return found

    def rest(self, files: Files) -> Files:
        """Return the files that no rank's process has counted: what completes the checkpoint, which is small."""
        return fingerprints(self.folder, [name for name in payload(self.folder) if name not in files])


def _write(
    sender: Connection, save: Callable[..., None] | None, arguments: Sequence[Any], more: dict[str, Any], folder: Path,
    rank: int,
) -> None:  # fmt: skip
    """In the process: write, then send the files; what went wrong in `save` itself, Megatron tells when it finishes."""
    shield()
    try:
        if save:
            save(*arguments, **more)
        names = payload(folder)
        own = [name for name in names if name.startswith(f"__{rank}_")]
        before = [name for name in names if "/" in name] if rank == 0 else []  # what the model came with
        sender.send(fingerprints(folder, [*own, *before]))
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
