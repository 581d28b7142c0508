"""How a run fails, by exit code (train.py)."""

import errno


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class MismatchError(RuntimeError):
    """Engine and trainer disagree on the probabilities of rollouts: by how much, which key is the limit, what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read: which file, what is wrong, what to do.

    alone: raised by this rank without the others' knowledge, so that it must speak for itself.
    """

    def __init__(self, message: str, alone: bool = False):
        super().__init__(message)
        self.alone = alone


class DamagedError(CheckpointError):
    """Files of a checkpoint are not those that were written: an earlier checkpoint may do."""


class FencedError(CheckpointError):
    """Another attempt at the run has taken over its folder: which one."""


class LostError(RuntimeError):
    """The ranks of a run did not meet: where, why, what to do."""

    alone = True  # each rank speaks for itself


def disk_failed(error: OSError) -> CheckpointError:
    """What a failure to read or write a file means for a run, on one line."""
    return CheckpointError(
        f"{error.filename or 'a file of the run'}: {error.strerror or error}; earlier checkpoints are intact: "
        f"{'make room' if error.errno in FULL else 'mend it'} and run the same command again",
        alone=True,
    )


def refused_file(error: OSError) -> str:
    """What a command says where the disk is full or a file cannot be made; "" for any other failure."""
    where, why = error.filename or "a file that the command writes", error.strerror
    if error.errno in FULL:
        return f"{where}: {why}; make room and run the same command again"
    return f"{where}: {why}; name another file or folder, or mend this one" if error.errno in REFUSED else ""


COPY = "copy the checkpoint again from where it was written"  # the remedy for a damaged one
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "NCCL error")


def lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, or did not come in time."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)
