"""What the requests share. A reload replaces `settings` as a whole."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from fastapi import Request

from nox_api.history.recorder import DEFAULT_PATH, Recorder
from nox_api.metrics import Metrics
from nox_api.runner import RunnerClient
from nox_api.settings import FrontSettings
from nox_api.slots import Slots

_FILE_OPERATIONS = 16
"""Uploads, downloads and listings at once; the runner takes 32."""


@dataclass
class State:
    settings: FrontSettings
    runner: RunnerClient
    history_path: str = DEFAULT_PATH
    slots: Slots = field(init=False)
    metrics: Metrics = field(default_factory=Metrics)
    files: asyncio.Semaphore = field(init=False)
    recorder: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.slots = Slots(self.settings.slots, self.settings.queue)
        self.files = asyncio.Semaphore(_FILE_OPERATIONS)
        self.recorder = Recorder(self.history_path, self.settings)

    def reload(self, settings: FrontSettings) -> None:
        """Use `settings` from the next request on."""
        self.settings = settings
        self.slots.resize(settings.slots, settings.queue)
        self.recorder.apply(settings)


def of(request: Request) -> State:
    """The state of the application that serves `request`."""
    state: State = request.app.state.nox
    return state
