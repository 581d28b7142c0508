"""Packed streams one after another, as bzip2 and xz files hold them.

Python's own readers take what follows a stream and is none for the end of the file: the rest would be left out.
"""

import io
from collections.abc import Callable, Iterator
from typing import IO, Any

_BLOCK = 1 << 16  # bytes that are read at once


class Streams(io.RawIOBase):
    """The bytes of all streams of a file. What is between them must be a stream, or zeros.

    Raises EOFError where the last is cut, and what the decompressor raises for other bytes.
    """

    def __init__(self, file: IO[bytes], decompressor: Callable[[], Any]):
        self._parts = self._unpacked(file, decompressor)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of the buffer; 0 at the end."""
        self._rest = self._rest or memoryview(next(self._parts, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    @staticmethod
    def _unpacked(file: IO[bytes], decompressor: Callable[[], Any]) -> Iterator[bytes]:
        packed = file.read(_BLOCK)
        while packed:
            stream = decompressor()
            while not stream.eof:
                if not packed and stream.needs_input and not (packed := file.read(_BLOCK)):
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                if part := stream.decompress(packed, _BLOCK):
                    yield part
                packed = b""
            packed = stream.unused_data.lstrip(b"\0")
            while not packed and (block := file.read(_BLOCK)):
                packed = block.lstrip(b"\0")
