"""Slots for runs, and the bounded queue of those who wait for one."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_FIRST_GUESS = 1.0
_WEIGHT = 0.2


class QueueFullError(Exception):
    """No slot is free and nobody more may wait; `retry_after` in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"try again in {retry_after} s")
        self.retry_after = retry_after


class Slots:
    """First come, first served. Used by one event loop."""

    def __init__(self, total: int, queue: int) -> None:
        self.total = total
        self.queue = queue
        self.used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._usual = _FIRST_GUESS

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold a slot; QueueFullError at once if there is no room to wait for one."""
        await self._acquire()
        started = time.monotonic()
        try:
            yield
        finally:
            self._usual += _WEIGHT * (time.monotonic() - started - self._usual)
            self.used -= 1
            self._hand_on()

    def resize(self, total: int, queue: int) -> None:
        """Change the numbers. Who runs or waits already is not turned away."""
        self.total = total
        self.queue = queue
        self._hand_on()

    def retry_after(self) -> int:
        """Seconds until the queue should have room: from what recent runs took, at least 1."""
        return max(1, math.ceil(self._usual * (self.queued + 1) / self.total))

    async def _acquire(self) -> None:
        if self.used < self.total and not self._waiting:
            self.used += 1
            return
        if self.queued >= self.queue:
            raise QueueFullError(self.retry_after())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # The slot came at the very moment of leaving.
                self.used -= 1
                self._hand_on()
            else:
                self._waiting.remove(turn)
            raise

    def _hand_on(self) -> None:
        while self._waiting and self.used < self.total:
            turn = self._waiting.popleft()
            if not turn.done():
                self.used += 1
                turn.set_result(None)
