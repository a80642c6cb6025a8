"""What the OpenAPI document promises, against requests made from it, and spoiled ones; and the
runner's socket under nonsense.

Whatever comes, the answer is a documented one, never a 5xx, and the service lives on.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service import Service

from nox_runner import protocol

EXAMPLES = 40
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def small(possible: None) -> Iterator[Service]:
    """A service whose runs are cut short: what is generated may be a program."""
    service = Service(NOX_TIMEOUT=1)
    try:
        yield service.start()
    finally:
        service.stop()


@pytest.fixture(scope="module")
def client(small: Service) -> Iterator[httpx.Client]:
    with small.client() as found:
        yield found


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def of_schema(document: dict[str, Any], schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a JSON schema, as far as the document goes."""
    if "$ref" in schema:
        return of_schema(document, document["components"]["schemas"][schema["$ref"].split("/")[-1]])
    if "anyOf" in schema:
        return st.one_of([of_schema(document, each) for each in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "object":
        known = schema.get("properties", {})
        required = {name: of_schema(document, known[name]) for name in schema.get("required", ())}
        others = {name: of_schema(document, known[name]) for name in known if name not in required}
        if not known:
            return st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4)
        return st.fixed_dictionaries(required, optional=others)
    if kind == "array":
        return st.lists(of_schema(document, schema["items"]), max_size=4)
    simple: dict[str, st.SearchStrategy[Any]] = {
        "string": st.text(max_size=40),
        "number": st.floats(0, 2, exclude_min=True),
        "integer": st.integers(),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return simple[kind] if isinstance(kind, str) else JSON


def is_kept(document: dict[str, Any], path: str, method: str, answer: httpx.Response) -> None:
    promised = document["paths"][path][method]["responses"]
    assert str(answer.status_code) in promised, (path, method, answer.status_code, answer.text)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("path", ["/run_py", "/run_sh"])
def test_runs_keep_the_contract(client: httpx.Client, document: dict[str, Any], path: str) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]
    right = of_schema(document, content["application/json"]["schema"])
    spoiled = st.builds(lambda a, b: {**a, **b}, right, st.dictionaries(st.text(max_size=8), JSON))

    @FUZZ
    @given(right | spoiled | JSON)
    def attempt(body: Any) -> None:
        try:
            text = json.dumps(body).encode()
        except UnicodeEncodeError:
            return
        answer = client.post(path, content=text, headers={"Content-Type": "application/json"})
        is_kept(document, path, "post", answer)

    attempt()


@pytest.mark.parametrize("path", ["/run_py", "/run_sh"])
def test_any_body_of_any_type(client: httpx.Client, document: dict[str, Any], path: str) -> None:
    kinds = st.sampled_from(["application/json", "text/plain", "multipart/form-data", "", "a/b; c"])

    @FUZZ
    @given(st.binary(max_size=200), kinds)
    def attempt(body: bytes, kind: str) -> None:
        answer = client.post(path, content=body, headers={"Content-Type": kind})
        is_kept(document, path, "post", answer)

    attempt()


def test_files_keep_the_contract(client: httpx.Client, document: dict[str, Any]) -> None:
    names = st.text(max_size=30) | st.sampled_from(["..", ".", "a/../b", "/etc/passwd", "a" * 300])

    @FUZZ
    @given(names, st.binary(max_size=100), st.sampled_from(["true", "false", "maybe", ""]))
    def attempt(name: str, content: bytes, overwrite: str) -> None:
        try:
            encoded = "".join(f"%{byte:02x}" for byte in name.encode())
        except UnicodeEncodeError:
            return
        form = {"path": name, "overwrite": overwrite}
        put = client.post("/put", files={"file": ("f", content)}, data=form)
        is_kept(document, "/put", "post", put)
        if not encoded:
            return
        for method in ("get", "delete"):
            answer = client.request(method, f"/files/{encoded}")
            # What the router does not take for a path of its own is nowhere.
            if answer.status_code != 404:
                is_kept(document, "/files/{path}", method, answer)

    attempt()


def connected(nox: Service) -> socket.socket:
    """A connection to the runner itself, as its own user."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    before = os.geteuid()
    if before == 0:
        os.seteuid(nox.socket.stat().st_uid)
    try:
        connection.connect(str(nox.socket))
    finally:
        os.seteuid(before)
    return connection


def frames() -> st.SearchStrategy[bytes]:
    run = protocol.encode_request(protocol.Run("id", "sh", [], {}, 0.5, False, False))
    put = protocol.encode_request(protocol.Put("fuzz", True))
    whole = run + b"".join(protocol.stream(b"echo 1")) + protocol.END
    starts = st.sampled_from([b"", run, put, whole, protocol.encode_request(protocol.List())])
    cut = st.builds(lambda data, end: data[: end % (len(data) + 1)], starts, st.integers(0))
    return st.builds(lambda a, b, c: a + b + c, cut, st.binary(max_size=60), starts)


def test_the_runner_under_nonsense(small: Service) -> None:
    @FUZZ
    @given(frames())
    def attempt(data: bytes) -> None:
        with connected(small) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                return

    attempt()
    assert "internal_error" not in small.runner_log()
    assert small.python("print(6 * 7)")["stdout"] == "42\n"
