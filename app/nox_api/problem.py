"""Errors as `application/problem+json` (RFC 9457)."""

from __future__ import annotations

import http
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

CLIENT_GONE = 499
"""Logged as the status of a request whose client left before its answer; never seen by one."""
MEDIA_TYPE = "application/problem+json"


class InvalidField(BaseModel):
    """One field of the request that is not accepted."""

    field: str = Field(description="Where it is, such as body.timeout")
    reason: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = Field(description="about:blank: the status says it all")
    title: str = Field(description="The status in words")
    status: int = Field(description="The HTTP status code")
    detail: str = Field(description="What went wrong in this case")
    instance: str = Field(description="The path of the request")
    rule: str | None = Field(default=None, description="With 403 of /run_sh: the rule it breaks")
    errors: list[InvalidField] | None = Field(default=None, description="With 422: each bad field")


class ProblemError(HTTPException):
    """Answers the request with a problem; `extra` are members beside the standard ones."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.extra = dict(extra or {})


def response(
    status: int,
    detail: str,
    instance: str,
    headers: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Response:
    """The problem as a response."""
    content = {
        "type": "about:blank",
        "title": _title(status),
        "status": status,
        "detail": detail,
        "instance": instance,
        **(extra or {}),
    }
    return JSONResponse(content, status, dict(headers or {}), MEDIA_TYPE)


def _title(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:  # a status of our own, for the log
        return "Unknown"


def invalid(field: str, reason: str) -> ProblemError:
    """A 422 for one field."""
    errors = [InvalidField(field=field, reason=reason).model_dump()]
    return ProblemError(422, f"{field}: {reason}", extra={"errors": errors})


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem: those of routing and validation too."""
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ClientDisconnect):
        return await _on_disconnect(request, error)
    if error.status_code == 400:
        # FastAPI's and Starlette's own, for a body that cannot be parsed.
        error = invalid("body", "cannot be parsed")
    extra = error.extra if isinstance(error, ProblemError) else None
    return response(error.status_code, error.detail, request.scope["path"], error.headers, extra)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # The rejected input itself is not repeated: it may be secret, and need not be valid Unicode.
    errors = [
        {
            "field": ".".join(map(_printable, found["loc"])),
            "reason": found["msg"].removeprefix("Value error, "),
        }
        for found in error.errors()
    ]
    detail = "; ".join(f"{found['field']}: {found['reason']}" for found in errors[:5])
    return response(422, detail, request.scope["path"], extra={"errors": errors})


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return response(CLIENT_GONE, "The client left", request.scope["path"])


async def _on_error(request: Request, error: Exception) -> Response:
    # It is raised again after this, for the server to log it with its traceback.
    return response(500, "An error inside Nox; its log has more", request.scope["path"])


def _printable(part: object) -> str:
    return str(part).encode("utf-8", "replace").decode("utf-8")


def schemas() -> dict[str, Any]:
    """The schemas that `responses` refers to, for OpenAPI's components."""
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs"), "Problem": schema}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of `statuses` for OpenAPI, each a Problem."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": http.HTTPStatus(status).phrase, "content": content}
        for status in statuses
    }
