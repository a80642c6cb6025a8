"""`GET /history` and `GET /history/{run_id}`."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator, BaseModel, Field

from nox_api import state
from nox_api.history.record import OUTCOMES, Outcome, first_id, is_run_id
from nox_api.history.recorder import HistoryUnavailableError
from nox_api.problem import ProblemError, responses
from nox_runner.protocol import Language

_END = "f" * 32


class Digest(BaseModel):
    """Stands for content that is not kept."""

    bytes: int
    sha256: str = Field(description="In hexadecimal")


class Output(Digest):
    """What the client was given of a stream."""

    truncated: bool


class PastRun(BaseModel):
    """What is kept of a run. Of environment variables that is the names alone."""

    run_id: str
    time: str = Field(description="When it was asked for; RFC 3339, UTC")
    language: Language
    status: Outcome = Field(description="cancelled: its client left before its end")
    exit_code: int | None
    signal: int | None
    duration_ms: int | None
    cpu_ms: int | None
    max_rss_bytes: int | None
    timeout: float = Field(description="Seconds that it might have taken")
    script: Digest
    args: list[str]
    env: list[str] = Field(description="Names of the variables it was given")
    stdin: Digest | None = Field(description="null if it had none")
    stdout: Output | None
    stderr: Output | None


class PastRunWithSource(PastRun):
    """The same, and its text."""

    source: str | None = Field(description="null if it is longer than 16 MiB")


class Page(BaseModel):
    """Runs, the latest first."""

    runs: list[PastRun]
    next: str | None = Field(description="Give this as `before` for the next page; null: no more")


def _run_id(text: str) -> str:
    if not is_run_id(text):
        raise ValueError("must be a run's id, 32 hexadecimal digits")
    return text


def _with_zone(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


RunId = Annotated[str, AfterValidator(_run_id)]
Time = Annotated[datetime, AfterValidator(_with_zone)]

router = APIRouter(tags=["history"], responses=responses(401, 409, 422, 503))


@router.get("/history", summary="List past runs")
async def list_history(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000, description="Runs on a page")] = 100,
    before: Annotated[RunId | None, Query(description="`next` of the page before")] = None,
    since: Annotated[Time | None, Query(description="Asked for then or later; RFC 3339")] = None,
    until: Annotated[Time | None, Query(description="Asked for before that")] = None,
    status: Annotated[Outcome | None, Query(description="One of: " + ", ".join(OUTCOMES))] = None,
) -> Page:
    """The runs that are remembered, the latest first. 409 if the history is off.

    A filtered page may hold fewer runs than asked for, or none, and still have a next one.
    """
    low = first_id(_ms(since)) if since else first_id(0)
    high = min(first_id(_ms(until)) if until else _END, before or _END)
    answer, _ = await _ask(request, "list", low=low, high=high, status=status, limit=limit)
    return Page.model_validate(answer)


@router.get("/history/{run_id}", responses=responses(404), summary="Read a past run")
async def get_history(request: Request, run_id: RunId) -> PastRunWithSource:
    """What is kept of a run, with its text. 404 if it is not known, or was forgotten."""
    answer, source = await _ask(request, "get", run_id=run_id)
    if answer["record"] is None:
        raise ProblemError(404, "The history knows no such run")
    text = source.decode("utf-8") if answer["has_script"] else None
    return PastRunWithSource.model_validate({**answer["record"], "source": text})


async def _ask(request: Request, operation: str, **fields: Any) -> tuple[dict[str, Any], bytes]:
    recorder = state.of(request).recorder
    if not recorder.on:
        raise ProblemError(409, "The history is off; NOX_HISTORY=on turns it on")
    try:
        return await recorder.ask(operation, **fields)
    except HistoryUnavailableError as error:
        detail = f"The history cannot be read: {error}"
        raise ProblemError(503, detail, headers={"Retry-After": "5"}) from None


def _ms(time: datetime) -> int:
    return round(time.timestamp() * 1000)
