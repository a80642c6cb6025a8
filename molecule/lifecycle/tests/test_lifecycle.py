"""In the order of a life: what is done to a host changes what comes after."""

from __future__ import annotations

import base64
import stat
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import INVENTORIES, INVENTORY, PROJECT, Nox, Poll, load, play

INSTALLED: list[str] = []  # the releases before the first upgrade


def lost(counts: list[dict[str, Any]]) -> list[str]:
    assert all(count["requests"] > 20 for count in counts)
    return [example for count in counts for example in count["examples"]]


@pytest.mark.parametrize("command", ["restart nox-api", "reload nox-api", "restart nox-runner"])
def test_no_request_is_lost_by(command: str, noxes: list[Nox]) -> None:
    before = [one.services() for one in noxes]
    with load(noxes, f"systemctl {command}, three times") as counts:
        for _ in range(3):
            time.sleep(1)  # of load between them
            for one in noxes:
                one.run(f"systemctl {command}")
        time.sleep(1)
    assert lost(counts) == []
    assert ([one.services() for one in noxes] == before) == command.startswith("reload")


def test_the_address_follows_the_settings(noxes: list[Nox]) -> None:
    one = noxes[0]
    listens = "ss -Hltn | awk '{print $4}' | grep -E ':(8080|8099)$'; true"
    assert one.run(listens) == "127.0.0.1:8080"
    for port in ("8099", "8080"):
        one.run(f"sed -i 's/^NOX_PORT=.*/NOX_PORT={port}/' /etc/default/nox-api && systemctl restart nox-api")
        assert one.run(listens) == f"127.0.0.1:{port}"
    one.run("systemctl stop nox-api")
    assert one.run(listens) == ""
    one.run("systemctl start nox-api")


def test_a_good_release(noxes: list[Nox], tree: Any) -> None:
    source = tree("good", "pyproject.toml", 'version = "0.', 'version = "1.')
    INSTALLED[:] = [one.release() for one in noxes]
    for one in noxes:
        one.run("sed -i 's/^NOX_HISTORY=.*/NOX_HISTORY=on/' /etc/default/nox-api && systemctl reload nox-api")
    runs = [one.remembered_run("print('before')") for one in noxes]
    with load(noxes, "upgrade") as counts:
        play("upgrade", nox_release_source=source)
    assert lost(counts) == []
    for one, before in zip(noxes, INSTALLED, strict=True):
        assert one.release().startswith("1.") and one.release() != before
        assert one.manifest()[-1]["healthy"]
    assert [one.ask(f"/history/{run}")["source"] for one, run in zip(noxes, runs, strict=True)] == [
        "print('before')"
    ] * 2
    # Whatever is to be kept: never the running release is pruned, nor the one that a rollback would go to.
    assert play("upgrade", nox_release_source=source, nox_release_keep=1).count("changed=0") == 2
    for one, before in zip(noxes, INSTALLED, strict=True):
        assert set(one.run("ls /opt/nox/releases").split()) == {before, one.release()}


def test_a_repair_changes_no_version(noxes: list[Nox]) -> None:
    """These hosts run a release that isn't this checkout's: its own archive mends it, and nothing else may."""
    releases = [one.release() for one in noxes]
    damage = "rm -r /opt/nox/current/venv/lib/python3*/site-packages/fastapi"
    for one in noxes:
        one.run(damage)
    play("repair")
    assert [one.release() for one in noxes] == releases
    one, archive = noxes[0], f"{releases[0]}.tar.gz"
    one.run(f"{damage} && mv /opt/nox/archives/{archive} /var/tmp")
    assert "A repair changes no version" in play("repair", wanted=2)
    assert one.release() == releases[0] and one.run("ls /opt/nox/archives/1.*; true") == ""
    one.run(f"mv /var/tmp/{archive} /opt/nox/archives")
    play("repair")
    assert [one.release() for one in noxes] == releases
    assert play("drift").count("changed=0") == 2


def test_a_release_that_cannot_be_loaded_is_not_switched_to(noxes: list[Nox], tree: Any) -> None:
    source = tree("unloadable", "nox_api/runs.py", "import json\n", "import json\nimport absent_module\n")
    before = [(one.release(), one.services(), one.manifest()) for one in noxes]
    assert "absent_module" in play("upgrade", nox_release_source=source, wanted=2)
    assert [(one.release(), one.services(), one.manifest()) for one in noxes] == before


def test_a_release_that_crashes_goes_back(noxes: list[Nox], tree: Any) -> None:
    crash = '    raise RuntimeError("it crashes")\n    state: State = app.state.nox\n    settings = '
    source = tree("crash", "nox_api/server.py", "    state: State = app.state.nox\n    settings = ", crash)
    before = [one.release() for one in noxes]
    with load(noxes, "upgrade to a release that crashes") as counts:
        assert "runs " + before[0] + " again" in play("upgrade", nox_release_source=source, wanted=2)
    assert lost(counts) == []
    assert [one.release() for one in noxes] == before
    for one in noxes:
        failed, back = one.manifest()[-2:]
        assert failed["failed"] and not failed["healthy"] and back["release"] == one.release() and back["healthy"]


def test_a_release_that_gives_wrong_answers_goes_back(noxes: list[Nox], tree: Any) -> None:
    source = tree("sick", "nox_api/runs.py", 'stdout=stdout.decode("utf-8", "replace")', 'stdout="wrong"')
    before = [one.release() for one in noxes]
    output = play("upgrade", nox_release_source=source, wanted=2)
    assert "runs " + before[0] + " again" in output and "FAIL" in output
    assert [one.release() for one in noxes] == before
    assert play("drift").count("changed=0") == 2  # and status 0: clean


def test_an_archive_damaged_on_the_way_is_refused(noxes: list[Nox]) -> None:
    one = noxes[0]
    before = one.release(), one.manifest(), one.run("ls -A /opt/nox/releases")
    one.run(
        f"cp /opt/nox/archives/{one.release()}.tar.gz /var/tmp/damaged && "
        "printf XXXX | dd of=/var/tmp/damaged bs=1 seek=200000 conv=notrunc status=none"
    )
    whole = one.run(f"sha256sum < /opt/nox/archives/{one.release()}.tar.gz").split()[0]
    arguments = f"id=9.9.9-{whole[:12]} sha256={whole} archive=/var/tmp/damaged"
    command = ["ansible", *INVENTORIES, "nox1", "-b", "-m", "nox.platform.nox_release", "-a", arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "SHA-256 is" in done.stdout
    assert (one.release(), one.manifest(), one.run("ls -A /opt/nox/releases")) == before
    one.run("rm /var/tmp/damaged")


def test_rollback(noxes: list[Nox]) -> None:
    # The way back is the record's, not that of the files.
    for one in noxes:
        one.run(
            "touch -d 2001-01-01 /opt/nox/releases/* && touch /opt/nox/releases/$(basename $(readlink /opt/nox/current))"
        )
    with load(noxes, "rollback") as counts:
        play("rollback")
    assert lost(counts) == []
    assert [one.release() for one in noxes] == INSTALLED
    assert "There are: 1." in play("rollback", nox_release_back_to="9.9.9-000000000000", wanted=2)
    assert "is no release" in play("rollback", nox_release_back_to="../x", wanted=2)


def test_a_repair_stays_with_the_release_that_was_gone_back_to(noxes: list[Nox]) -> None:
    """Its tests failed, because the proxy was down, so the record still names the release that was left as a failed one."""
    one, old = noxes[0], noxes[0].release()
    new = one.run("ls /opt/nox/releases | grep ^1")
    play("rollback", "--limit", "nox1", nox_release_back_to=new)
    one.run("systemctl stop caddy")
    play("rollback", "--limit", "nox1", wanted=2, nox_release_back_to=old, nox_release_failed=new)
    one.run("systemctl start caddy")
    assert one.release() == old and new in one.run("cat /var/lib/nox/state.json")
    play("repair", "--limit", "nox1")
    assert one.release() == old and one.manifest()[-1]["healthy"]
    play("drift", "--limit", "nox1")


def test_another_token(noxes: list[Nox]) -> None:
    old = [one.token() for one in noxes]
    polls = [Poll(one) for one in noxes]
    for poll in polls:
        poll.start()
    output = play("rotate_token", "--diff", "-vv", nox_token_overlap=600)
    new = [one.token() for one in noxes]
    assert not set(old) & set(new)
    assert not any(token in output for token in [*old, *new])
    assert "still accepted until" in play("rotate_token", wanted=2)  # not a third one
    for one, poll, token, before in zip(noxes, polls, new, old, strict=True):
        assert one.status(before) == 200
        poll.token = token
    time.sleep(0.5)
    play("rotate_token", nox_token_end=True)
    time.sleep(0.5)
    for one, poll, before in zip(noxes, polls, old, strict=True):
        assert set(poll.end()) == {200} and len(poll.statuses) > 20
        assert one.status(before) == 401
        secrets = "|".join([before, one.token()])
        found = one.run(f"grep -rlE '{secrets}' /var/log/nox-api /proc/[0-9]*/environ 2>/dev/null; true")
        assert found == "" and before not in one.run("journalctl --no-pager -q")
    assert "no number of seconds" in play("rotate_token", nox_token_overlap="soon", wanted=2)


def test_a_support_bundle_holds_no_secret(noxes: list[Nox], tmp_path: Path) -> None:
    one = noxes[0]
    token = one.token()
    # Wherever a token may have got to by somebody's carelessness.
    one.run(
        f'logger -t nox-api \'token is {token}\'; echo \'{{"event": "x", "header": "Bearer {token}"}}\' '
        f">> /var/log/nox-api/error.log; echo '# NOX_API_TOKEN={token[::-1]}' >> /etc/default/nox-api; "
        f"echo {base64.b64encode(f'nox:{token}'.encode()).decode()} >> /var/log/nox-api/error.log; "
        "systemd-cat -t x echo password=hunter2hunter2"
    )
    play("support", nox_support_dir=str(tmp_path))
    one.run("sed -i '/^# NOX_API_TOKEN=/d' /etc/default/nox-api")
    bundles = {name: tmp_path / f"{name}.tar.gz" for name in ("nox1", "nox2")}
    for path in bundles.values():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    with tarfile.open(bundles["nox1"]) as bundle:
        texts = {member.name: bundle.extractfile(member).read() for member in bundle}  # type: ignore[union-attr]
    everything = b"\n".join(texts.values()).decode()
    for form in (token, token[::-1], base64.b64encode(token.encode()).decode()[:40]):
        assert form not in everything
    assert base64.b64encode(f"nox:{token}".encode()).decode()[8:60] not in everything
    assert "<struck out>" in everything and '"event": "x"' in everything
    assert "ready" in texts["nox-support/logs/var/log/nox-api/nox-api.log"].decode()
    assert "nox-api.service" in texts["nox-support/units.txt"].decode()


def listing(one: Nox) -> list[str]:
    script = (PROJECT / "tests/listing.sh").read_text()
    return str(one.host.run("bash -c %s", script).stdout).splitlines()


def test_backup_uninstall_restore(noxes: list[Nox], tmp_path: Path) -> None:
    one = noxes[1]
    one.run(
        "cd /home/nox/nox/sandbox && mkdir -p deep/er && echo kept > deep/er/kept.txt && ln -s /etc/shadow link && "
        "chown -hR nox:nox deep link && chmod 640 deep/er/kept.txt && sed -i 's/^NOX_QUEUE=.*/NOX_QUEUE=7/' /etc/default/nox-api"
    )
    sandbox = "cd /home/nox/nox/sandbox && find . -mindepth 1 -printf '%p %u %m %l %s %T@\\n' | sort"
    run = one.remembered_run("print('saved')")
    about = one.token(), one.release(), one.run(sandbox), one.manifest()
    assert "nox_backup_dir" in play("backup", wanted=2)
    play("backup", "--limit=nox2", nox_backup_dir=str(tmp_path))
    (archive,) = tmp_path.glob("nox2-*.tar.gz")
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    with tarfile.open(archive) as whole, tarfile.open(fileobj=whole.extractfile("sandbox.tar")) as files:
        assert files.getmember("./link").linkname == "/etc/shadow"
    assert one.run("ls -A /var/tmp | grep ^nox-; true") == ""

    assert "nox_uninstall_confirm" in play("uninstall", "--limit=nox2", wanted=2)
    before = listing(one)
    play("uninstall", "--limit=nox2", "--check")
    assert listing(one) == before
    play("uninstall", "--limit=nox2", nox_uninstall_confirm=True)
    fresh = (INVENTORY / ".listing-nox2").read_text().split("\n")
    assert [line.rstrip() for line in listing(one)] == [line.rstrip() for line in fresh if line.strip()]
    assert "changed=0" in play("uninstall", "--limit=nox2", nox_uninstall_confirm=True)

    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(archive.read_bytes()[:-1000])
    (tmp_path / "damaged.tar.gz.sha256").write_text((tmp_path / f"{archive.name}.sha256").read_text())
    assert "damaged" in play("restore", "--limit=nox2", nox_restore_from=str(damaged), wanted=2)
    play("restore", "--limit=nox2", nox_restore_from=str(archive))
    assert (one.token(), one.release(), one.run(sandbox), one.manifest()) == about
    assert one.run("grep ^NOX_QUEUE= /etc/default/nox-api") == "NOX_QUEUE=7"
    assert one.status(about[0]) == 200
    assert one.ask(f"/history/{run}")["source"] == "print('saved')"
    assert "Nox is on this host" in play("restore", "--limit=nox2", nox_restore_from=str(archive), wanted=2)
    assert play("drift").count("changed=0") == 2
