"""`GET /health`."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from nox_api import __version__, state
from nox_api.auth import is_authenticated
from nox_api.problem import ProblemError, responses
from nox_api.runner import RunnerClient, RunnerUnavailableError
from nox_runner.protocol import Failure, HealthReply

_ANSWER_SECONDS = 2.0
_FRESH_SECONDS = 1.0


class Used(BaseModel):
    """How much of something is in use."""

    used: int
    total: int


class RunnerHealth(BaseModel):
    """The runner and its sandbox."""

    backend: str
    version: str


class SandboxUsage(BaseModel):
    """What the sandbox holds, and its quota; files, directories and links count alike."""

    bytes: int
    files: int
    quota_bytes: int
    quota_files: int


class PublicSettings(BaseModel):
    """The settings, without secrets. Sizes in bytes, times in seconds."""

    sandbox: str
    timeout: float
    max_body: int
    output_limit: int
    memory: int
    pids: int
    file_size: int
    tmp_size: int
    quota_bytes: int
    quota_files: int
    keep_days: int
    shell_policy: bool
    history: bool
    history_days: int
    history_size: int
    network: bool
    log_level: str


class HistoryHealth(BaseModel):
    """What became of the runs since the start of the front; absent while the history is off."""

    recorded: int
    dropped: int = Field(description="Not recorded: the queue was full, or the writer failed")
    bytes: int = Field(description="On disk")
    failed: str | None = Field(default=None, description="Why nothing is recorded now")


class Limits(BaseModel):
    """By name what holds, and how; and what does not, and why."""

    enforced: dict[str, str]
    not_enforced: dict[str, str]


class Health(BaseModel):
    """All but status and version is told to those with the token only."""

    status: Literal["ok"]
    version: str
    runner: RunnerHealth | None = None
    limits: Limits | None = None
    slots: Used | None = None
    queue: Used | None = None
    sandbox: SandboxUsage | None = None
    history: HistoryHealth | None = None
    settings: PublicSettings | None = None


class RunnerHealthCheck:
    """Asks the runner, once a second at most however many ask at the same time."""

    def __init__(self, runner: RunnerClient) -> None:
        self._runner = runner
        self._asked = float("-inf")
        self._answer: asyncio.Task[HealthReply | str] | None = None

    async def ask(self) -> HealthReply | str:
        """The runner's health, or why there is none."""
        answer = self._answer
        if answer is None or (answer.done() and time.monotonic() - self._asked > _FRESH_SECONDS):
            self._asked = time.monotonic()
            answer = self._answer = asyncio.ensure_future(self._ask())
        # One who leaves must not cancel it for the others.
        return await asyncio.shield(answer)

    async def _ask(self) -> HealthReply | str:
        try:
            return await self._runner.health(_ANSWER_SECONDS)
        except (RunnerUnavailableError, Failure) as error:
            return str(error)


router = APIRouter(tags=["health"], responses=responses(401, 503))


@router.get("/health", response_model_exclude_none=True, summary="Whether runs are possible")
async def health(request: Request) -> Health:
    """Status and version; with the token all that an operator wants to know."""
    nox = state.of(request)
    check: RunnerHealthCheck = request.app.state.runner_health
    runner = await check.ask()
    trusted = is_authenticated(request.scope)
    if isinstance(runner, str) or not runner.able:
        reason = runner if isinstance(runner, str) else runner.reason
        detail = f"Runs are not possible: {reason}" if trusted else "Runs are not possible"
        raise ProblemError(
            503, detail, headers={"Retry-After": "2"}, extra={"version": __version__}
        )
    if not trusted:
        return Health(status="ok", version=__version__)
    return Health(
        status="ok",
        version=__version__,
        runner=RunnerHealth(backend=runner.backend, version=runner.version),
        limits=Limits(enforced=runner.enforced, not_enforced=runner.not_enforced),
        slots=Used(used=nox.slots.used, total=nox.slots.total),
        queue=Used(used=nox.slots.queued, total=nox.slots.queue),
        sandbox=SandboxUsage.model_validate(runner.sandbox, from_attributes=True),
        history=_history(nox),
        settings=PublicSettings.model_validate(nox.settings, from_attributes=True),
    )


def _history(nox: state.State) -> HistoryHealth | None:
    recorder = nox.recorder
    if not recorder.on:
        return None
    return HistoryHealth(
        recorded=recorder.recorded,
        dropped=recorder.dropped,
        bytes=recorder.bytes,
        failed=recorder.failed or None,
    )
