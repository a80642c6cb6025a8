"""What `git log` tells: sentences for people, from records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nox_api.history.record import Outcome, Record

_MAX_LINE = 60
_NAMES = {"python": "Python program", "sh": "shell script"}
_ENDS: dict[Outcome, str] = {
    "ok": "ended well",
    "error": "failed",
    "timeout": "ran out of time",
    "memory_limit": "ran out of memory",
    "output_limit": "wrote more than it may",
    "sandbox_error": "got no sandbox",
    "cancelled": "was given up by its client",
}

Run = tuple[Record, bytes]
"""A record and its script."""


def tell(runs: Sequence[Run]) -> str:
    """A commit's message."""
    if len(runs) == 1:
        return _one(*runs[0])
    ends = Counter(_ENDS[record["status"]] for record, _ in runs)
    summary = ", ".join(f"{count} {end}" for end, count in ends.most_common())
    lines = [f"{len(runs)} runs: {summary}", ""]
    for record, script in runs:
        took = "" if record["duration_ms"] is None else f" after {_duration(record['duration_ms'])}"
        lines += [
            f"{record['time'][11:19]} A {_NAMES[record['language']]} {_end(record)}{took}."
            f" It begins: {_beginning(script)}",
            f"         Run {record['run_id']}",
        ]
    return "\n".join(lines) + "\n"


def chapter() -> str:
    """The message of the commit that empties the tree."""
    return (
        "A new chapter begins\n\n"
        "The tree starts empty again, so that old chapters can be forgotten whole.\n"
    )


def _one(record: Record, script: bytes) -> str:
    name = _NAMES[record["language"]]
    took = "" if record["duration_ms"] is None else f" after {_duration(record['duration_ms'])}"
    lines = [f"A {name} {_end(record)}{took}", ""]
    count = script.count(b"\n") + (not script.endswith(b"\n"))
    lines.append(f"It has {_count(count, 'line')} and begins: {_beginning(script)}")
    given = []
    if record["args"]:
        given.append(_count(len(record["args"]), "argument"))
    if record["env"]:
        names = ", ".join(record["env"][:10])
        given.append(f"the variable{'' if len(record['env']) == 1 else 's'} {names}")
    if record["stdin"] is not None:
        given.append(f"{_count(record['stdin']['bytes'], 'byte')} of input")
    if given:
        lines.append(f"It was given {_listed(given)}.")
    if record["stdout"] is not None and record["stderr"] is not None:
        wrote = [
            f"{_count(output['bytes'], 'byte')} to {stream}{_cut(output['truncated'])}"
            for stream, output in (("stdout", record["stdout"]), ("stderr", record["stderr"]))
            if output["bytes"]
        ]
        lines.append(f"It wrote {_listed(wrote) or 'nothing'}.")
    if record["max_rss_bytes"] is not None:
        lines.append(
            f"It used {_duration(record['cpu_ms'] or 0)} of processor time"
            f" and {record['max_rss_bytes'] / (1 << 20):.0f} MiB of memory."
        )
    return "\n".join([*lines, "", f"Run {record['run_id']}"]) + "\n"


def _end(record: Record) -> str:
    if record["status"] != "error":
        return _ENDS[record["status"]]
    if record["signal"] is not None:
        return f"died of signal {record['signal']}"
    return f"failed with exit status {record['exit_code']}"


def _beginning(script: bytes) -> str:
    """The first line that says something. It is shown on terminals, which obey some characters."""
    text = script[:4096].decode("utf-8", "replace")
    lines = (line.strip() for line in text.splitlines())
    line = next((line for line in lines if line and not line.startswith("#!")), "")
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"
                   for character in line)  # fmt: skip
    return line if len(line) <= _MAX_LINE else line[: _MAX_LINE - 1] + "…"


def _duration(milliseconds: int) -> str:
    return f"{milliseconds} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cut(truncated: bool) -> str:
    return " (cut)" if truncated else ""


def _listed(words: list[str]) -> str:
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else "".join(words)
