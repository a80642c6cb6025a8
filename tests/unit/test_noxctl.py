"""noxctl without hosts: who goes in which wave, what a gate lets through, what the journal keeps, what bundles refuse."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from noxctl import journal as journal_module
from noxctl import report, rollout
from noxctl.cli import app
from noxctl.journal import Journal, Locked, locked
from noxctl.play import End, Event, Options, PlayError, error_text, fleet, note, read, remove_leftovers
from noxctl.rollout import Unusable, deal, exit_code, judge, read_bundle, status_of
from noxctl.view import Lines, Screen, Total, printable

ROOT = Path(__file__).resolve().parents[2]
HOSTS = [f"h{number}" for number in range(1, 11)]


# ── Waves


@pytest.mark.parametrize(
    ("canary", "waves", "sizes"),
    [
        ("", "", [1, 3, 6]),
        ("", "1,25%,100%", [1, 3, 6]),
        ("", "2", [2, 8]),
        ("2", "", [2, 3, 5]),
        ("h7", "50%", [1, 5, 4]),
        ("h7,h2", "4", [2, 4, 4]),
        ("", "1,3", [1, 3, 3, 3]),
        ("100%", "", [10]),
        ("", "1,1%", [1] * 10),
    ],
)
def test_every_host_is_in_one_wave(canary: str, waves: str, sizes: list[int]) -> None:
    dealt = deal(HOSTS, canary, waves)
    assert [len(hosts) for _, hosts in dealt] == sizes
    assert sorted(host for _, hosts in dealt for host in hosts) == sorted(HOSTS)
    assert dealt[0][0] == "canary"
    if canary.startswith("h"):
        assert dealt[0][1] == canary.split(",")


@pytest.mark.parametrize(
    ("canary", "waves"), [("h99", ""), ("", "0"), ("", "a few"), ("0", ""), ("", "-1"), ("", "1,%")]
)
def test_sizes_that_mean_nothing_are_refused(canary: str, waves: str) -> None:
    with pytest.raises(Unusable):
        deal(HOSTS, canary, waves)


# ── The gate

HEALTHY: dict[str, Any] = {
    "reachable": True, "healthy": True, "problem": "", "release": "2-b", "restarts": {"nox-api.service": 0},
    "requests": 1000.0, "server_errors": 0.0, "probe_ms": 40.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, ""),
        ({"reachable": False}, "unreachable"),
        ({"healthy": False, "problem": "nox-api.service is failed"}, "is failed"),
        ({"release": "1-a"}, "isn't in the bundle"),
        ({"restarts": {"nox-api.service": 2}}, "restarted by systemd"),
        ({"server_errors": 2.0}, ""),
        ({"server_errors": 50.0}, "5xx"),
        ({"probe_ms": 200.0}, ""),
        ({"probe_ms": 900.0}, "900 ms"),
    ],
)
def test_the_gate(changed: dict[str, Any], says: str) -> None:
    problem = judge(
        {"probe_ms": 40.0, "requests": 10.0, "server_errors": 0.0}, {**HEALTHY, **changed}, frozenset({"2-b"})
    )
    assert (says in problem) if says else problem == ""


def test_errors_that_were_there_before_are_no_fault_of_the_release() -> None:
    before = {"requests": 100.0, "server_errors": 6.0}
    assert judge(before, {**HEALTHY, "server_errors": 60.0}, frozenset({"2-b"})) == ""


# ── What comes from Ansible


def test_a_rescued_host_is_no_success() -> None:
    assert End("h1", ok=5, rescued=1).word == "rescued"
    assert exit_code("stopped", {"h1": {"state": "rescued"}}) == 5


@pytest.mark.parametrize(
    ("outcome", "states", "code"),
    [
        ("done", ["done", "already"], 0),
        ("done", ["done", "unreachable"], 6),
        ("done", ["done", "rolled back"], 1),
        ("stopped", ["unreachable", "waiting"], 6),
        ("stopped", ["waiting", "waiting"], 6),  # an edge was
        ("stopped", ["unreachable", "failed", "waiting"], 5),
        ("paused", ["done", "waiting"], 1),
    ],
)
def test_exit_codes(outcome: str, states: list[str], code: int) -> None:
    assert exit_code(outcome, {f"h{number}": {"state": state} for number, state in enumerate(states)}) == code


def raw(event: str, **data: Any) -> dict[str, Any]:
    return {
        "event": event,
        "event_data": {"host": "h1", "task": "Do it", "task_action": "nox.platform.nox_run", **data},
    }


def test_the_first_failure_is_kept_and_ignored_ones_are_not() -> None:
    ends: dict[str, End] = {}
    for one in (
        raw("runner_on_failed", res={"msg": "never mind"}, ignore_errors=True),
        raw("runner_on_failed", res={"msg": "the reason"}),
        raw("runner_on_failed", res={"msg": "what followed"}),
        raw("runner_on_ok", res={"result": {"stdout": "x"}}),
    ):
        event = read(one)
        assert event is not None
        note(ends, event)
    assert (ends["h1"].error, ends["h1"].word) == ("the reason", "failed")
    assert ends["h1"].results["nox_run"]["result"]["stdout"] == "x"


def test_a_failed_command_shows_what_it_printed() -> None:
    text = error_text({"msg": "non-zero return code", "cmd": ["smoke.sh"], "rc": 3, "stderr": "no answer from /health"})
    assert "status 3" in text and "no answer from /health" in text


def test_a_host_can_not_speak_to_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x9bc\r\nd") == "a[2Jbc\nd"


def test_an_inventory_that_can_not_be_used(tmp_path: Path) -> None:
    with pytest.raises(PlayError, match="no such inventory"):
        fleet(Options(tmp_path / "nothing.yml"))
    path = tmp_path / "hosts.yml"
    path.write_text("web: {hosts: {a: {}}}\n")
    with pytest.raises(PlayError, match="group nox"):
        fleet(Options(path))
    path.write_text("nox: {hosts: {b: {}, a: {}}}\n")
    assert fleet(Options(path)) == ["b", "a"]
    assert fleet(Options(path, limit="a")) == ["a"]


def test_an_unreachable_host_has_a_status_too() -> None:
    found = status_of(End("h1", unreachable=1, error="ssh: no route"))
    assert (found["reachable"], found["healthy"], found["state"], found["problem"]) == (
        False, False, "unreachable", "ssh: no route",
    )  # fmt: skip


# ── The journal


def test_what_was_written_is_there_for_the_next_controller(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    run = journal.begin("rollout", tmp_path, "digest", {"bundle": "x"})
    journal.plan(run, [("canary", ["a"]), ("wave 1", ["b", "c"])])
    journal.host(run, "a", state="done", before={"release": "1-a"}, after={"release": "2-b"})
    journal.step(run, Event("ok", "a", "Do it", time.time(), 1.5))
    # killed here: not closed, no end written
    other = Journal(tmp_path / "journal.db")
    found = other.runs(verb="rollout", inventory=tmp_path)[0]
    assert (found.id, found.outcome, found.target) == (run, "running", "digest")
    assert {host: row["state"] for host, row in other.hosts(run).items()} == {
        "a": "done",
        "b": "waiting",
        "c": "waiting",
    }
    assert other.hosts(run)["a"]["before"] == {"release": "1-a"}
    other.plan(run, [("canary", ["a"]), ("wave 1", ["c"])])
    assert other.hosts(run)["a"]["state"] == "done"
    assert (tmp_path / "journal.db").stat().st_mode & 0o077 == 0


def test_resume_keeps_the_old_waves_and_adds_who_is_new(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    with pytest.raises(Unusable, match="is unfinished"):
        rollout.unfinished(journal, tmp_path)
    run = journal.begin("rollout", tmp_path, "digest")
    journal.plan(run, [("canary", ["c"]), ("wave 1", ["a", "b"])])
    journal.end(run, "paused")
    plan = rollout.Plan("2", "digest", frozenset(), [("canary", ["a"]), ("wave 1", ["c", "new"])])
    assert rollout.resumed(plan, rollout.unfinished(journal, tmp_path), journal).waves == [
        ("canary", ["c"]), ("wave 1", ["a"]), ("wave 2", ["new"]),
    ]  # fmt: skip
    journal.end(run, "done")
    with pytest.raises(Unusable, match="is unfinished"):
        rollout.unfinished(journal, tmp_path)


def test_resume_looks_again_when_it_has_the_lock(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    plan = rollout.Plan("2", "digest", frozenset(), [("canary", ["a"])])
    wanted, options, lines = rollout.Wanted(tmp_path / "bundle"), Options(tmp_path), Lines(Console(file=io.StringIO()))
    journal.plan(journal.begin("rollout", tmp_path, "digest"), plan.waves)
    old = rollout.unfinished(journal, tmp_path)
    newer = journal.begin("rollout", tmp_path, "digest")
    with pytest.raises(Unusable, match="another rollout"):
        rollout.Rollout(plan, wanted, options, journal, lines, old)
    journal.end(newer, "done")
    with pytest.raises(Unusable, match="is unfinished"):
        rollout.Rollout(plan, wanted, options, journal, lines, old)


@pytest.mark.parametrize(
    ("words", "soak", "budget", "limit"), [((), 3.0, 2, "a,b"), (("--soak", "5", "--limit", "a"), 5.0, 2, "a")]
)
def test_resume_needs_only_to_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], soak: float, budget: int, limit: str
) -> None:
    monkeypatch.setenv("NOX_STATE_DIR", str(tmp_path))
    inventory = tmp_path / "hosts.yml"
    seen: dict[str, Any] = {}
    inventory.write_text("nox: {hosts: {a: {}, b: {}, c: {}}}\n")
    release = {
        "id": "2-b",
        "version": "2",
        "python": "3.10",
        "arch": "x86_64",
        "sha256": hashlib.sha256(b"x").hexdigest(),
    }
    contents = {"format": 1, "version": "2", "releases": [release]}
    given = bundle(tmp_path / "nox.bundle", contents, {"releases/2-b.tar.gz": b"x"})
    asked = {"bundle": str(given), "soak": 3.0, "budget": 2, "on_failure": "rollback-all", "limit": "a,b"}
    journal = Journal()
    run = journal.begin("rollout", inventory, read_bundle(given)[1], asked)
    journal.plan(run, [("canary", ["b"]), ("wave 1", ["a"])])
    journal.host(run, "b", state="done")

    class Seen:
        def __init__(self, *parts: Any) -> None:
            seen.update(zip(("plan", "wanted", "options", "journal", "view", "old"), parts, strict=True))

        def go(self) -> None:
            raise Unusable("as far as this test goes")

    monkeypatch.setattr(rollout, "Rollout", Seen)
    done = CliRunner().invoke(app, ["rollout", "-i", str(inventory), "--resume", "--yes", *words])
    assert "as far as this test goes" in done.output and done.exit_code == 2
    assert "wave 1  1      a" in done.output and "canary" not in done.output
    wanted = seen["wanted"]
    assert (wanted.bundle, wanted.soak, wanted.budget, seen["options"].limit) == (given, soak, budget, limit)
    assert wanted.on_failure is rollout.OnFailure.ROLLBACK_ALL and seen["old"].id == run


def test_a_rollout_of_nothing_says_what_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOX_STATE_DIR", str(tmp_path))
    (inventory := tmp_path / "hosts.yml").write_text("nox: {hosts: {a: {}}}\n")
    done = CliRunner().invoke(app, ["rollout", "-i", str(inventory), "--yes"])
    assert done.exit_code == 2 and "noxctl rollout FILE" in done.output


HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from noxctl.journal import locked
with locked(Path(sys.argv[1]), "rollout of 9.9"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_controller_is_told_who_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOX_STATE_DIR", str(tmp_path / "state"))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path, ROOT], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(Locked, match=rf"rollout of 9.9 by .* pid {holder.pid} since \d{{4}}-"),
            locked(tmp_path, "mine"),
        ):
            pass
        with locked(tmp_path / "other", "mine"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path, "mine"):
        pass


ORPHAN = """
import subprocess, sys
sys.path.insert(0, sys.argv[2])
from noxctl.journal import locked
from pathlib import Path
code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
with locked(Path(sys.argv[1]), "a rollout"):
    left = subprocess.Popen([sys.executable, "-c", code, "ansible-playbook"], stdout=subprocess.PIPE)
    left.stdout.readline()
    print(left.pid, flush=True)
    sys.stdin.read()
"""


def test_the_ansible_of_a_killed_controller_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOX_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(journal_module, "ORPHAN_SECONDS", 0.5)
    killed = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, tmp_path, ROOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert killed.stdout is not None
    orphan = int(killed.stdout.readline())
    killed.kill()
    killed.wait()

    def lives() -> bool:
        words = Path(f"/proc/{orphan}/cmdline")
        return words.exists() and words.read_bytes() != b""  # else it only waits to be counted

    with locked(tmp_path / "other", "mine"):
        assert lives()  # another inventory's is left alone
    with locked(tmp_path, "mine"):
        assert not lives()


# ── What a person sees


def test_what_a_killed_controller_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = {f"noxctl-{gone.pid}-a": False, f"noxctl-{os.getpid()}-b": True, "noxctl-1-c": True, "noxctl-old": True}
    for name in names:
        (tmp_path / name / "artifacts").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_the_whole_of_a_rollout_is_drawn_and_said() -> None:
    waves = [("canary", 1, "done"), ("wave 1", 3, "running"), ("wave 2", 16, "waiting")]
    total = Total("rollout of 2.0", waves, done=1, failed=1, left=18, began=time.time() - 70, ends=time.time() + 300)
    screen = Screen(Console(file=io.StringIO(), force_terminal=True, width=100, height=20))
    screen.total(total)
    screen.begin("wave 1: upgrade", ["a", "b", "c"])
    screen.event(Event("task", "b", "Ship the archive", time.time()))
    screen.event(Event("failed", "c", "Run it", time.time(), result={"msg": "nox-api.service is failed\nNOX_REGION"}))
    screen.end()
    drawn = screen.console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("rollout of 2.0", "1 done", "2 failed", "17 left", "✔ canary (1)", "▶ wave 1 (3)", "· wave 2 (16)"):
        assert words in drawn
    assert re.search(r"about \d+ min", drawn)
    # the first error of a host at once, all of its lines
    assert "c: failed in Run it" in drawn and "    nox-api.service is failed" in drawn and "NOX_REGION" in drawn

    lines = Lines(Console(file=io.StringIO(), width=100))
    lines.total(total)
    lines.total(total)
    said = lines._console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("1 done, 1 failed, 18 left, about ") == 1


# ── The report


def test_the_report_needs_nothing_and_escapes_everything(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    run = journal.begin("rollout", tmp_path, "d" * 64, {"version": "2.0"})
    journal.plan(run, [("canary", ["a"]), ("wave 1", ["b"])])
    journal.wave(run, 0, "running")
    journal.step(run, Event("changed", "a", "Ship the archive", time.time(), 2.0))
    journal.host(
        run, "a", state="failed", task="gate", error="<script>alert(1)</script>\x1b[2J", before={"release": "1-a"}
    )
    journal.wave(run, 0, "failed")
    journal.note(run, "Stopped after the canary: a.")
    journal.end(run, "stopped")
    found = journal.run(run)
    assert found is not None
    page = report.page(journal, found)
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "\x1b" not in page
    assert "http://" not in page and "https://" not in page
    for text in ("Stopped after the canary: a.", "Ship the archive", "1-a", "wave 1"):
        assert text in page


# ── Bundles


def bundle(path: Path, contents: dict[str, Any], files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in {"BUNDLE.json": json.dumps(contents).encode(), **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_a_bundle_is_read_only_whole(tmp_path: Path) -> None:
    data = b"a release"
    digest = "1d7c5bb4c4ff7ac4a6ec0aba2b4ec7e4ec2b3b1d2aa2ae6d4c1ddc8c4b2b5f29"
    release = {"id": "2-b", "version": "2", "python": "3.10", "arch": "x86_64", "sha256": digest}
    contents = {"format": 1, "version": "2", "releases": [release]}
    with pytest.raises(Unusable, match=r"2-b.tar.gz is damaged"):
        read_bundle(bundle(tmp_path / "bad", contents, {"releases/2-b.tar.gz": data}))
    release["sha256"] = rollout.hashlib.sha256(data).hexdigest()
    good = bundle(tmp_path / "good", contents, {"releases/2-b.tar.gz": data})
    assert read_bundle(good)[0]["version"] == "2"
    with pytest.raises(Unusable, match="toolkit reads 1"):
        read_bundle(bundle(tmp_path / "new", {**contents, "format": 7}, {}))
    (tmp_path / "none").write_bytes(b"hello")
    with pytest.raises(Unusable, match="is no bundle"):
        read_bundle(tmp_path / "none")
    with pytest.raises(Unusable, match="not abc"):
        rollout.Plan.make(rollout.Wanted(good, sha256="abc"), HOSTS)


# ── The command


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--help"], 0, "Exit codes"),
        (["rollout", "--help"], 0, "--canary"),
        (["harden", "--help"], 0, "playbooks/harden.yml"),
        (["status"], 2, "inventory"),
        (["status", "-i", "/nowhere"], 2, "does not exist"),
        (["rollout", "/nowhere", "-i", "/nowhere"], 2, "does not exist"),
        (["report", "nonesuch"], 2, "noxctl runs"),
    ],
)
def test_bad_input_is_named(words: list[str], code: int, says: str, tmp_path: Path) -> None:
    environment = {"NOX_STATE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "COLUMNS": "160", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "noxctl", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code and says in done.stdout + done.stderr
