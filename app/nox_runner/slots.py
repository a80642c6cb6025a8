"""How many runs may be under way at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Slots:
    """A counter that threads wait for; `total` is asked anew each time, as it may be reloaded."""

    def __init__(self, total: Callable[[], int]) -> None:
        self._total = total
        self._changed = threading.Condition()
        self.used = 0

    @contextmanager
    def one(self, patience: float) -> Iterator[bool]:
        """Hold a slot, if one becomes free within `patience` seconds; gives whether."""
        with self._changed:
            held = self._changed.wait_for(lambda: self.used < self._total(), patience)
            self.used += held
        try:
            yield held
        finally:
            with self._changed:
                self.used -= held
                self._changed.notify()
