from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nox_runner.paths import MAX_PATH, PathError, components


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a", ("a",)),
        ("a/b.txt", ("a", "b.txt")),
        ("...", ("...",)),
        (".hidden", (".hidden",)),
        ("é/日本", ("é", "日本")),
        ("a b", ("a b",)),
        ("n" * 255, ("n" * 255,)),
    ],
)
def test_accepts(path: str, expected: tuple[str, ...]) -> None:
    assert components(path) == expected


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "/", "/etc/x", "../x", "../../etc/x", "a/../../x", "a/../b", "a//b", "a/",
        "a/./b", "./a", "a\0b", "a\nb", "a\x7f", "a\x85", "n" * 256, "é" * 128,
        "/".join(["a"] * 600), "\ud800", ".nox-put-0", "a/.nox-put-1/b",
    ],
)  # fmt: skip
def test_refuses(path: str) -> None:
    with pytest.raises(PathError):
        components(path)


@given(st.text() | st.text(alphabet="./a\0é"))
def test_what_is_accepted_cannot_leave(path: str) -> None:
    try:
        parts = components(path)
    except PathError:
        return
    assert "/".join(parts) == path
    assert not set(parts) & {"", ".", ".."}
    assert "\0" not in path and not path.startswith("/")
    assert len(path.encode()) <= MAX_PATH
