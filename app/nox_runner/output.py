"""What a run writes to one of its outputs, taken up to a limit."""

from __future__ import annotations

import os

_CHUNK = 64 << 10


class Output:
    """Reads a pipe without blocking; keeps at most `limit` bytes."""

    def __init__(self, descriptor: int, limit: int) -> None:
        self.descriptor = descriptor
        self.content = bytearray()
        self.truncated = False
        self._limit = limit
        os.set_blocking(descriptor, False)

    def read(self) -> bool:
        """Take one chunk; False at the end of the stream, BlockingIOError if there is none yet."""
        data = os.read(self.descriptor, _CHUNK)
        room = self._limit - len(self.content)
        self.content += data[:room]
        self.truncated = self.truncated or len(data) > room
        return bool(data)

    def drain(self) -> None:
        """Take all that is there already."""
        try:
            while not self.truncated and self.read():
                pass
        except BlockingIOError:
            return
