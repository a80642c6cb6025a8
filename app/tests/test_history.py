from __future__ import annotations

import hashlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from service import APP, Service, environment, running, wait_for

from nox_api.history import prose
from nox_api.history.record import Outcome, Record, first_id, message, milliseconds, new_run_id
from nox_api.history.repository import Repository, RepositoryError
from nox_runner import protocol

SIZE = 64 << 20


def make(
    script: bytes = b"print(1)\n", status: Outcome = "ok", run_id: str = "", **fields: Any
) -> prose.Run:
    run_id = run_id or new_run_id()
    empty = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    record: dict[str, Any] = {
        "run_id": run_id, "time": "2026-11-23T02:08:15.123Z", "language": "python",
        "status": status, "exit_code": 0, "signal": None, "duration_ms": 48, "cpu_ms": 9,
        "max_rss_bytes": 8 << 20, "timeout": 20.0, "args": [], "env": [], "stdin": None,
        "script": {"bytes": len(script), "sha256": hashlib.sha256(script).hexdigest()},
        "stdout": {**empty, "truncated": False}, "stderr": {**empty, "truncated": False}, **fields,
    }  # fmt: skip
    return record, script  # type: ignore[return-value]


def at(moment: float) -> str:
    return first_id(int(moment * 1000))[:16] + secrets.token_hex(8)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Repository]]:
    made: list[Repository] = []

    def open_it(days: int = 0, size: int = SIZE) -> Repository:
        while made:
            made.pop().close()
        made.append(Repository(str(tmp_path / "history"), days, size))
        return made[-1]

    yield open_it
    while made:
        made.pop().close()


def git(path: Path, *words: str) -> str:
    """Plain Git, as the owner; on this machine only to check what was written without it."""
    if shutil.which("git") is None:
        print("git is not installed: what it would say of the repository is not checked")
        pytest.skip("git is not installed")
    command = ["git", "-c", f"safe.directory={path}", "-C", str(path), *words]
    home = {"HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_ids_sort_by_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = []
    for _ in range(5):
        ids.append(new_run_id())
        time.sleep(0.002)
    assert ids == sorted(ids) and len(set(ids)) == 5
    assert before <= milliseconds(ids[0]) <= time.time_ns() // 1_000_000
    assert all(re.fullmatch(r"[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", one) for one in ids)


def test_what_is_added_is_found(opened: Callable[..., Repository], tmp_path: Path) -> None:
    history = opened()
    runs = [make(b"print(%d)\n" % number) for number in range(3)]
    history.add(runs[:1])
    history.add(runs[1:])
    for history_then in (history, opened()):
        for record, script in runs:
            assert history_then.get(record["run_id"]) == (record, script)
        assert history_then.get(new_run_id()) is None
        found = history_then.page(first_id(0), "f" * 32, None, 10)
        expected = sorted((record for record, _ in runs), key=lambda record: record["run_id"])
        assert found.runs == expected[::-1] and found.next is None
    assert "error" not in git(tmp_path / "history", "fsck", "--strict", "--full")
    assert git(tmp_path / "history", "log", "--oneline").count("\n") == 2
    names = git(tmp_path / "history", "ls-tree", "-r", "--name-only", "main").split()
    assert len(names) == 6
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d/\d\d/\d\d/[0-9a-f]{32}\.(ok\.json|py)", name)
        for name in names
    )


def test_pages_and_filters(opened: Callable[..., Repository]) -> None:
    history = opened()
    now = time.time()
    outcomes: list[Outcome] = ["ok", "error", "timeout"]
    runs = [make(status=outcomes[n % 3], run_id=at(now - n * 40_000)) for n in range(30)]
    for start in range(0, 30, 7):
        history.add(runs[start : start + 7])
    ids = [record["run_id"] for record, _ in runs]

    def all_pages(low: str, high: str, status: str | None) -> list[str]:
        found: list[str] = []
        following: str | None = high
        while following is not None:
            page = history.page(low, following, status, 4)
            found += [record["run_id"] for record in page.runs]
            following = page.next
        return found

    assert all_pages(first_id(0), "f" * 32, None) == ids
    assert all_pages(first_id(0), "f" * 32, "error") == ids[1::3]
    since, until = (first_id(int((now - seconds) * 1000)) for seconds in (500_000, 100_000))
    expected = [one for one in ids if since <= one < until]
    assert 5 < len(expected) < 15
    assert all_pages(since, until, None) == expected
    assert all_pages(since, first_id(0), None) == []


def test_size_is_bounded(opened: Callable[..., Repository], tmp_path: Path) -> None:
    history = opened(size=2 << 20)
    runs = [make(random.randbytes(30_000)) for _ in range(200)]
    for number, run in enumerate(runs):
        history.add([run])
        if number % 50 == 49:
            history = opened(size=2 << 20)
        used = int(subprocess.check_output(["du", "-sk", tmp_path / "history"]).split()[0])
        assert used <= 2 << 10
    found = history.page(first_id(0), "f" * 32, None, 1000)
    kept = len(found.runs)
    assert 20 < kept < 100, "the latest runs are kept, others forgotten"
    assert [record["run_id"] for record in found.runs] == sorted(
        (record["run_id"] for record, _ in runs[-kept:]), reverse=True
    )
    assert history.get(runs[0][0]["run_id"]) is None
    assert history.get(runs[-kept][0]["run_id"]) == runs[-kept]
    assert "error" not in git(tmp_path / "history", "fsck", "--strict", "--full")
    log = git(tmp_path / "history", "log", "--format=%s")
    assert log.count("A Python program ended well") == kept
    assert "A new chapter begins" in log


def test_age_is_bounded(
    opened: Callable[..., Repository], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ahead = time.time, 0.0

    def clock() -> float:
        return real() + ahead

    monkeypatch.setattr("nox_api.history.repository.time.time", clock)
    history = opened(days=3)
    days = []
    for day in range(6):
        ahead = day * 86_400.0
        days.append(make(run_id=at(clock())))
        history.add([days[-1]])
    known = [history.get(record["run_id"]) is not None for record, _ in days]
    assert known == [False] * 2 + [True] * 4
    assert "error" not in git(tmp_path / "history", "fsck", "--strict", "--full")
    ahead += 20 * 86_400
    history.forget()
    assert history.page(first_id(0), "f" * 32, None, 10).runs == [], "without a new run, too"
    assert "error" not in git(tmp_path / "history", "fsck", "--strict", "--full")
    history.add([make()])
    assert len(history.page(first_id(0), "f" * 32, None, 10).runs) == 1


def test_packs_are_merged(opened: Callable[..., Repository], tmp_path: Path) -> None:
    history = opened()
    runs = [make(b"print(%d)\n" % number) for number in range(100)]
    for run in runs:
        history.add([run])
    packs = list((tmp_path / "history" / "objects" / "segments").glob("*/pack/*.pack"))
    assert len(packs) < 40
    assert all(history.get(record["run_id"]) == (record, script) for record, script in runs)
    assert "error" not in git(tmp_path / "history", "fsck", "--strict", "--full")
    assert git(tmp_path / "history", "log", "--oneline").count("\n") == 100


def test_a_damaged_history_is_told_and_left_alone(
    opened: Callable[..., Repository], tmp_path: Path
) -> None:
    opened().add([make()])
    opened().add([make()])
    branch = tmp_path / "history" / "refs" / "heads" / "main"
    branch.write_text("0123456789" * 4 + "\n")
    with pytest.raises(RepositoryError, match="is missing"):
        opened()
    assert list((tmp_path / "history" / "objects" / "segments").glob("*/pack/*.pack"))


def test_prose_is_fit_for_terminals() -> None:
    told = prose.tell([make(b"#!/usr/bin/python3\n\n\x1b]0;evil\x07print(1)\n", env=["KEY"])])
    assert told.startswith("A Python program ended well after 48 ms\n\n")
    assert "variable KEY." in told and "\x1b" not in told and "evil" in told
    told = prose.tell([make(), make(status="error", exit_code=3), make(status="timeout")])
    assert told.startswith("3 runs: 1 ended well, 1 failed, 1 ran out of time\n\n")
    assert "failed with exit status 3" in told


class Writer:
    """The process that writes, without a front."""

    def __init__(self, path: Path) -> None:
        self.ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nox_api.history", "--path", str(path), "--descriptor",
                 str(theirs.fileno()), "--days", "0", "--size", str(SIZE)],
                cwd=APP, env=environment(), pass_fds=[theirs.fileno()],
            )  # fmt: skip
        self.heard = {"recorded": 0, "lost": 0}

    def hand(self, run: prose.Run) -> None:
        self.ours.sendall(message({"op": "record", "record": run[0]}, run[1]))

    def hear(self) -> dict[str, Any]:
        document = json.loads(protocol.receive_frame(self.ours, protocol.MAX_HEADER))
        assert list(protocol.receive_stream(self.ours)) == []
        assert not document["failed"], document
        return document  # type: ignore[no-any-return]


def test_a_kill_at_any_moment_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "history"
    chance = random.Random(7)
    certain: list[Record] = []
    for _ in range(12):
        writer = Writer(path)
        writer.hear()
        handed: list[Record] = []
        end = time.monotonic() + chance.uniform(0.0, 0.25)
        while time.monotonic() < end:
            # A question makes it commit at once.
            for _ in range(chance.randint(1, 4)):
                run = make(b"print(%d)\n" % chance.randint(0, 1 << 30))
                writer.hand(run)
                handed.append(run[0])
            writer.ours.sendall(message({"op": "get", "number": 1, "run_id": new_run_id()}))
        writer.process.kill()
        writer.process.wait()
        count = 0
        try:
            while True:
                document = json.loads(protocol.receive_frame(writer.ours, protocol.MAX_HEADER))
                list(protocol.receive_stream(writer.ours))
                count += document.get("recorded", 0)
        except protocol.ProtocolError:
            pass
        writer.ours.close()
        certain += handed[:count]
        if (path / "refs" / "heads" / "main").exists():
            told = git(path, "fsck", "--strict", "--full", "--no-dangling")
            assert "error" not in told and "missing" not in told
    assert len(certain) > 30
    history = Repository(str(path), 0, SIZE)
    assert all(history.get(record["run_id"]) for record in certain)
    history.close()
    assert not list(path.rglob("*.lock.*")) and not list(path.rglob("tmp*"))


def test_through_the_service(own: Callable[..., Service]) -> None:
    nox = own(NOX_HISTORY="on").start()
    secret = "swordfish-" + secrets.token_hex(8)
    code = "import os\nprint('hi', len(os.environ['KEY']))"
    first = nox.python(code, env={"KEY": secret}, stdin=secret, args=["a"])
    second = nox.shell("exit 3")
    with nox.client() as client:
        page = client.get("/history").json()
        assert [run["run_id"] for run in page["runs"]] == [second["run_id"], first["run_id"]]
        assert page["next"] is None
        failed = client.get("/history", params={"status": "error", "limit": 1}).json()
        assert [run["exit_code"] for run in failed["runs"]] == [3]
        assert failed["next"] == second["run_id"]
        run = client.get(f"/history/{first['run_id']}").json()
        assert client.get(f"/history/{new_run_id()}").status_code == 404
        for query in ("limit=0", "status=fine", "before=x", "since=yesterday"):
            assert client.get(f"/history?{query}").status_code == 422
        assert client.get("/history/x").status_code == 422
        later = {"since": "2999-01-01T00:00:00Z"}
        assert client.get("/history", params=later).json() == {"runs": [], "next": None}
    assert run["source"] == code and run["args"] == ["a"] and run["env"] == ["KEY"]
    assert run["stdin"] == {
        "bytes": len(secret), "sha256": hashlib.sha256(secret.encode()).hexdigest(),
    }  # fmt: skip
    assert run["stdout"]["sha256"] == hashlib.sha256(first["stdout"].encode()).hexdigest()
    assert run["duration_ms"] == first["duration_ms"]
    assert nox.detail()["history"]["recorded"] == 2
    assert nox.front is not None
    nox.front.send_signal(signal.SIGTERM)
    nox.front.wait(20)
    everything = git(nox.history, "log", "--patch")
    assert "failed with exit status 3" in everything and secret not in everything
    assert not list(running("nox_api.history", str(nox.history)))


def test_off_unless_asked_for(own: Callable[..., Service]) -> None:
    nox = own().start()
    result = nox.python("pass")
    with nox.client() as client:
        for path in ("/history", f"/history/{result['run_id']}"):
            response = client.get(path)
            assert response.status_code == 409 and "NOX_HISTORY" in response.json()["detail"]
    assert "history" not in nox.detail()
    assert list(nox.history.iterdir()) == []
    assert nox.front is not None
    nox.write_settings(NOX_HISTORY="on")
    nox.front.send_signal(signal.SIGHUP)
    wait_for(lambda: "history" in nox.detail(), "the reload", 60)
    later = nox.python("pass")
    with nox.client() as client:
        runs = client.get("/history").json()["runs"]
    assert [run["run_id"] for run in runs] == [later["run_id"]]
    nox.write_settings(NOX_HISTORY="off")
    nox.front.send_signal(signal.SIGHUP)
    wait_for(lambda: "history" not in nox.detail(), "the reload", 60)
    wait_for(lambda: not list(running("nox_api.history", str(nox.history))), "the writer's end", 60)


def test_runs_go_on_without_the_writer(own: Callable[..., Service]) -> None:
    nox = own(NOX_HISTORY="on").start()
    nox.python("pass")
    (writer,) = running("nox_api.history", str(nox.history))
    os.kill(writer, signal.SIGKILL)
    wait_for(lambda: nox.detail()["history"].get("failed"), "word of the writer's end", 60)
    assert nox.python("print(1)")["stdout"] == "1\n"
    # It is started again, after a while.
    wait_for(lambda: nox.python("pass") and "failed" not in nox.detail()["history"], "a new writer")
    last = nox.python("pass")
    with nox.client() as client:
        assert client.get(f"/history/{last['run_id']}").status_code == 200
        text = client.get("/metrics").text
    assert "nox_history_up 1.0" in text
    assert float(re.findall(r'nox_history_runs_total\{outcome="dropped"\} (.*)', text)[0]) >= 1


def test_an_unusable_place_is_told(own: Callable[..., Service]) -> None:
    nox = own(NOX_HISTORY="on")
    nox.history.rmdir()
    nox.history.write_text("not a directory")
    nox.start()
    assert nox.python("print(1)")["stdout"] == "1\n"
    wait_for(lambda: nox.detail()["history"].get("failed"), "the reason", 60)
    with nox.client() as client:
        response = client.get("/history")
        assert response.status_code == 503 and str(nox.history) in response.json()["detail"]
        assert "nox_history_up 0.0" in client.get("/metrics").text


def test_a_slow_writer_blocks_nobody(own: Callable[..., Service]) -> None:
    nox = own(NOX_HISTORY="on").start()
    (writer,) = running("nox_api.history", str(nox.history))
    os.kill(writer, signal.SIGSTOP)
    try:
        long = "#" * (6 << 20)
        for _ in range(6):
            nox.shell(long)
        wait_for(lambda: nox.detail()["history"]["dropped"] >= 1, "the overflow", 60)
    finally:
        os.kill(writer, signal.SIGCONT)
    wait_for(
        lambda: (found := nox.detail()["history"])["recorded"] + found["dropped"] == 6,
        "the rest to be written",
        60,
    )
    assert nox.detail()["history"]["recorded"] >= 2
