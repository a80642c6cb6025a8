"""The HTTP contract."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from service import Service, resident, wait_for


def is_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert {"type", "title", "status", "detail", "instance"} <= set(problem)
    return problem


def raw(nox: Service, data: bytes, seconds: float = 10) -> bytes:
    """Send `data` as it is, and read until the server closes."""
    with socket.create_connection(("127.0.0.1", nox.port), seconds) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def test_health(nox: Service) -> None:
    response = httpx.get(f"{nox.url}/health")
    assert response.json() == {"status": "ok", "version": "0.1.0"}
    assert "server" not in response.headers and len(response.headers["x-request-id"]) == 32
    detail = nox.detail()
    assert detail["slots"] == {"used": 0, "total": 4} and detail["queue"]["total"] == 32
    limits = detail["limits"]
    assert "network" in limits["enforced"] and "system_calls" in limits["enforced"]
    assert ("tmp_size" in limits["enforced"]) != ("tmp_size" in limits["not_enforced"])
    assert nox.token not in json.dumps(detail)
    is_problem(httpx.get(f"{nox.url}/health", headers={"Authorization": "Bearer no"}), 401)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"Authorization", b"")],
        [(b"Authorization", b"Bearer")],
        [(b"Authorization", b"Bearer wrong")],
        [(b"Authorization", b"Basic TOKEN")],
        [(b"Authorization", b"TOKEN")],
        [(b"Authorization", b"Bearer TOKEN TOKEN")],
        [(b"Authorization", b"Bearer TOKENx")],
        [(b"Authorization", b"Bearer \xff\xc3\xa9")],
        [(b"Authorization", b"Bearer TOKEN"), (b"Authorization", b"Bearer TOKEN")],
        [(b"Authorization", b"Bearer wrong"), (b"Authorization", b"Bearer TOKEN")],
    ],
)
def test_unauthorized(nox: Service, headers: list[tuple[bytes, bytes]]) -> None:
    with_token = [(name, value.replace(b"TOKEN", nox.token.encode())) for name, value in headers]
    for path in ("/run_py", "/files", "/openapi.json", "/nowhere"):
        response = httpx.get(nox.url + path, headers=with_token)
        is_problem(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_scheme_is_case_insensitive(nox: Service) -> None:
    headers = {"Authorization": f"bEARER   {nox.token}"}
    assert httpx.get(f"{nox.url}/files", headers=headers).status_code == 200


def test_unknown_paths_and_methods(nox: Service) -> None:
    with nox.client() as client:
        is_problem(client.get("/nowhere"), 404)
        is_problem(client.get("/docs"), 404)
        is_problem(client.get("/run_py"), 405)
        is_problem(client.delete("/health"), 405)


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), -1, 0, 1e308, "5", True, [], 5.1])
def test_bad_timeouts(nox: Service, timeout: object) -> None:
    body = json.dumps({"code": "pass", "timeout": timeout})
    with nox.client() as client:
        headers = {"Content-Type": "application/json"}
        problem = is_problem(client.post("/run_py", content=body, headers=headers), 422)
    assert problem["errors"][0]["field"] == "body.timeout"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff", b'{"code": 1}', b"{}", b'{"code": "a\\u0000b"}',
        b'{"code": "\\ud800"}', b'{"code": "", "stdin": "\\udfff"}', b'{"code": "", "\\ud800": 1}',
        b'{"code": "", "env": {"\\ud800": ""}}', b'{"code": "", "env": {"A=B": ""}}',
        b'{"code": "", "env": {"": ""}}', b'{"code": "", "env": {"A": "\\u0000"}}',
        b'{"code": "", "env": {"A": 1}}', b'{"code": "", "env": {"NOX_RUN_ID": "x"}}',
        b'{"code": "", "args": "a"}', b'{"code": "", "args": [1]}', b'{"code": "", "args": null}',
        b'{"code": "", "args": ["\\u0000"]}', b'{"code": "", "files": 1}',
        b'{"code": "", "nope": 1}', b'{"code": "", "args": ["' + b"x" * 70_000 + b'"]}',
        b'{"code": "", "args": [' + b'"",' * 256 + b'""]}',
    ],
)  # fmt: skip
def test_bad_bodies(nox: Service, body: bytes) -> None:
    with nox.client() as client:
        headers = {"Content-Type": "application/json"}
        problem = is_problem(client.post("/run_py", content=body, headers=headers), 422)
    assert problem["errors"] and all(set(e) == {"field", "reason"} for e in problem["errors"])


def test_a_deeply_nested_body(nox: Service) -> None:
    with nox.client() as client:
        headers = {"Content-Type": "application/json"}
        response = client.post("/run_py", content=b"[" * 200_000, headers=headers)
    is_problem(response, 422)


def test_put_get_list_delete(nox: Service) -> None:
    content = bytes(range(256)) * 5000
    response = nox.put("dir/é.bin", content)
    assert response.status_code == 201
    digest = hashlib.sha256(content).hexdigest()
    assert response.json() == {"path": "dir/é.bin", "size": len(content), "sha256": digest}
    is_problem(nox.put("dir/é.bin", b"other"), 409)
    with nox.client() as client:
        got = client.get("/files/dir/é.bin")
        assert got.content == content and got.headers["content-length"] == str(len(content))
        listed = client.get("/files").json()
        assert {"dir/é.bin"} <= {file["path"] for file in listed["files"]}
        assert not listed["truncated"] and listed["files"][0]["mtime"].endswith("Z")
        assert nox.put("dir/é.bin", b"other", overwrite="true").status_code == 201
        assert client.get("/files/dir/é.bin").content == b"other"
        is_problem(client.delete("/files/dir"), 409)
        assert client.delete("/files/dir/é.bin").status_code == 204
        assert client.delete("/files/dir").status_code == 204
        is_problem(client.get("/files/dir/é.bin"), 404)
        is_problem(client.delete("/files/dir"), 404)


def test_put_by_the_files_own_name(nox: Service) -> None:
    with nox.client() as client:
        response = client.post("/put", files={"file": ("own.txt", b"")})
        assert response.json()["path"] == "own.txt" and response.json()["size"] == 0
        assert client.delete("/files/own.txt").status_code == 204


def test_a_put_file_is_seen_by_a_run(nox: Service) -> None:
    nox.put("seen.txt", b"content")
    assert nox.shell("cat seen.txt && rm seen.txt")["stdout"] == "content"


BAD_PATHS = [
    "../../etc/x", "/etc/x", "a/../../x", "..", ".", "x" * 300, "a//b", "a\nb", "../sandbox-evil/x",
    ".nox-put-1", "a/" * 600 + "x",
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_that_would_leave(nox: Service, path: str) -> None:
    is_problem(nox.put(path, b"evil"), 422)
    assert not (nox.sandbox.parent / "sandbox-evil").exists()
    encoded = "".join(f"%{byte:02x}" for byte in path.encode())
    with nox.client() as client:
        # The router itself matches no newline.
        expected = 404 if "\n" in path else 422
        is_problem(client.get(f"/files/{encoded}"), expected)
        is_problem(client.delete(f"/files/{encoded}"), expected)


@pytest.mark.parametrize("path", ["..%2fx", "%2e%2e/x", "%ff", "a%00b", ""])
def test_encoded_paths(nox: Service, path: str) -> None:
    request = f"GET /files/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {nox.token}\r\n"
    answer = raw(nox, request.encode() + b"Connection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 422 ")


def test_forms_that_are_none(nox: Service) -> None:
    with nox.client() as client:
        is_problem(client.post("/put", content=b"x"), 422)
        is_problem(client.post("/put", files={"other": ("f", b"x")}), 422)
        is_problem(client.post("/put", files={"file": ("", b"x")}), 422)
        two = [("file", ("a", b"x")), ("file", ("b", b"x"))]
        is_problem(client.post("/put", files=two), 422)
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        is_problem(client.post("/put", content=b"nonsense", headers=headers), 422)
    is_problem(nox.put("f", b"x", overwrite="maybe"), 422)


def test_a_declared_body_over_the_limit(nox: Service) -> None:
    with nox.client() as client:
        response = client.post("/put", files={"file": ("big", b"x" * (17 << 20))})
    is_problem(response, 413)
    assert "connection" not in response.headers  # the body was read to its end first


def test_a_declared_body_beyond_what_is_read_and_dropped(nox: Service) -> None:
    answer = raw(
        nox,
        f"""POST /run_py HTTP/1.1
Host: nox
Authorization: Bearer {nox.token}
Content-Type: application/json
Content-Length: {1 << 40}

""".replace("\n", "\r\n").encode()
        + bytes(64 << 20),
    )
    assert b" 413 " in answer.splitlines()[0]
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("path", ["/put", "/run_py"])
def test_an_undeclared_body_over_the_limit(nox: Service, path: str) -> None:
    assert nox.front is not None
    before = resident(nox.front.pid)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="big"\r\n\r\n'

    def content() -> Any:
        yield head if path == "/put" else b'{"code": "'
        for _ in range(300):
            yield b"x" * 65536

    types = {"/put": "multipart/form-data; boundary=b", "/run_py": "application/json"}
    with nox.client() as client:
        headers = {"Content-Type": types[path]}
        is_problem(client.post(path, content=content(), headers=headers), 413)
    assert not [name for name in nox.sandbox.iterdir() if "big" in name.name or "put" in name.name]
    assert resident(nox.front.pid) - before < 64 << 20
    with nox.client() as client:
        assert client.get("/health").status_code == 200


def test_openapi(nox: Service) -> None:
    with nox.client() as client:
        document = client.get("/openapi.json").json()
    responses = document["paths"]["/run_py"]["post"]["responses"]
    assert {"200", "401", "413", "422", "429", "503"} <= set(responses)
    assert "409" in document["paths"]["/put"]["post"]["responses"]
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                if status >= "400":
                    content = response["content"]["application/problem+json"]
                    assert content["schema"]["$ref"] == "#/components/schemas/Problem"
    assert {"Problem", "InvalidField"} <= set(document["components"]["schemas"])
    assert document["security"] == [{"bearer": []}]


def test_the_log_tells_requests_and_no_secret(nox: Service) -> None:
    headers = {"X-Forwarded-For": "9.9.9.9, 203.0.113.7"}
    with nox.client() as client:
        body = {"code": "print('s3cr3t-code')", "env": {"E": "s3cr3t-env"}, "stdin": "s3cr3t-in"}
        answer = client.post("/run_py", json=body, headers=headers)
        wrong = {"Authorization": f"Bearer {nox.token}x"}
        client.get("/files?token=s3cr3t-query", headers=wrong)
    time.sleep(0.1)
    text = nox.front_log() + nox.runner_log() + (nox.logs / "error.log").read_text()
    assert nox.token not in text and "s3cr3t" not in text
    lines = [json.loads(line) for line in nox.front_log().splitlines()]
    found = [x for x in lines if x.get("request_id") == answer.headers["x-request-id"]]
    assert len(found) == 1
    line = found[0]
    assert (line["client"], line["status"], line["path"]) == ("203.0.113.7", 200, "/run_py")
    assert line["run_id"] == answer.json()["run_id"] and line["run_status"] == "ok"
    assert line["time"].endswith("Z") and len(line["time"]) == 24
    assert (nox.logs / "nox-api.log").stat().st_mode & 0o777 == 0o640


def test_a_client_that_leaves_in_the_middle_of_a_body(nox: Service) -> None:
    errors = (nox.logs / "error.log").read_text()
    for path, kind in (
        ("/run_py", "application/json"),
        ("/put", "multipart/form-data; boundary=b"),
    ):
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {nox.token}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: 1000\r\n\r\n--b"
        )
        with socket.create_connection(("127.0.0.1", nox.port)) as connection:
            connection.sendall(head.encode())
        wait_for(lambda path=path: f'"path": "{path}", "status": 499' in nox.front_log(), "the log")
    assert (nox.logs / "error.log").read_text() == errors


def test_a_head_without_end(nox: Service) -> None:
    """Refused while it comes, and before anybody has shown a token."""
    lines = b"X: y\r\n" * 100_000
    try:
        answer = raw(nox, b"GET /health HTTP/1.1\r\nHost: x\r\n" + lines)
    except (BrokenPipeError, ConnectionResetError):
        answer = b"HTTP/1.1 431 "  # it was still being sent
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert nox.python("print(1)")["stdout"] == "1\n"


def test_a_large_body_after_a_small_head(nox: Service) -> None:
    assert nox.python("print(1)  #" + "x" * 1_000_000)["stdout"] == "1\n"


def test_a_file_that_a_run_holds_a_lease_on(nox: Service) -> None:
    hold = (
        "import fcntl, os, time\nf = os.open('leased', os.O_RDWR | os.O_CREAT)\n"
        "fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK)\nopen('held', 'w').close()\ntime.sleep(9)"
    )
    with ThreadPoolExecutor(1) as pool, nox.client() as client:
        run = pool.submit(nox.python, hold, timeout=5)
        wait_for(lambda: client.get("/files/held").status_code == 200, "the lease")
        assert client.get("/files/leased").status_code == 403
        run.result()
        for name in ("leased", "held"):
            assert client.delete(f"/files/{name}").status_code == 204
