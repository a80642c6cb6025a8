"""`POST /put`, `GET /files`, `GET /files/{path}`, `DELETE /files/{path}`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timezone
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.datastructures import FormData, UploadFile
from starlette.types import Receive, Scope, Send

from nox_api import state
from nox_api.failures import as_problems
from nox_api.problem import invalid, responses
from nox_runner import paths, protocol

_PREFIX = b"/files/"
_MAX_FIELD = 16 << 10


class StoredFile(BaseModel):
    """A file that was stored."""

    path: str
    size: int = Field(description="Bytes")
    sha256: str = Field(description="Of what was sent, in hexadecimal")


class ListedFile(BaseModel):
    """A regular file of the sandbox."""

    path: str
    size: int = Field(description="Bytes")
    mtime: str = Field(description="RFC 3339, UTC")


class Listing(BaseModel):
    """The sandbox's regular files, sorted by path."""

    files: list[ListedFile]
    truncated: bool = Field(description="There are more, or some could not be read")


_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "path": {"type": "string", "description": "Default: the file's own name"},
                        "overwrite": {"type": "boolean", "default": False},
                    },
                }
            }
        },
    }
}

router = APIRouter(tags=["files"], responses=responses(401, 403, 422, 503))


@router.post(
    "/put",
    status_code=201,
    responses=responses(409, 413, 507),
    openapi_extra=_FORM,
    summary="Store a file",
)
async def put(request: Request) -> StoredFile:
    """Store a file in the sandbox, whole or not at all; directories are made as needed.

    409 if the name is taken (with overwrite: by something that is not a regular file), 507 if
    the disk or the quota is full.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise invalid("body", "must be multipart/form-data with a part named file")
    async with request.form(max_files=1, max_fields=2, max_part_size=_MAX_FIELD) as form:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise invalid("body.file", "is required, with a file name")
        path = _field(form, "path")
        path = (upload.filename or "") if path is None else path
        overwrite = _flag(form, "overwrite")
        _check(path)
        nox = state.of(request)
        async with nox.files:
            with as_problems():
                stored = await nox.runner.put(path, overwrite, _chunks(upload))
    return StoredFile(path=stored.path, size=stored.size, sha256=stored.sha256)


@router.get("/files", summary="List the files")
async def list_files(request: Request) -> Listing:
    """List the sandbox's regular files, 10 000 at most. Links are not listed."""
    nox = state.of(request)
    async with nox.files:
        with as_problems():
            found = await nox.runner.list()
    files = [
        ListedFile(path=file.path, size=file.size, mtime=_rfc3339(file.mtime))
        for file in found.files
    ]
    return Listing(files=files, truncated=found.truncated)


@router.get(
    "/files/{path:path}",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The content"},
        **responses(404, 409),
    },
    summary="Read a file",
)
async def get_file(request: Request, path: str) -> Response:
    """Read a regular file. 409 if the path names, or leads through, a link or special file."""
    exact = _exact_path(request)
    _check(exact)
    return _Download(state.of(request), exact)


@router.delete(
    "/files/{path:path}",
    status_code=204,
    response_class=Response,
    responses=responses(404, 409),
    summary="Remove a file",
)
async def delete_file(request: Request, path: str) -> None:
    """Remove a file, a link itself, or an empty directory; 409 if that is not empty.

    A name that is not UTF-8 is given as the listing shows it.
    """
    exact = _exact_path(request)
    _check(exact)
    nox = state.of(request)
    async with nox.files:
        with as_problems():
            await nox.runner.delete(exact)


class _Download(Response):
    """Streams a file; what goes wrong before its first byte is a problem like any other."""

    def __init__(self, nox: state.State, path: str) -> None:
        super().__init__()
        self._nox = nox
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._nox.files:
            with as_problems():
                async with self._nox.runner.get(self._path) as (file, content):
                    headers = {
                        "content-length": str(file.size),
                        # A file of the sandbox is nothing for a browser to interpret.
                        "content-type": "application/octet-stream",
                        "content-disposition": "attachment",
                        "x-content-type-options": "nosniff",
                        "last-modified": _http_date(file.mtime),
                    }
                    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
                    await send({"type": "http.response.start", "status": 200, "headers": raw})
                    async for chunk in content:
                        body = {"type": "http.response.body", "body": chunk, "more_body": True}
                        await send(body)
                    await send({"type": "http.response.body", "body": b""})


def _exact_path(request: Request) -> str:
    """The path after /files/; the server's own decoding would hide bytes that are not UTF-8."""
    raw: bytes = request.scope["raw_path"]
    try:
        return unquote_to_bytes(raw[len(_PREFIX) :]).decode("utf-8")
    except UnicodeDecodeError:
        raise invalid("path", "must be UTF-8") from None


def _check(path: str) -> None:
    """Refuse at once what the runner would; it checks again for itself."""
    try:
        paths.components(path)
    except paths.PathError as error:
        raise invalid("path", str(error)) from None


def _field(form: FormData, name: str) -> str | None:
    value = form.get(name)
    if value is not None and not isinstance(value, str):
        raise invalid(f"body.{name}", "must be text, not a file")
    return value


def _flag(form: FormData, name: str) -> bool:
    value = (_field(form, name) or "false").lower()
    if value not in ("true", "false"):
        raise invalid(f"body.{name}", "must be true or false")
    return value == "true"


async def _chunks(upload: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await upload.read(protocol.CHUNK):
        yield chunk


def _rfc3339(timestamp: float) -> str:
    time = _time(timestamp)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _http_date(timestamp: float) -> str:
    return _time(timestamp).strftime("%a, %d %b %Y %H:%M:%S GMT")


def _time(timestamp: float) -> datetime:
    try:
        return datetime.fromtimestamp(timestamp, timezone.utc)
    except (OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(0, timezone.utc)  # runs may set any time on a file
