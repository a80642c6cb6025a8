from __future__ import annotations

from pathlib import Path

import pytest

from nox_api.settings import load
from nox_runner import settings
from nox_runner.settings import Settings, SettingsError

TOKEN = "0123456789abcdef" * 4


def build(text: str) -> Settings:
    return settings.build(Settings, settings.parse(text, "F"), "F")


def test_defaults() -> None:
    made = build("")
    assert (made.bind_addr, made.port, made.timeout) == ("127.0.0.1", 8080, 20)
    assert made.sandbox == "/home/nox/nox/sandbox"
    assert made.slots >= 1


def test_syntax() -> None:
    made = build(
        "\ufeff# comment\n\n  export NOX_PORT=81 # why\r\nNOX_SANDBOX='/srv/a b'\n"
        'NOX_MEMORY="64M"\nNOX_TIMEOUT=2.5\nPATH=/x\nNOX_PORT=82\nNOX_TMP_SIZE=1g\n'
    )
    assert (made.port, made.sandbox, made.memory) == (82, "/srv/a b", 64 << 20)
    assert (made.timeout, made.tmp_size) == (2.5, 1 << 30)


@pytest.mark.parametrize(
    "line",
    [
        "NOX_PORT=0", "NOX_PORT=65536", "NOX_PORT=", "NOX_PORT=+1", "NOX_PORT=١", "NOX_TIMEOUT=nan",
        "NOX_TIMEOUT=0", "NOX_TIMEOUT=-1", "NOX_TIMEOUT=1e3", "NOX_MEMORY=64X", "NOX_MEMORY=1",
        "NOX_SANDBOX=relative", "NOX_SANDBOX=/", "NOX_SANDBOX=/usr/x", "NOX_SANDBOX=/a/../b",
        "NOX_SANDBOX=/home", "NOX_BIND_ADDR=host.example", "NOX_LOG_LEVEL=loud", "NOX_PORT='81",
        "NOX_PORT=8 1", "not an assignment", "NOX_SLOTS=" + "9" * 5000,
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_their_place(line: str) -> None:
    with pytest.raises(SettingsError, match=r"^F:2: "):
        build(f"# first\n{line}\n")


def test_unknown_keys_are_told() -> None:
    told = settings.warnings(settings.parse("NOX_TIMEUOT=1\nOTHER=1\nNOX_API_TOKEN=x\n", "F"), "F")
    assert told == ["F:1: NOX_TIMEUOT: unknown setting; did you mean NOX_TIMEOUT?"]


def test_the_token(tmp_path: Path) -> None:
    path = tmp_path / "settings"
    path.write_text(f"NOX_API_TOKEN={TOKEN}\n")
    made = load(str(path))
    assert made.token == TOKEN
    assert TOKEN not in repr(made)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "is not set"),
        ("NOX_API_TOKEN=\n", "is not set"),
        ("NOX_API_TOKEN=replace_with_secure_token\n", "placeholder"),
        ("NOX_API_TOKEN=ChangeMe" + "x" * 40, "placeholder"),
        ("NOX_API_TOKEN=" + "s" * 31, "shorter"),
        ("NOX_API_TOKEN=" + "é" * 40, "ASCII"),
        (f"NOX_API_TOKEN='{'a b' * 20}'", "spaces"),
    ],
)
def test_bad_tokens(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "settings"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(str(path))
    message = str(caught.value)
    assert cause in message and str(path) in message and "NOX_API_TOKEN" in message
    assert "openssl rand -hex 32" in message
    value = text.partition("=")[2].strip("'\n")
    assert not value or value not in message


def test_the_token_before(tmp_path: Path) -> None:
    path = tmp_path / "settings"
    old = "fedcba9876543210" * 4
    both = f"NOX_API_TOKEN={TOKEN}\nNOX_API_TOKEN_PREVIOUS={old}\n"
    for until, accepted in (
        ("", (TOKEN, old)),
        ("NOX_API_TOKEN_PREVIOUS_UNTIL=2999-01-31T12:00:00Z\n", (TOKEN, old)),
        ("NOX_API_TOKEN_PREVIOUS_UNTIL=2001-01-31T12:00:00Z\n", (TOKEN,)),
    ):
        path.write_text(both + until)
        made = load(str(path))
        assert made.tokens() == accepted and old not in repr(made)
    for bad in ("NOX_API_TOKEN_PREVIOUS=short\n", "NOX_API_TOKEN_PREVIOUS_UNTIL=tomorrow\n"):
        path.write_text(both + bad)
        with pytest.raises(SettingsError, match="NOX_API_TOKEN_PREVIOUS"):
            load(str(path))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load(str(tmp_path / "absent"))
    binary = tmp_path / "binary"
    binary.write_bytes(b"NOX_PORT=\xff\n")
    with pytest.raises(SettingsError, match="UTF-8"):
        load(str(binary))
