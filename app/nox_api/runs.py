"""`POST /run_py` and `POST /run_sh`."""

from __future__ import annotations

import asyncio
import json
import re
import typing
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from nox_api import access, shell_policy, state
from nox_api.failures import as_problems
from nox_api.history.record import new_run_id
from nox_api.history.recorder import FinishedRun
from nox_api.problem import ProblemError, invalid, responses
from nox_api.slots import QueueFullError
from nox_runner import protocol

MAX_ARGS = 256
MAX_ENV = 128
MAX_WORDS = 64 << 10
"""Bytes of all args, and of all env names and values: the kernel's limit is near 2 MiB."""

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
Result = TypeVar("Result")


def _text(text: str) -> str:
    # Lone surrogates pass the JSON parser, but are no text.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    return text


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    return _text(text)


def _small(words: list[str]) -> list[str]:
    if sum(len(word.encode("utf-8")) + 1 for word in words) > MAX_WORDS:
        raise ValueError(f"must not be longer than {MAX_WORDS} bytes together")
    return words


def _environment(env: dict[str, str]) -> dict[str, str]:
    for name in env:
        if not _ENV_NAME.fullmatch(name) or name.startswith("NOX_"):
            raise ValueError(
                "names are letters, digits and underscores, do not start with a digit or NOX_"
            )
    _small([*env, *env.values()])
    return env


Text = Annotated[str, AfterValidator(_text)]
Word = Annotated[str, AfterValidator(_no_nul)]


class _Program(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    stdin: Text | None = Field(default=None, description="Standard input; without it /dev/null")
    args: Annotated[list[Word], AfterValidator(_small)] = Field(
        default=[], max_length=MAX_ARGS, description="sys.argv[1:], or $1 and on"
    )
    env: Annotated[dict[str, Word], AfterValidator(_environment)] = Field(
        default={}, max_length=MAX_ENV, description="Added to the environment"
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds; NOX_TIMEOUT is the default and the most",
    )
    files: bool = Field(default=False, description="Tell which files the run created or changed")


class RunPython(_Program):
    """A Python program."""

    code: Word = Field(description="Its text")


class RunShell(_Program):
    """A shell script."""

    cmd: Word = Field(description="Its text, for /bin/sh")


class ChangedFile(BaseModel):
    """A file that a run created or changed."""

    path: str
    size: int = Field(description="Bytes")


class RunResult(BaseModel):
    """What became of a run, whatever it was."""

    run_id: str
    status: Literal["ok", "error", "timeout", "memory_limit", "output_limit", "sandbox_error"] = (
        Field(
            description="output_limit: of a stream, or of the sandbox's quota, as stderr says then"
        )
    )
    exit_code: int | None = Field(description="null if it died of a signal or was killed")
    signal: int | None = Field(
        description="What it died of. Exit codes 129 to 159 that a shell uses for signals are"
        " read as such"
    )
    stdout: str = Field(description="UTF-8, with replacement characters for what is not")
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool
    duration_ms: int
    cpu_ms: int = Field(description="Of all its processes, and of the sandbox's set-up")
    max_rss_bytes: int = Field(description="Of its largest process")
    files: list[ChangedFile] | None = Field(
        default=None,
        description="If asked for: at most 1000 regular files that changed while the run lasted;"
        " the sandbox is shared, so another run may have changed them",
    )


class _Route(APIRoute):
    """Hands the program to its endpoint, and its response on, without FastAPI's own ways there.

    What FastAPI does for any endpoint (dependencies, a second validation of the result) takes
    longer than all else that happens here for a hello world.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        kind: type[_Program] = typing.get_type_hints(self.endpoint)["program"]

        async def handle(request: Request) -> Response:
            response: Response = await self.endpoint(request, await _read(request, kind))
            return response

        return handle


async def _read(request: Request, kind: type[_Program]) -> _Program:
    """The program in the request's body; a 422 if there is none."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise invalid("body", "must be JSON, with the Content-Type application/json")
    try:
        document = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise invalid("body", "cannot be parsed as JSON") from None
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        errors = [{**each, "loc": ("body", *each["loc"])} for each in found]
        raise RequestValidationError(errors) from None


router = APIRouter(
    tags=["runs"], route_class=_Route, responses=responses(401, 413, 422, 429, 503, 507)
)


@router.post("/run_py", response_model=RunResult, summary="Run a Python program")
async def run_py(request: Request, program: RunPython) -> Response:
    """Run it by the host's python3 in a fresh sandbox; 200 whatever became of it."""
    return await _run(request, "python", program.code, program)


@router.post(
    "/run_sh",
    response_model=RunResult,
    responses=responses(403),
    summary="Run a shell script",
)
async def run_sh(request: Request, program: RunShell) -> Response:
    """Run it by the host's /bin/sh in a fresh sandbox; 200 whatever became of it.

    403 if it plainly destroys; the problem's member `rule` names the rule.
    """
    if state.of(request).settings.shell_policy:
        _obey(request, program)
    return await _run(request, "sh", program.cmd, program)


def _obey(request: Request, program: RunShell) -> None:
    refusal = shell_policy.examine(program.cmd, program.args, program.env)
    if refusal is None:
        return
    state.of(request).metrics.refused("policy")
    access.note(request.scope, refused=refusal.rule)
    detail = f"Refused by the rule {refusal.rule}: it {refusal.detail} (NOX_SHELL_POLICY=on)"
    raise ProblemError(403, detail, extra={"rule": refusal.rule})


async def _run(
    request: Request, language: protocol.Language, source: str, program: _Program
) -> Response:
    nox = state.of(request)
    longest = nox.settings.timeout
    if program.timeout is not None and program.timeout > longest:
        raise invalid("body.timeout", f"must not be more than {longest:g} seconds")
    run = protocol.Run(
        run_id=new_run_id(),
        language=language,
        args=program.args,
        env=program.env,
        timeout=program.timeout or longest,
        stdin=program.stdin is not None,
        files=program.files,
    )
    access.note(request.scope, run_id=run.run_id)

    content, stdin = source.encode(), (program.stdin or "").encode()

    async def take_turn() -> tuple[protocol.RunReply, bytes, bytes]:
        async with nox.slots.one():
            return await nox.runner.run(run, content, stdin)

    try:
        with as_problems():
            reply, stdout, stderr = await _while_connected(request, take_turn())
    except ClientDisconnect:
        nox.metrics.run(language, "cancelled")
        nox.recorder.record(FinishedRun(run, content, stdin))
        raise
    except QueueFullError as full:
        nox.metrics.refused("queue_full")
        headers = {"Retry-After": str(full.retry_after)}
        raise ProblemError(429, "All slots and the queue are full", headers=headers) from None
    access.note(request.scope, run_status=reply.status)
    nox.metrics.run(language, reply.status, reply.duration_ms)
    nox.recorder.record(FinishedRun(run, content, stdin, reply, stdout, stderr))
    result = RunResult(
        run_id=run.run_id,
        status=reply.status,
        exit_code=reply.exit_code,
        signal=reply.signal,
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        stdout_truncated=reply.stdout_truncated,
        stderr_truncated=reply.stderr_truncated,
        duration_ms=reply.duration_ms,
        cpu_ms=reply.cpu_ms,
        max_rss_bytes=reply.max_rss_bytes,
    )
    if reply.files is not None:
        result.files = [ChangedFile(path=file.path, size=file.size) for file in reply.files]
    return Response(result.model_dump_json(exclude_unset=True), media_type="application/json")


async def _while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Await `work`, cancelling it when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    leaving.add_done_callback(lambda _: working.cancel())
    try:
        return await working
    except asyncio.CancelledError:
        if leaving.done():
            access.note(request.scope, run_status="cancelled")
            raise ClientDisconnect from None
        raise
    finally:
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
