"""Rollouts on a living fleet, under constant load through its edge. The tests build on each other, in this order."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPSConnection
from pathlib import Path
from ssl import create_default_context

import pytest
from rollouts import (
    BAD,
    ENVIRONMENT,
    HOSTS,
    INVENTORY,
    LOST,
    ROOT,
    STATE,
    Started,
    check,
    current,
    fleet,
    journal_states,
    machine,
    noxctl,
    on,
    power_off,
    power_on,
    rollout,
    seen,
    serving,
    states,
    when,
)  # fmt: skip

CANARY, *OTHERS = HOSTS
WAVES = ("--waves", "1,100%", "-e", "nox_smoke_stable_seconds=2")


def test_all_are_healthy_before() -> None:
    found = fleet()
    assert sorted(found) == sorted(HOSTS)
    for one in found.values():
        assert one["reachable"] and one["healthy"] and one["drift"] == "clean", one
        assert one["version"] and one["release"].startswith(one["version"])


def test_the_edge_installed_again_changes_nothing() -> None:
    words = ["ansible-playbook", "-i", str(INVENTORY), "playbooks/edge.yml"]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"edge1 +: ok=\d+ +changed=0 ", done.stdout), done.stdout


def test_no_connection_is_lost_while_the_edge_takes_over_another_list() -> None:
    """Many at a time, thirty reloads one after the other: the kernel hands on those that the old socket had not accepted yet, and
    there is a certificate for each handshake."""
    over, address = threading.Event(), machine("edge1").address
    trust = create_default_context(cafile=INVENTORY / ".ca/edge1.edge.crt")

    def ask() -> int:
        found = 0
        while not over.is_set():
            connection = HTTPSConnection(address, context=trust, timeout=30)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            connection.close()
            found += 1
        return found

    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(ask) for _ in range(16)]
        on("edge1", "for i in $(seq 30); do systemctl reload caddy.service; done")
        over.set()
    total = sum(one.result() for one in running)
    print(f"while the edge was reloaded thirty times: {total} requests answered", flush=True)
    assert total > 300


# The edge's own configuration, but that it renews what is older than four seconds, and looks every two.
RENEW_AT_ONCE = """
import json, subprocess, sys
words = ["caddy", "adapt", "--config", "/etc/caddy/Caddyfile"]
found = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
automation = found["apps"]["tls"]["automation"]
automation["renew_interval"] = "2s"
for policy in automation["policies"]:
    policy["renewal_window_ratio"] = 0.9999
json.dump(found, sys.stdout)
"""


def test_the_edge_renews_its_certificate_though_it_was_given_a_copy() -> None:
    address = machine("edge1").address
    own = seen("edge1", f"/var/lib/caddy/.local/share/caddy/certificates/local/{address}/{address}.crt")
    on("edge1", "systemctl reload caddy.service")
    before = own.read_text()
    assert on("edge1", f"cat /run/nox-edge/{address}.pem").startswith(before)
    on(
        "edge1",
        f"python3 -c {shlex.quote(RENEW_AT_ONCE)} > /run/renew.json && caddy reload --force --config /run/renew.json",
    )
    try:
        when(lambda: own.read_text() != before)
    finally:
        on("edge1", "rm -f /run/renew.json; systemctl reload caddy.service")


@pytest.mark.fault("none", "exit 0, everywhere, no request lost")
def test_a_good_release_reaches_everybody_and_no_request_is_lost(load: None) -> None:
    code, result = rollout("0.2.0", "--soak", "3", *WAVES)
    assert (code, result["outcome"]) == (0, "done")
    assert set(states(result).values()) == {"done"}
    check(dict.fromkeys(HOSTS, "0.2.0"))


def test_a_second_time_there_is_nothing_to_do() -> None:
    code, result = rollout("0.2.0")
    assert code == 0 and set(states(result).values()) == {"already"}


@pytest.mark.fault("release that crashes at once", "exit 5 after the canary, which never ran it; no request lost")
def test_a_release_that_crashes_never_reaches_a_second_host(load: None) -> None:
    code, result = rollout("0.3.0", "--canary", HOSTS[1])
    assert (code, result["outcome"]) == (5, "stopped")
    bad = next(one for one in result["hosts"] if one["host"] == HOSTS[1])
    assert bad["state"] == "failed" and "this release is broken" in bad["error"]
    assert bad["release_after"] == bad["release_before"]
    assert [state for host, state in states(result).items() if host != HOSTS[1]] == ["waiting"] * (len(HOSTS) - 1)
    check(dict.fromkeys(HOSTS, "0.2.0"))
    # code that can't even be loaded is never switched to
    assert not [host for host in HOSTS if "0.3.0" in seen(host, "/opt/nox/manifest.json").read_text()]


@pytest.mark.fault(
    "release that fails 20 s after its start", "exit 5 after the canary, which is on the old release again"
)
def test_a_release_that_fails_later_goes_back() -> None:
    # Without load: a front that crashes takes the requests with it that it was just answering.
    code, result = rollout("0.4.0", "--soak", "25", *WAVES)
    assert (code, result["outcome"]) == (5, "stopped")
    found = states(result)
    # by the gate; on a machine so slow that the upgrade itself took 20 s, by that
    assert found.pop(CANARY) in ("rolled back", "failed")
    assert found == dict.fromkeys(OTHERS, "waiting")
    check(dict.fromkeys(HOSTS, "0.2.0"))


@pytest.mark.fault("a bad host, and one that loses power", "both counted, all others done; no request lost")
def test_a_bad_host_and_a_lost_host_lose_no_request(load: None) -> None:
    before = current(BAD).partition("-")[0]
    running = Started("0.5.0", *WAVES, "--budget", "2", "--soak", "1")
    running.until("wave 1: upgrade")  # by now the edge sends nothing to this wave
    when(lambda: current(LOST).startswith("0.5.0"))
    power_off(LOST)
    assert running.end() == 1
    assert journal_states() == dict.fromkeys(HOSTS, "done") | {BAD: "failed", LOST: "unreachable"}
    assert "this release is broken on this host" in running.text
    assert serving() == [host for host in HOSTS if host != LOST]
    power_on()
    # it began with the new release, which nobody had tested there: it is tested now, and serves again
    code, result = rollout("0.5.0", "--limit", f"all:!{BAD}", "--soak", "1")
    assert code == 0 and states(result) == {host: "already" for host in HOSTS if host not in (BAD, LOST)} | {
        LOST: "done"
    }
    check(dict.fromkeys(HOSTS, "0.5.0") | {BAD: before})


@pytest.mark.fault("controller killed; another one meanwhile", "exit 7 for the other; --resume: exit 0, nothing twice")
def test_a_killed_controller_goes_on_where_it_was(load: None) -> None:
    first = Started("0.2.0", "--soak", "1", *WAVES)
    first.until("wave 1: upgrade")
    # meanwhile nobody else may
    second = noxctl(*first.words)
    assert second.returncode == 7 and f"pid {first.process.pid}" in second.stderr
    first.kill()
    other = noxctl("rollout", str(Path(first.words[1]).with_name("0.5.0.bundle")), "--yes", "--resume")
    assert other.returncode == 2 and "another bundle" in other.stderr
    code, result = rollout("0.2.0", "--resume", "--soak", "1", *WAVES)
    assert (code, result["outcome"]) == (0, "done")
    assert states(result)[CANARY] == "done" and set(states(result).values()) <= {"done", "already"}
    check(dict.fromkeys(HOSTS, "0.2.0"))
    # the canary was not changed a second time
    entries = [
        entry["release"].partition("-")[0] for entry in json.loads(seen(CANARY, "/opt/nox/manifest.json").read_text())
    ]
    assert entries[-2:] == ["0.5.0", "0.2.0"]


def test_a_script_runs_everywhere(tmp_path: Path) -> None:
    script = tmp_path / "sum.py"
    script.write_text("import sys; print(sum(int(word) for word in sys.argv[1:]))")
    done = noxctl("run", str(script), "--json", "--", "20", "22")
    assert {one["host"]: one["result"]["stdout"] for one in json.loads(done.stdout)} == dict.fromkeys(HOSTS, "42\n")


def test_reports_and_the_secrets_are_nowhere(token: str, password: str, tmp_path: Path) -> None:
    for run in json.loads(noxctl("runs", "--json").stdout):
        assert noxctl("report", run["id"], "--out", str(tmp_path / f"{run['id']}.html")).returncode == 0
    texts = [path for place in (STATE, tmp_path) for path in place.rglob("*") if path.is_file()]
    assert len(texts) > 5
    wanted = (token.encode(), password.encode())
    assert not [path for path in texts if any(secret in path.read_bytes() for secret in wanted)]
    # and on the hosts, beside the settings: their journals, logs, records and temporary files
    for host in HOSTS:
        assert token not in on(host, "journalctl --no-pager")
        places = [seen(host, place) for place in ("/var/log", "/var/lib/nox", "/tmp", "/var/tmp", "/root/.ansible")]
        kept = [path for place in places for path in place.rglob("*") if path.is_file()]
        assert len(kept) > 3
        assert not [path for path in kept if token.encode() in path.read_bytes()]
