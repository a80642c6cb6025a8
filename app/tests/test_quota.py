"""The quota, alone and in the service."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from service import Service, wait_for

from nox_runner import openat2, tree
from nox_runner.protocol import Failure
from nox_runner.quota import Quota, _measure, _remove, _Usage
from nox_runner.settings import Settings

MIB = 1 << 20


def make(sandbox: Path, **values: int) -> Quota:
    settings = Settings(sandbox=str(sandbox), **values)  # type: ignore[arg-type]
    return Quota(lambda: settings)


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    with ours, theirs:
        yield ours


def deep(sandbox: Path, depth: int) -> None:
    """Directories within directories, deeper than any path can tell."""
    current = os.open(sandbox, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 50, dir_fd=current)
        below = os.open("d" * 50, os.O_RDONLY, dir_fd=current)
        os.close(current)
        current = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=current))
    os.close(current)


def test_everything_is_counted_once_and_no_link_followed(tmp_path: Path) -> None:
    sandbox, outside = tmp_path / "sandbox", tmp_path / "outside"
    (sandbox / "d").mkdir(parents=True)
    outside.mkdir()
    (outside / "big").write_bytes(b"x" * MIB)
    (sandbox / "d/link").symlink_to(outside)
    (sandbox / "a").write_bytes(b"x" * MIB)
    os.link(sandbox / "a", sandbox / "d/again")
    os.truncate(sandbox / "a", 2 * MIB)
    usage, complete = _measure(Settings(sandbox=str(sandbox)))
    assert complete and usage.files == 4 and 2 * MIB <= usage.bytes < 3 * MIB


def test_a_deep_tree_is_counted_and_removed(tmp_path: Path) -> None:
    deep(tmp_path, 1500)
    usage, complete = _measure(Settings(sandbox=str(tmp_path)))
    assert complete and usage.files == 1501
    assert _remove(str(tmp_path), lambda name, state: True) == 1501
    assert os.listdir(tmp_path) == []


def test_nothing_outside_is_removed(tmp_path: Path) -> None:
    sandbox, outside = tmp_path / "sandbox", tmp_path / "outside"
    sandbox.mkdir()
    outside.mkdir()
    (outside / "file").write_text("intact")
    (sandbox / "link").symlink_to(outside)
    (sandbox / "file").symlink_to(outside / "file")
    assert _remove(str(sandbox), lambda name, state: True) == 2
    assert (outside / "file").read_text() == "intact" and os.listdir(sandbox) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_closed_directory_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_text("x")
    (tmp_path / "d").chmod(0)
    usage, complete = _measure(Settings(sandbox=str(tmp_path)))
    assert complete and usage.files == 2


def test_a_directory_that_moves_away_ends_the_walk(tmp_path: Path) -> None:
    (tmp_path / "sandbox/d/e").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()

    def on_entry(directory: int, name: str, state: os.stat_result) -> None:
        if name == "e":
            (tmp_path / "sandbox/d").rename(tmp_path / "elsewhere/d")

    visited: list[str] = []
    complete = tree.walk(
        str(tmp_path / "sandbox"), on_entry, lambda fd, name, state: visited.append(name)
    )
    assert not complete and visited == ["e"]


def test_uploads_reserve_exactly(tmp_path: Path) -> None:
    quota = make(tmp_path, quota_bytes=MIB)
    quota.start()
    with quota.upload("a") as first, quota.upload("b") as second:
        assert list(first.metered([b"x" * (MIB // 2)])) == [b"x" * (MIB // 2)]
        quota.reserve(second, MIB // 2)
        with pytest.raises(Failure, match="full"):
            quota.reserve(second, 1)


def test_a_full_sandbox_refuses_runs(tmp_path: Path, connection: socket.socket) -> None:
    for number in range(100):
        (tmp_path / str(number)).touch()
    quota = make(tmp_path, quota_files=100)
    quota.start()
    with pytest.raises(Failure, match="full"), quota.run(connection):
        pass
    (tmp_path / "1").unlink()
    quota.touched()
    quota._scanned = 0
    with quota.run(connection):
        pass
    assert len(os.listdir(tmp_path)) == 99


def test_without_a_run_nothing_is_removed(tmp_path: Path) -> None:
    quota = make(tmp_path, quota_files=100)
    quota.start()
    for number in range(150):
        (tmp_path / str(number)).touch()
    quota.touched()
    wait_for(lambda: quota.usage().files > 100, "the scan")
    scanned = quota._scanned
    time.sleep(2.3)
    assert len(os.listdir(tmp_path)) == 150 and quota._scanned == scanned


def test_a_run_that_exceeds_is_cut_and_costs_only_itself(
    tmp_path: Path, connection: socket.socket
) -> None:
    (tmp_path / "old").write_text("old")
    time.sleep(0.05)
    quota = make(tmp_path, quota_files=100)
    quota.start()
    with quota.upload("put") as upload:
        (tmp_path / "put").write_text("uploaded")
        upload.stored((tmp_path / "put").stat())
    with quota.run(connection) as lease:
        for number in range(150):
            (tmp_path / f"new{number}").touch()
            if number == 50:  # what a scan found bearable half-way is the run's all the same
                quota._check()
        os.utime(tmp_path / "new1", (0, 0))
        # As its supervision does, it leaves when it is cut.
        assert wait_for(lambda: not connection.recv(1), "the cut")
    assert lease.exceeded
    wait_for(lambda: not quota._cutting, "the end of the pruning")
    assert sorted(os.listdir(tmp_path)) == ["old", "put"]
    with quota.run(connection):
        pass


def test_an_upload_that_took_long_to_be_in_its_place_stays(
    tmp_path: Path, connection: socket.socket
) -> None:
    quota = make(tmp_path, quota_files=100)
    quota.start()
    with quota.upload("put") as upload:
        (tmp_path / "unnamed").write_text("uploaded")
        upload.stored((tmp_path / "unnamed").stat())
        time.sleep(0.1)  # a busy disk
        (tmp_path / "unnamed").rename(tmp_path / "put")
    with quota.run(connection):
        for number in range(150):
            (tmp_path / f"new{number}").touch()
        assert wait_for(lambda: not connection.recv(1), "the cut")
    wait_for(lambda: not quota._cutting, "the end of the pruning")
    assert os.listdir(tmp_path) == ["put"]


def test_a_runs_file_is_not_an_uploads_by_its_name(
    tmp_path: Path, connection: socket.socket
) -> None:
    quota = make(tmp_path, quota_files=100)
    quota.start()
    with quota.upload("put") as upload:
        (tmp_path / ".nox-put-real").write_text("half")
        upload.begun((tmp_path / ".nox-put-real").stat())
        with quota.run(connection):
            for number in range(150):
                (tmp_path / f".nox-put-{number}").touch()
            assert wait_for(lambda: not connection.recv(1), "the cut")
        wait_for(lambda: not quota._cutting, "the end of the pruning")
        assert os.listdir(tmp_path) == [".nox-put-real"]


def test_what_is_unlinked_but_open_counts(
    tmp_path: Path, connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nox_runner.quota._is_of_a_run", lambda pid: pid == str(os.getpid()))
    quota = make(tmp_path, quota_bytes=4 * MIB)
    quota.start()
    with open(tmp_path / "hidden", "wb", buffering=0) as file:
        os.unlink(tmp_path / "hidden")
        with quota.run(connection) as lease:
            file.write(os.urandom(8 * MIB))
            assert wait_for(lambda: not connection.recv(1), "the cut")
        assert lease.exceeded


def test_a_tree_that_cannot_be_seen_gets_no_benefit(
    tmp_path: Path, connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = make(tmp_path, quota_bytes=4 * MIB)
    quota.start()
    monkeypatch.setattr("nox_runner.tree.walk", lambda *_: False)
    # Others use this disk, too.
    monkeypatch.setattr(
        "nox_runner.quota._free",
        lambda _: _Usage((1 << 40) - 8 * MIB * (tmp_path / "big").exists(), 1 << 20),
    )
    with quota.run(connection) as lease:
        (tmp_path / "big").write_bytes(os.urandom(8 * MIB))
        assert wait_for(lambda: not connection.recv(1), "the cut")
    assert lease.exceeded


def test_housekeeping_goes_by_the_time_that_no_run_can_set(tmp_path: Path) -> None:
    (tmp_path / "forged").write_text("x")
    os.utime(tmp_path / "forged", (0, 0))
    quota = make(tmp_path, keep_days=1)
    assert quota.housekeep() == 0 and (tmp_path / "forged").exists()
    assert make(tmp_path, keep_days=0).housekeep() == 0


def test_an_idle_quota_does_not_scan(tmp_path: Path) -> None:
    quota = make(tmp_path)
    quota.start()
    scanned = quota._scanned
    time.sleep(2.3)
    assert quota._scanned == scanned


@pytest.mark.skipif(not openat2.available(), reason="the kernel has no openat2")
def test_openat2_stays_beneath(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    start = os.open(tmp_path / "a", os.O_RDONLY)
    try:
        os.close(openat2.directory(start, "b"))
        for path in ("..", "/", "../link", "b/../..", "/proc/self/root"):
            with pytest.raises(OSError):
                openat2.directory(start, path)
    finally:
        os.close(start)


def test_put_is_refused_before_the_quota_breaks(own: Callable[..., Service]) -> None:
    nox = own(NOX_QUOTA_BYTES="1M").start()
    assert nox.put("a", b"x" * (700 << 10)).status_code == 201
    refused = nox.put("b", b"x" * (700 << 10))
    assert refused.status_code == 507 and "quota" in refused.json()["detail"]
    assert os.listdir(nox.sandbox) == ["a"]
    assert nox.put("c", b"x" * (200 << 10)).status_code == 201
    usage = nox.detail()["sandbox"]
    assert usage["files"] == 2 and usage["quota_bytes"] == MIB


@pytest.mark.parametrize(
    "code",
    [
        # A million tiny files.
        "i = 0\nwhile True:\n    open(f'f{i}', 'w').close()\n    i += 1",
        # Many files below the limit of each.
        "i = 0\nwhile True:\n    open(f'b{i}', 'wb').write(b'x' * 1000000)\n    i += 1",
        # Up to the last byte, without a block of the disk, and gone before anybody looks.
        "import os, time\nfor i in range(50): open(b'\\xff%d' % i, 'wb').truncate(1 << 20)\n"
        "time.sleep(5)",
        # In directories that nobody may write to any more.
        "import os, time\nos.makedirs('d/e')\n"
        "for i in range(60): open(f'd/e/{i}', 'wb').truncate(1 << 20)\n"
        "for path in ('d/e', 'd', '.'): os.chmod(path, 0o555)\ntime.sleep(5)",
        # In one that nobody may enter.
        "import os\nos.mkdir('y')\nd, r = os.open('y', os.O_RDONLY), os.open('.', os.O_RDONLY)\n"
        "for i in range(60):\n    f = os.open(f'{i}', os.O_RDWR | os.O_CREAT, dir_fd=d)\n"
        "    os.posix_fallocate(f, 0, 1 << 20); os.close(f); os.fchmod(r, 0)\n"
        "while True: os.fchmod(r, 0)",
        # While one is moved about.
        "import os, threading, time\nos.makedirs('p/d0'); os.mkdir('p/m')\n"
        "for i in range(1500): open(f'p/m/{i}', 'w').close()\n"
        "def move():\n    while True:\n        for a, b in ('01', '10'):\n"
        "            try: os.rename(f'p/d{a}', f'p/d{b}')\n            except OSError: pass\n"
        "d = os.open('p/d0', os.O_RDONLY)\nthreading.Thread(target=move, daemon=True).start()\n"
        "for i in range(90):\n    f = os.open(f'{i}', os.O_RDWR | os.O_CREAT, dir_fd=d)\n"
        "    os.posix_fallocate(f, 0, 1 << 20); os.close(f)\ntime.sleep(15)",
        # Files without a name, in a process with a name that is no text.
        "import os, tempfile\nopen('/proc/self/comm', 'wb').write(b'x\\xff')\nkeep = []\n"
        "while True:\n    keep.append(tempfile.TemporaryFile(dir='.', buffering=0))\n"
        "    keep[-1].write(os.urandom(1000000))",
        # In a thread with descriptors of its own.
        "import ctypes, os, tempfile, threading\nkeep = []\ndef hide():\n"
        "    ctypes.CDLL(None).close_range(1000, 1000, 2)\n"
        "    while True:\n        keep.append(tempfile.TemporaryFile(dir='.', buffering=0))\n"
        "        keep[-1].write(os.urandom(1000000))\n"
        "thread = threading.Thread(target=hide); thread.start(); thread.join()",
        # Many without a name, and empty.
        "import os, tempfile, time\nfor _ in range(5):\n    if not os.fork(): break\n"
        "keep = [tempfile.TemporaryFile(dir='.') for i in range(900)]\ntime.sleep(15)",
        # Files without a name, in a process that nobody may look into.
        "import ctypes, os, tempfile\nctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\nkeep = []\n"
        "while True:\n    keep.append(tempfile.TemporaryFile(dir='.', buffering=0))\n"
        "    keep[-1].write(os.urandom(1000000))",
        # The same, on their way through a socket.
        "import array, os, socket, tempfile\nnear, far = socket.socketpair()\nwhile True:\n"
        "    with tempfile.TemporaryFile(dir='.', buffering=0) as file:\n"
        "        file.write(os.urandom(10000000))\n"
        "        rights = array.array('i', [file.fileno()])\n"
        "        near.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])",
        # The same, mapped.
        "import ctypes, os, tempfile\nmap = ctypes.CDLL(None).mmap\nwhile True:\n"
        "    with tempfile.TemporaryFile(dir='.', buffering=0) as file:\n"
        "        file.write(os.urandom(10000000))\n"
        "        assert map(None, 4096, 1, 1, file.fileno(), 0) != -1",
        # Files that have no name any more.
        "import os, tempfile\nkeep = []\nwhile True:\n"
        "    keep.append(tempfile.TemporaryFile(dir='.', buffering=0))\n"
        "    keep[-1].write(os.urandom(1000000))",
    ],
)
def test_a_run_is_killed_before_the_disk_is_hurt(own: Callable[..., Service], code: str) -> None:
    nox = own(NOX_QUOTA_BYTES="50M", NOX_QUOTA_FILES=2000, NOX_TIMEOUT=20).start()
    nox.put("kept", b"mine")
    result = nox.python(code)
    assert result["status"] == "output_limit" and "quota" in result["stderr"]
    assert os.listdir(nox.sandbox) == ["kept"]
    started = time.monotonic()
    assert nox.python("print(6*7)")["stdout"] == "42\n"
    assert time.monotonic() - started < 10


def test_a_run_that_has_ended_is_to_blame_as_well(own: Callable[..., Service]) -> None:
    nox = own(NOX_QUOTA_BYTES="50M", NOX_QUOTA_FILES=2000).start()
    nox.put("kept", b"mine")
    for fill in (
        "for i in range(51): open(b'\\xff%d' % i, 'wb').truncate(1 << 20)",
        "import os\nopen('a', 'w').close()\nfor i in range(1998): os.link('a', f'a{i}')",
    ):
        assert nox.python(fill)["status"] == "ok"
        wait_for(lambda: os.listdir(nox.sandbox) == ["kept"], "the removal")
        assert nox.python("open('x', 'w').write('room'); print(1)")["stdout"] == "1\n"
        (nox.sandbox / "x").unlink()
    assert nox.put("more", b"x" * MIB).status_code == 201
