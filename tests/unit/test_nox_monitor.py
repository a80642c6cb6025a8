"""nox-monitor: log following, counting and measuring, against made-up hosts and real processes."""

from __future__ import annotations

import http.server
import importlib.machinery
import importlib.util
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "roles/nox_tools/files/nox-monitor"


def load() -> Any:
    """Import the script, whose name no import statement can say."""
    loader = importlib.machinery.SourceFileLoader("nox_monitor", str(SCRIPT))
    spec = importlib.util.spec_from_loader("nox_monitor", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["nox_monitor"] = module  # dataclasses look themselves up
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


monitor = load()
TOKEN = "0123456789abcdef" * 4


def write(root: Path, name: str, text: str) -> Path:
    path = root / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


# --- following a log ---


def test_only_what_is_added_is_read(tmp_path: Path) -> None:
    log = write(tmp_path, "log", "old\n")
    follower = monitor.Follower(log)
    assert list(follower.lines()) == []
    add(log, "one\ntwo\n")
    assert list(follower.lines()) == ["one", "two"]
    assert list(follower.lines()) == []


def test_the_first_read_may_look_back_and_starts_at_a_whole_line(tmp_path: Path) -> None:
    log = write(tmp_path, "log", "first\nsecond\nthird\n")
    assert list(monitor.Follower(log, 1000).lines()) == ["first", "second", "third"]
    assert list(monitor.Follower(log, 9).lines()) == ["third"]


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    log = write(tmp_path, "log", "")
    follower = monitor.Follower(log)
    add(log, "one\nha")
    assert list(follower.lines()) == ["one"]
    add(log, "lf\n")
    assert list(follower.lines()) == ["half"]


def test_no_line_is_lost_or_read_twice_when_the_log_is_rotated(tmp_path: Path) -> None:
    log = write(tmp_path, "log", "")
    follower = monitor.Follower(log)
    add(log, "one\n")
    assert list(follower.lines()) == ["one"]
    add(log, "last of the old\n")
    log.rename(tmp_path / "log.1")
    log.write_text("first of the new\n")
    assert list(follower.lines()) == ["last of the old", "first of the new"]
    add(log, "two\n")
    assert list(follower.lines()) == ["two"]


def test_a_truncated_log_is_read_from_its_start(tmp_path: Path) -> None:
    log = write(tmp_path, "log", "a long line of the past\n")
    follower = monitor.Follower(log)
    log.write_text("new\n")
    assert list(follower.lines()) == ["new"]


def test_a_log_that_appears_later_is_read_whole(tmp_path: Path) -> None:
    follower = monitor.Follower(tmp_path / "log")
    assert list(follower.lines()) == []
    assert follower.readable
    write(tmp_path, "log", "one\n")
    assert list(follower.lines()) == ["one"]


# --- counting ---


def request(status: int, duration: float, path: str = "/files", **more: object) -> dict[str, Any]:
    return {"event": "request", "path": path, "status": status, "duration_ms": duration, **more}


def test_traffic_is_counted_by_status_with_latencies() -> None:
    records = [request(200, value) for value in range(1, 101)]
    records += [request(200, 500, "/run_py", run_status="ok")] * 3
    records += [request(200, 2000, "/run_sh", run_status="timeout"), {"event": "started"}]
    traffic = monitor.summarize(records, 10)
    assert (traffic.requests, traffic.requests_per_second) == (104, 10.4)
    assert (traffic.runs, traffic.runs_per_second) == (4, 0.4)
    assert traffic.statuses == {"200": 104}
    assert traffic.run_statuses == {"ok": 3, "timeout": 1}
    assert (traffic.p50_ms, traffic.p95_ms) == (52, 99)
    assert (traffic.run_p50_ms, traffic.run_p95_ms) == (500, 2000)


def test_no_traffic_has_no_latency() -> None:
    assert monitor.summarize([], 5).p95_ms is None


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 2), (0.75, 3), (0.95, 4), (1.0, 4)])
def test_percentiles_are_values_that_occurred(share: float, value: float) -> None:
    assert monitor.percentile([4, 2, 1, 3], share) == value


def test_settings_the_service_would_refuse_are_passed_over() -> None:
    text = "# NOX_PORT=1\nexport NOX_PORT='9'  # why\nNOX_SLOTS=a b\nNOX_QUEUE=\"open\n"
    assert monitor.read_settings(text) == {"NOX_PORT": "9"}


# --- measuring ---


def stat_line(pid: int, parent: int, cpu_ticks: int, pages: int) -> str:
    """A line of /proc/PID/stat of a process whose name is meant to confuse."""
    fields = ["S", str(parent), *["0"] * 9, str(cpu_ticks), "0", "0", "0", *["0"] * 6, str(pages)]
    return f"{pid} (a) (b c) {' '.join(fields)} 0\n"


def test_usage_of_a_service_comes_from_its_cgroup(tmp_path: Path) -> None:
    cgroup = "/system.slice/nox-runner.service"
    base = f"/sys/fs/cgroup{cgroup}"
    write(tmp_path, f"{base}/cgroup.procs", "10\n")
    write(tmp_path, f"{base}/runs/1/cgroup.procs", "11\n12\n")
    write(tmp_path, f"{base}/cpu.stat", "usage_usec 2500000\nuser_usec 1\n")
    write(tmp_path, f"{base}/memory.current", "4096000\n")
    used = monitor.usage(monitor.Host(tmp_path), cgroup, 10)
    assert used == monitor.Usage(2.5, 4096000, 3)


def test_usage_without_a_cgroup_comes_from_the_descendants(tmp_path: Path) -> None:
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    write(tmp_path, "/proc/10/stat", stat_line(10, 1, ticks, 5))
    write(tmp_path, "/proc/11/stat", stat_line(11, 10, ticks, 2))
    write(tmp_path, "/proc/12/stat", stat_line(12, 11, 0, 1))
    write(tmp_path, "/proc/99/stat", stat_line(99, 1, ticks, 1))
    host = monitor.Host(tmp_path)
    assert monitor.usage(host, "", 10) == monitor.Usage(2.0, 8 * page, 3)
    assert monitor.usage(host, "", 0) is None


def test_cpu_is_measured_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([monitor.Usage(1.0, 5, 1), monitor.Usage(2.5, 5, 1), monitor.Usage(0.1, 5, 1)])
    clock = iter([100.0, 103.0, 106.0])
    monkeypatch.setattr(monitor, "usage", lambda *_: next(used))
    monkeypatch.setattr(monitor.time, "monotonic", lambda: next(clock))
    services = monitor.Services(monitor.Host(tmp_path))
    unit = {"ActiveState": "active", "SubState": "running", "MainPID": "7"}
    looks = [services.look_at("nox-api.service", unit) for _ in range(3)]
    # After a restart the counter begins anew: unknown, not negative.
    assert [look.cpu_percent for look in looks] == [None, 50.0, None]
    assert looks[0].state == "active (running)"


def test_the_sandbox_is_measured_without_following_links(tmp_path: Path) -> None:
    write(tmp_path, "/box/a", "x" * 5000)
    write(tmp_path, "/box/deep/b", "x" * 5000)
    (tmp_path / "box/link").symlink_to("/")
    disk = monitor.disk_use(monitor.Host(tmp_path), "/box")
    assert (disk.sandbox_files, disk.complete) == (2, True)
    assert disk.sandbox_bytes >= 10000
    assert disk.total_bytes > disk.free_bytes > 0
    assert monitor.disk_use(monitor.Host(tmp_path), "/none").total_bytes is None


def test_a_huge_sandbox_is_counted_in_part_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write(tmp_path, f"/box/{number}/file", "")
    monkeypatch.setattr(monitor, "MAX_ENTRIES", 3)
    disk = monitor.disk_use(monitor.Host(tmp_path), "/box")
    assert not disk.complete
    assert "at least" in monitor.render_disk(disk)[0]


# --- health and ticks ---


class Server(http.server.ThreadingHTTPServer):
    """Answers /health and notes the tokens it was sent."""

    tokens: list[str | None]


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            running.tokens.append(self.headers.get("Authorization"))
            body = b'{"status": "ok", "version": "1.2.3"}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    running = Server(("127.0.0.1", 0), Handler)
    running.tokens = []
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def settings(port: int) -> dict[str, str]:
    return {"NOX_API_TOKEN": TOKEN, "NOX_PORT": str(port)}


def test_health_is_asked_for_with_the_token(tmp_path: Path, server: Server) -> None:
    health = monitor.get_health(monitor.Host(tmp_path), settings(server.server_address[1]))
    assert health["version"] == "1.2.3"
    assert server.tokens == [f"Bearer {TOKEN}"]


def test_another_user_on_the_port_gets_no_token(tmp_path: Path, server: Server) -> None:
    port = server.server_address[1]
    write(tmp_path, "/etc/passwd", "nox-api:x:990:990::/:/x\n")
    row = f"0: 0100007F:{port:04X} 00000000:0000 0A 0:0 0:0 0 33 0 7 1"
    write(tmp_path, "/proc/net/tcp", f"header\n{row}\n")
    monitor.get_health(monitor.Host(tmp_path), settings(port))
    assert server.tokens == [None]


def test_without_root_the_port_is_the_one_nox_listens_on(tmp_path: Path, server: Server) -> None:
    write(tmp_path, "/etc/passwd", "nox-api:x:990:990::/:/x\n")
    row = f"0: 0100007F:{server.server_address[1]:04X} 0:0 0A 0:0 0:0 0 990 0 7 1"
    write(tmp_path, "/proc/net/tcp", f"header\n{row}\n")
    assert monitor.get_health(monitor.Host(tmp_path), {})["status"] == "ok"
    assert server.tokens == [None]


def test_no_answer_is_an_error_and_no_exception(tmp_path: Path) -> None:
    assert "error" in monitor.get_health(monitor.Host(tmp_path), settings(1))
    assert "error" in monitor.get_health(monitor.Host(tmp_path), {"NOX_PORT": "none"})


def test_ticks_tell_what_is_new(tmp_path: Path, server: Server) -> None:
    clock = [1_700_000_000.0]
    host = monitor.Host(tmp_path, lambda: clock[0])
    config = settings(server.server_address[1])
    write(tmp_path, monitor.CONFIG, "".join(f"{key}={value}\n" for key, value in config.items()))
    recent = dict(request(200, 5.0), time="2023-11-14T22:13:18Z")
    ancient = dict(request(500, 5.0), time="2023-11-14T20:00:00.000Z")
    log = write(tmp_path, monitor.LOG, f"{json.dumps(ancient)}\n{json.dumps(recent)}\n")
    error = {"time": "t", "level": "error", "event": "broken \x1b[2J"}
    write(tmp_path, monitor.ERROR_LOG, json.dumps(error) + "\n")
    watching = monitor.Monitor(host, 10)
    first = watching.tick()
    assert first.traffic.statuses == {"200": 1}  # of the last 10 s, not of the whole log
    assert first.traffic.requests_per_second == 0.1
    assert first.errors == ["t ERROR broken  [2J"]
    add(log, json.dumps(dict(recent, status=429)) + "\n")
    clock[0] += 4
    second = watching.tick()
    assert (second.seconds, second.traffic.statuses) == (4.0, {"429": 1})
    screen = monitor.render(second)
    assert "429 0.25/s" in screen and "version 1.2.3" in screen and "broken" in screen
    assert TOKEN not in screen and "\x1b" not in screen


# --- languages, and the terminal's size ---


def test_french_has_every_phrase_with_its_placeholders() -> None:
    assert list(monitor.FRENCH) == list(monitor.ENGLISH)
    for name, text in monitor.ENGLISH.items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", monitor.FRENCH[name])), name
        assert not re.search(r" [:;?!]", monitor.FRENCH[name]), name


def test_the_locale_decides(tmp_path: Path) -> None:
    watching = monitor.Monitor(monitor.Host(tmp_path), 10)
    try:
        monitor.speak({"LC_ALL": "fr_FR.UTF-8"})
        screen = monitor.render(watching.tick())
        assert "dernières erreurs\n  aucune" in screen and "exécutions  0,00/s" in screen
        monitor.speak({"LC_ALL": "C", "LANG": "fr_FR.UTF-8"})
        assert "last errors\n  none" in monitor.render(watching.tick())
    finally:
        monitor.speak({})


def test_a_screen_is_cut_to_the_terminal() -> None:
    text = "\n".join(["x" * 100, *map(str, range(50))])
    lines = monitor.fit(text, os.terminal_size((80, 24))).splitlines()
    assert len(lines) == 23
    assert lines[0] == "x" * 79 + "…"
    assert monitor.fit("short", os.terminal_size((80, 24))) == "short"


# --- the program itself ---


@pytest.mark.parametrize("arguments", [[], ["x"], ["0"], ["-1"], ["nan"], ["inf"], ["1", "--count", "0"], ["1", "2"]])
def test_bad_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        monitor.parse_arguments(arguments)
    assert ended.value.code == 2
    assert "usage: nox-monitor" in capsys.readouterr().err


def test_json_ticks_are_one_object_per_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert monitor.main(["0.1", "--count", "2", "--json"], monitor.Host(tmp_path)) == 0
    ticks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(ticks) == 2
    assert set(ticks[0]["services"]) == {"nox-api.service", "nox-runner.service"}


def test_ctrl_c_ends_it_well() -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    with subprocess.Popen(
        [sys.executable, "-I", str(SCRIPT), "60", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs, CI's among them, start with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    ) as process:
        assert process.stdout and process.stderr
        assert json.loads(process.stdout.readline())["version"] == monitor.VERSION
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_ticks_come_at_even_distances_however_slow_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    times: list[float] = []

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def show(_: object) -> None:
        times.append(clock[0])
        clock[0] += 4 if len(times) < 3 else 25

    monkeypatch.setattr(monitor, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    monitor.watch(SimpleNamespace(seconds=10, tick=lambda: None), 5, show)
    steps = [after - before for before, after in itertools.pairwise(times)]
    # One that took longer than the distance delays the next, and is not made up for.
    assert steps == pytest.approx([10, 10, 25, 25])
