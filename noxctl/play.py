"""One playbook, run by ansible-runner, as a stream of events about hosts."""

from __future__ import annotations

import json
import os
import queue
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noxctl.places import PLAYBOOKS, ROOT

# Long outputs help nobody in a table; the whole is in the run's ansible.log.
ERROR_CHARACTERS = 2000
_PREFIX = "noxctl-"


@dataclass
class Options:
    """What an operator may say of any playbook."""

    inventory: Path
    limit: str = ""
    check: bool = False
    diff: bool = False
    forks: int = 50
    extra: list[str] = field(default_factory=list)  # -e, as given
    vault: list[Path] = field(default_factory=list)  # --vault-password-file


@dataclass(frozen=True)
class Event:
    """Something that happened on one host. `kind`: task, ok, changed, skipped, failed, unreachable."""

    kind: str
    host: str
    task: str
    at: float  # seconds since the epoch
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    action: str = ""
    ignored: bool = False

    @property
    def error(self) -> str:
        """Why it failed, in the task's own words, without Ansible's frame around them."""
        return error_text(self.result)


@dataclass
class End:
    """How one host came out of a playbook."""

    host: str
    ok: int = 0
    changed: int = 0
    failed: int = 0
    unreachable: int = 0
    rescued: int = 0
    task: str = ""  # the first one that failed
    error: str = ""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # module's short name → its last result

    @property
    def word(self) -> str:
        """ok, failed, rescued or unreachable. A rescued host is no success: what was meant didn't happen."""
        if self.unreachable:
            return "unreachable"
        if self.failed:
            return "failed"
        return "rescued" if self.rescued else "ok"


def error_text(result: dict[str, Any]) -> str:
    """The message of a failed result; for a command also the end of what it printed."""
    parts = [str(result.get("msg") or "")]
    if "cmd" in result:
        printed = str(result.get("stderr") or result.get("stdout") or "").strip()
        parts = [f"status {result.get('rc')}", printed[-ERROR_CHARACTERS:]]
    if result.get("exception") and not parts[0]:
        parts.append(str(result["exception"]).strip().splitlines()[-1])
    text = "\n".join(part for part in parts if part).strip() or "no message"
    if len(text) <= ERROR_CHARACTERS:
        return text
    # the reason is at the beginning, a journal's last words are at the end; whole lines of both
    head, tail = text[:500], text[500 - ERROR_CHARACTERS :]
    return f"{head[: head.rfind(chr(10)) if chr(10) in head else None]}\n…\n{tail[tail.find(chr(10)) + 1 :]}"


_KINDS = {
    "runner_on_start": "task",
    "runner_on_ok": "ok",
    "runner_on_failed": "failed",
    "runner_on_unreachable": "unreachable",
    "runner_on_skipped": "skipped",
}


def read(raw: dict[str, Any]) -> Event | None:
    """ansible-runner's event → ours; None for what isn't about a host."""
    kind = _KINDS.get(str(raw.get("event")))
    data = raw.get("event_data") or {}
    if kind is None or not data.get("host"):
        return None
    result = data.get("res") or {}
    if kind == "ok" and result.get("changed"):
        kind = "changed"
    return Event(
        kind=kind,
        host=str(data["host"]),
        task=str(data.get("task") or ""),
        at=time.time(),
        seconds=float(data.get("duration") or 0.0),
        result=result if isinstance(result, dict) else {},
        action=str(data.get("resolved_action") or data.get("task_action") or "").rpartition(".")[2],
        ignored=bool(data.get("ignore_errors")),
    )


def play(
    playbook: str,
    options: Options,
    *,
    variables: dict[str, Any] | None = None,
    hosts: Iterable[str] | None = None,
    log: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    on_tick: Callable[[], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, End]:
    """Run playbooks/`playbook` and return how each host came out.

    `hosts` narrows it to these; `variables` reach Ansible in a file of the user's own, never by argv. `log` gets
    Ansible's own output. `on_event` and `on_tick` (about ten times a second) are called on this thread, from a queue:
    however slow they are, they don't hold up Ansible. `cancelled` is asked by ansible-runner, which then ends Ansible.
    Raises PlayError where Ansible itself couldn't begin.
    """
    # its import takes a second that `noxctl --help` doesn't need
    from ansible_runner import interface  # noqa: PLC0415

    events: queue.Queue[dict[str, Any]] = queue.Queue()

    def take(raw: dict[str, Any]) -> bool:
        events.put(raw)
        return False  # nothing is written to disk: results may hold what an operator keeps to himself

    ends: dict[str, End] = {}
    stats: dict[str, dict[str, int]] = {}
    remove_leftovers(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as place:
        Path(place, "vars.json").write_text(json.dumps(variables or {}), encoding="utf-8")
        words = [*(["--check"] if options.check else []), *(["--diff"] if options.diff else [])]
        for path in options.vault:
            words += ["--vault-password-file", str(path.resolve())]
        for extra in options.extra:
            words += ["-e", f"@{Path(extra[1:]).resolve()}" if extra.startswith("@") else extra]
        words += ["-e", f"@{place}/vars.json"]
        wanted = list(hosts) if hosts is not None else None
        if wanted is not None:
            # a file, because a fleet's names don't fit into a command line
            Path(place, "hosts").write_text("\n".join(wanted) + "\n", encoding="utf-8")
        arguments = {
            "private_data_dir": place,
            "project_dir": str(PLAYBOOKS.parent),
            "playbook": str(PLAYBOOKS / playbook),
            "inventory": str(options.inventory.resolve()),
            "limit": f"@{place}/hosts" if wanted is not None else options.limit or None,
            "forks": options.forks,
            "cmdline": shlex.join(words),
            "envvars": environment(),
            "settings": {"suppress_ansible_output": True},
            "quiet": True,
            "event_handler": take,
            "cancel_callback": cancelled,
        }
        found: list[Any] = []

        def body() -> None:
            try:
                found.append(interface.run(**{key: value for key, value in arguments.items() if value is not None}))
            except Exception as error:  # handed to the caller's thread
                found.append(error)

        thread = threading.Thread(target=body, name="ansible-runner")
        thread.start()
        while thread.is_alive() or not events.empty():
            try:
                raw = events.get(timeout=0.1)
            except queue.Empty:
                if on_tick:
                    on_tick()
                continue
            if raw.get("event") == "playbook_on_stats":
                stats = raw.get("event_data") or {}
            event = read(raw)
            if event is None:
                continue
            note(ends, event)
            if on_event:
                on_event(event)
        thread.join()
        output = "".join(path.read_text(errors="replace") for path in Path(place).glob("artifacts/*/stdout"))
        if log:
            log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as handle:
                handle.write(output)
    if found and isinstance(found[0], Exception):
        raise PlayError(str(found[0])) from found[0]
    if stats:
        for end in ends.values():
            end.failed = 0  # the events can't tell a failure that was rescued
    for key, name in (("failures", "failed"), ("dark", "unreachable"), ("rescued", "rescued")):
        for host, count in (stats.get(key) or {}).items():
            setattr(ends.setdefault(host, End(host)), name, count)
    if not ends and found and found[0].status not in ("successful", "canceled"):
        raise PlayError(output.strip()[-ERROR_CHARACTERS:] or "ansible-playbook ended without a word")
    return ends


def remove_leftovers(place: Path) -> None:
    """What a noxctl of this user that was killed has left: its directory bears its process's number."""
    for left in place.glob(f"{_PREFIX}[0-9]*-*"):
        pid = int(left.name.removeprefix(_PREFIX).partition("-")[0])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            if left.stat().st_uid == os.geteuid():
                shutil.rmtree(left, ignore_errors=True)
        except PermissionError:
            continue  # somebody else's, and alive


class PlayError(Exception):
    """Ansible couldn't begin: a playbook, an inventory or a variable it can't read. The message is Ansible's."""


def note(ends: dict[str, End], event: Event) -> None:
    """Keep what the event says of its host."""
    end = ends.setdefault(event.host, End(event.host))
    if event.kind in ("ok", "changed"):
        end.ok += 1
        end.changed += event.kind == "changed"
        end.results[event.action] = event.result
    elif event.kind == "unreachable":
        end.unreachable = 1
    elif event.kind == "failed" and not event.ignored:
        end.failed += 1  # until the stats say whether it was rescued
    if event.kind in ("failed", "unreachable") and not event.ignored and not end.error:
        end.task, end.error = event.task, event.error


def environment() -> dict[str, str]:
    """What Ansible needs beside the caller's own environment: our configuration, and programs of our own Python."""
    own = str(Path(sys.executable).parent)
    return {
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "PATH": f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_FORCE_COLOR": "0",
    }


def ansible_is_there() -> bool:
    """Whether ansible-playbook can be started."""
    return bool(shutil.which("ansible-playbook", path=environment()["PATH"]))


def fleet(options: Options) -> list[str]:
    """The hosts of the group `nox`, or of `--limit` in it, in the inventory's order.

    Raises PlayError where the inventory can't be read or holds no such host.
    """
    if not (names := members(options, "nox")):
        where = f" that --limit {options.limit} leaves" if options.limit else ""
        raise PlayError(f"{options.inventory}: no host in the group nox{where}")
    return names


def members(options: Options, pattern: str) -> list[str]:
    """The hosts of a group; none where there is no such group. Raises PlayError."""
    from ansible.inventory.manager import InventoryManager  # noqa: PLC0415
    from ansible.parsing.dataloader import DataLoader  # noqa: PLC0415

    if not options.inventory.exists():
        raise PlayError(f"{options.inventory}: no such inventory")
    try:
        manager = InventoryManager(loader=DataLoader(), sources=[str(options.inventory)])
        if pattern not in manager.groups:
            return []
        manager.subset(options.limit or None)
        return [str(host) for host in manager.get_hosts(pattern)]
    except Exception as error:  # AnsibleError and what its plugins raise
        raise PlayError(f"{options.inventory}: {error}") from error
