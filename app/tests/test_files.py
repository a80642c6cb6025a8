"""The runner's file operations, on a directory of this test's own."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nox_runner import files, listing, openat2
from nox_runner.protocol import Failure


@pytest.fixture(autouse=True, params=["openat2", "one by one"])
def walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here by both ways to a directory."""
    if request.param == "openat2" and not openat2.available():
        pytest.skip("the kernel has no openat2")
    monkeypatch.setattr(openat2, "available", lambda: request.param == "openat2")


def put(sandbox: Path, path: str, content: bytes = b"new", overwrite: bool = False) -> None:
    files.put(str(sandbox), path, overwrite, [content], 1000)


def code_of(call: object, *arguments: object, **named: object) -> str:
    with pytest.raises(Failure) as caught:
        call(*arguments, **named)  # type: ignore[operator]
    return caught.value.code


def test_put_makes_directories_and_leaves_nothing_else(tmp_path: Path) -> None:
    os.umask(0o077)
    put(tmp_path, "a/b/c.txt", b"hello")
    os.umask(0o022)
    target = tmp_path / "a/b/c.txt"
    assert target.read_bytes() == b"hello"
    assert target.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path / "a/b") == ["c.txt"]


def test_put_over(tmp_path: Path) -> None:
    put(tmp_path, "f", b"old")
    assert code_of(put, tmp_path, "f") == "exists"
    assert (tmp_path / "f").read_bytes() == b"old"
    put(tmp_path, "f", b"new", overwrite=True)
    assert (tmp_path / "f").read_bytes() == b"new"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["link", "dangling", "directory", "fifo", "socket"])
def test_put_refuses_what_is_no_file(tmp_path: Path, kind: str, overwrite: bool) -> None:
    sandbox, outside = tmp_path / "sandbox", tmp_path / "outside"
    sandbox.mkdir()
    outside.write_text("intact")
    target = sandbox / "x"
    if kind == "link":
        target.symlink_to(outside)
    elif kind == "dangling":
        target.symlink_to(tmp_path / "planted")
    elif kind == "directory":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(target))
    assert code_of(put, sandbox, "x", overwrite=overwrite) == "not_regular"
    assert outside.read_text() == "intact"
    assert not (tmp_path / "planted").exists()
    assert os.listdir(sandbox) == ["x"]


def test_nothing_goes_through_a_linked_directory(tmp_path: Path) -> None:
    sandbox, outside = tmp_path / "sandbox", tmp_path / "sandbox-evil"
    sandbox.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (sandbox / "d").symlink_to(outside)
    assert code_of(put, sandbox, "d/x") == "not_regular"
    assert code_of(files.delete, str(sandbox), "d/secret") == "not_regular"
    assert code_of(read, sandbox, "d/secret") == "not_regular"
    assert os.listdir(outside) == ["secret"]
    assert listing.take(str(sandbox)).files == []


def read(sandbox: Path, path: str) -> bytes:
    with files.reading(str(sandbox), path) as (descriptor, state):
        return b"".join(files.chunks(descriptor, state.st_size, 7))


def test_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content of a file")
    assert read(tmp_path, "f") == b"content of a file"
    assert code_of(read, tmp_path, "absent") == "not_found"
    assert code_of(read, tmp_path, "f/x") == "not_regular"
    (tmp_path / "l").symlink_to("/etc/passwd")
    assert code_of(read, tmp_path, "l") == "not_regular"
    os.mkfifo(tmp_path / "p")
    assert code_of(read, tmp_path, "p") == "not_regular"
    assert code_of(read, tmp_path, "../x") == "bad_path"


def test_too_large_leaves_nothing(tmp_path: Path) -> None:
    assert code_of(files.put, str(tmp_path), "f", False, [b"x" * 600] * 2, 1000) == "too_large"
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def content() -> object:
        yield b"some"
        raise OSError(28, "No space left on device")

    with pytest.raises(Failure) as caught:
        files.put(str(tmp_path), "f", False, content(), 1000)  # type: ignore[arg-type]
    assert caught.value.code == "no_space"
    assert os.listdir(tmp_path) == []


def test_delete(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/e").mkdir()
    outside = tmp_path / "f2"
    outside.write_text("x")
    (tmp_path / "l").symlink_to(outside)
    assert code_of(files.delete, str(tmp_path), "d") == "not_empty"
    for path in ("f", "l", "d/e", "d"):
        files.delete(str(tmp_path), path)
    assert os.listdir(tmp_path) == ["f2"]
    assert code_of(files.delete, str(tmp_path), "f") == "not_found"


def test_a_missing_sandbox(tmp_path: Path) -> None:
    assert code_of(put, tmp_path / "absent", "f") == "unable"
    assert code_of(listing.take, str(tmp_path / "absent")) == "unable"


def test_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    for name in ("b", "a", "d/c", ".nox-put-1"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "loop").symlink_to(".")
    with open(os.fsencode(tmp_path) + b"/\xff", "w"):
        pass
    found = listing.take(str(tmp_path))
    assert [file.path for file in found.files] == ["a", "b", "d/c", "\ufffd"]
    assert not found.truncated
    monkeypatch.setattr(listing, "MAX_FILES", 2)
    found = listing.take(str(tmp_path))
    assert len(found.files) == 2 and found.truncated


def test_a_deep_tree_is_listed_and_told_truncated(tmp_path: Path) -> None:
    depth = 600
    for count in range(1, depth):
        (tmp_path / "/".join(["d"] * count)).mkdir()
    assert listing.take(str(tmp_path)).truncated
    # pytest's own clean-up would recurse too deep.
    for count in range(depth - 1, 0, -1):
        (tmp_path / "/".join(["d"] * count)).rmdir()


def test_changed(tmp_path: Path) -> None:
    for name in ("same", "rewritten", "removed"):
        (tmp_path / name).write_text("old")
    before = listing.take(str(tmp_path))
    (tmp_path / "rewritten").write_text("new")
    os.utime(tmp_path / "rewritten", (0, 0))
    (tmp_path / "removed").unlink()
    (tmp_path / "made").write_text("new")
    after = listing.take(str(tmp_path))
    assert [file.path for file in listing.changed(before, after, 10)] == ["made", "rewritten"]
    assert len(listing.changed(before, after, 1)) == 1


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "out").symlink_to("/")
    for name in (".nox-put-1", "d/.nox-put-2", "d/kept"):
        (tmp_path / name).write_text("x")
    assert listing.remove_leftovers(str(tmp_path)) == 2
    assert os.listdir(tmp_path / "d") == ["kept"]
    assert listing.remove_leftovers(str(tmp_path / "absent")) == 0


def test_what_is_listed_can_be_read_and_removed(tmp_path: Path) -> None:
    for name in (b"\xff0", b"\xfe0", "\ufffd0".encode()):
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    shown = "\ufffd0"
    assert [file.path for file in listing.take(str(tmp_path)).files] == [shown] * 3
    with files.reading(str(tmp_path), shown) as (descriptor, _):
        assert os.read(descriptor, 10) == shown.encode()
    for left in (2, 1, 0):
        files.delete(str(tmp_path), shown)
        assert len(os.listdir(tmp_path)) == left
        if left == 2:
            assert shown not in os.listdir(tmp_path)
    with pytest.raises(Failure, match="does not exist"):
        files.delete(str(tmp_path), shown)
