"""The container deployment, built and run for real on a lab host: python -m tests.container_deployment

On a base image made by mmdebstrap (no registry but the host's own is asked) the Dockerfile is built with buildah, and the image
tried with podman and without its seccomp profile; then with Docker, by the commands of docs/docker.md. playbooks/install.yml runs
it under systemd, once pulled from a registry, once shipped as `docker save` wrote it, and hostile programs try its walls.
Exit codes: 0 passed, 1 failed, 3 cannot run here (with the reason).
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import guides
from tests.hostile.lab import address_of, attack

ROOT = Path(__file__).resolve().parent.parent
LAB = "m-container"
REGISTRY = "127.0.0.1:5000"
MOST_MIB = 120  # that the image adds to its base
# Of the hostile cases those that show a wall, not a limit: for the limits see `not_enforced`.
WALLS = "5 6 7 8 33 34 35 36 37 38 39 40 41 42 43 44 45 47 48 49".split()
LOGIN = (sys.executable, "-m", "lab", "ssh", "--lab", LAB, "nox1")
CONTEXT = ("Dockerfile", ".dockerignore", "container", "requirements", "app/nox_api", "app/nox_runner")
TOKEN = "0123456789abcdef" * 2
# A lab host is a container itself: no overlay file system in it, no session keyrings.
ENGINE = """
mkdir -p /etc/containers
printf '[containers]\\nkeyring = false\\n[engine]\\ncgroup_manager = "cgroupfs"\\n' > /etc/containers/containers.conf
printf '[storage]\\ndriver = "vfs"\\nrunroot = "/run/containers/storage"\\ngraphroot = "/var/lib/containers/storage"\\n' > /etc/containers/storage.conf
printf '[[registry]]\\nlocation = "127.0.0.1:5000"\\ninsecure = true\\n' > /etc/containers/registries.conf
mkdir -p /etc/docker/registry
printf '{"storage-driver": "vfs", "runtimes": {"here": {"path": "/usr/local/bin/runc-here"}}, "default-runtime": "here"}' > /etc/docker/daemon.json
cat > /usr/local/bin/runc-here <<'END'
#!/bin/sh
for word; do
    shift
    set -- "$@" "$word"
    test "$word" != create || set -- "$@" --no-new-keyring
done
exec runc "$@"
END
chmod 0755 /usr/local/bin/runc-here
cat > /etc/docker/registry/config.yml <<'END'
version: 0.1
storage: {filesystem: {rootdirectory: /var/lib/docker-registry}}
http: {addr: "127.0.0.1:5000"}
END
"""
INSTALL = """
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -qq -y --no-install-recommends -o Dpkg::Options::=--force-confold \
    podman crun buildah git curl openssl docker.io docker-registry iptables mmdebstrap gpg > /dev/null
"""
# What debian:bookworm-slim is, and the machine's own way to its archives.
BASE_IMAGE = """
mmdebstrap --quiet --variant=minbase --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' $(. /etc/os-release; echo $VERSION_CODENAME) /root/base.tar /etc/apt/sources.list
tar -C / --ignore-failed-read -rf /root/base.tar ./etc/apt/apt.conf.d/99lab ./etc/pip.conf ./etc/ssl/certs \
    ./usr/share/ca-certificates ./usr/local/share/ca-certificates
podman import --quiet /root/base.tar localhost/base
docker import /root/base.tar debian:bookworm-slim
"""
BUILD = "cd /root/nox && buildah bud --quiet --isolation chroot --network host --format docker --build-arg BASE=localhost/base --tag localhost/nox ."
ONE = [
    *("--cgroups=disabled", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096", "--network=host", "--read-only"),
    *(
        "--cap-drop=all",
        "--security-opt=no-new-privileges",
        "--tmpfs=/run/nox",
        "--volume=/root/t/settings:/run/nox-api/settings:ro",
    ),
    *("--volume=t-sandbox:/home/nox/nox/sandbox", "--volume=t-history:/var/lib/nox-api/history"),
]
PROFILE = "--security-opt=seccomp=/root/nox/container/seccomp.json"
UNMASK = "--security-opt=unmask=/proc/*"


class CannotRunHere(Exception):
    """The machine or the network lacks something; the message says what."""


def say(text: str) -> None:
    print(f"── {text}", flush=True)


def control(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(words)}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def on_host(script: str, stdin: bytes | None = None, check: bool = True) -> str:
    done = subprocess.run(
        [*LOGIN, f"set -e -o pipefail; {script}"],
        cwd=ROOT,
        input=stdin if stdin is not None else b"",
        capture_output=True,
    )
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0 or not check, f"status {done.returncode} on the host: {script[-300:]}\n{output[-3000:]}"
    return output if check else done.stdout.decode("utf-8", "replace")


def ask(path: str, body: object = None, port: int = 18080, token: str = TOKEN) -> tuple[int, dict[str, Any]]:
    """Status and document of an answer; 0 while nobody listens."""
    words = ["curl", "-s", "-m", "30", "-w", "\\n%{http_code}", "-H", f"Authorization: Bearer {token}"]
    if body is not None:
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    answer, _, status = on_host(shlex.join([*words, f"http://127.0.0.1:{port}{path}"]), check=False).rpartition("\n")
    return int(status or 0), json.loads(answer) if answer else {}


def start(*options: str) -> None:
    """One container, up to the first answer that isn't a refused connection."""
    on_host(f"podman run --detach --name t {shlex.join([*ONE, *options])} localhost/nox > /dev/null")
    end = time.monotonic() + 60
    while ask("/health")[0] == 0:
        assert time.monotonic() < end, on_host("podman logs t")
        time.sleep(0.3)


def stop() -> int:
    """How the service in the container ended when it was asked to."""
    on_host("podman stop --time 20 t > /dev/null")
    status = int(on_host("podman inspect --format '{{.State.ExitCode}}' t"))
    on_host("podman rm t > /dev/null")
    return status


def mebibytes(name: str) -> int:
    return int(on_host(f"podman image inspect --format '{{{{.Size}}}}' {name}")) >> 20


def image() -> None:
    """The image by itself, in podman."""
    whole, base = mebibytes("localhost/nox"), mebibytes("localhost/base")
    print(f"the image has {whole} MiB, {whole - base} beyond its base", flush=True)
    assert whole - base <= MOST_MIB
    on_host(
        f"mkdir -p /root/t && printf 'NOX_API_TOKEN={TOKEN}\\nNOX_PORT=18080\\nNOX_BACKEND=auto\\nNOX_HISTORY=on\\n' > /root/t/settings"
    )
    on_host("chown 64990:64990 /root/t/settings && chmod 0400 /root/t/settings")
    say("one container, with what the sandbox needs")
    start(PROFILE, UNMASK)
    status, health = ask("/health")
    assert status == 200, health
    limits = health["limits"]
    print(json.dumps(limits["not_enforced"], indent=2))
    assert "memory_per_run" in limits["not_enforced"] and limits["enforced"]["system_calls"] == "seccomp allow-list"
    assert on_host("podman exec t /opt/nox/bin/health").strip().startswith('{"status":"ok"')
    on_host("podman healthcheck run t")
    assert on_host("podman exec t id -u").strip() == "64990"
    # what a container can't have, said at its start
    log = on_host("podman logs t")
    assert "one user" in log and "no_control_groups" in log, log
    # the checkout's own code, to the byte
    hashes = "cd {} && find nox_api nox_runner -name '*.py' | sort | xargs sha256sum"
    package = on_host("podman exec t sh -c 'echo /opt/nox/venv/lib/python*/site-packages'").strip()
    inside = on_host(f"podman exec t sh -c {shlex.quote(hashes.format(package))}")
    assert inside == on_host(hashes.format("/root/nox/app")) and inside.count("\n") > 40
    walls = "import os, socket\nfor path in ('/run/nox-api/settings', '/opt/nox', '/var/lib/nox-api', '/root'):\n    print(os.path.exists(path))\n"
    walls += "print([line.split(':')[0].strip() for line in open('/proc/net/dev').readlines()[2:]], len([n for n in os.listdir('/proc') if n.isdigit()]))"
    status, result = ask("/run_py", {"code": walls})
    assert status == 200 and result["stdout"] == "False\nFalse\nFalse\nFalse\n['lo'] 2\n", result
    status, result = ask("/run_sh", {"cmd": "touch /usr/x || touch kept; env | grep -c TOKEN"})
    assert "Read-only file system" in str(result["stderr"]) and result["stdout"] == "0\n", result
    status, result = ask("/run_py", {"code": "while 1: pass", "timeout": 1})
    assert result["status"] == "timeout", result
    status, page = ask("/history")
    runs = page["runs"]
    assert len(runs) == 3, page
    assert stop() == 0
    start(PROFILE, UNMASK)
    assert ask("/files")[1]["files"], "the sandbox's volume outlives its container"
    assert stop() == 0
    # The masks over /proc do no harm on a lab host of this kind; on others they do: docs/docker.md.
    start(UNMASK)
    status, health = ask("/health")
    print(f"with the engine's own seccomp profile: {status} {health.get('detail')}")
    assert status == 503, "the engine's own seccomp profile did no harm: ours isn't needed any more"
    stop()


def docker() -> None:
    """docs/docker.md, to the letter."""
    say("Docker, by docs/docker.md")
    on_host("systemctl reset-failed docker; systemctl restart docker")
    blocks = list(guides.blocks("docker"))
    script = "set -eo pipefail; cd /root/nox\n"
    for block in blocks:
        script += f"{{\n{block.text}\n}} < /dev/null\necho; echo {guides.END}\n"
    shown = on_host(f"timeout 900 bash -c {shlex.quote(script)} 2>&1").split(f"{guides.END}\n")
    for block, output in zip(blocks, shown, strict=False):
        print(f"{block.text}{output[-800:]}", flush=True)
        if block.shows and (wrong := guides.compare(block, output)):
            raise AssertionError(f"docs/docker.md:{block.line}: {wrong}")
    assert "no_control_groups" in shown[-2], "docker logs names what a container lacks"
    on_host("docker tag nox localhost/nox:0.1.0 && docker save --output /root/nox.tar localhost/nox:0.1.0")
    on_host("systemctl disable --quiet --now docker.socket docker.service")


def install(inventory: Path, **variables: object) -> str:
    given = {"nox_deployment": "container", "nox_history": True, **variables}
    playbook = str(Path(sys.executable).parent / "ansible-playbook")
    return control(playbook, "-i", str(inventory), "playbooks/install.yml", "-e", json.dumps(given))


def deployment(inventory: Path) -> None:
    """The playbook with nox_deployment: container."""
    pulled = f"{REGISTRY}/nox:0.1.0"
    on_host(f"systemctl restart docker-registry && podman push --quiet localhost/nox {pulled}")
    on_host("podman rmi --all --force > /dev/null")
    say(f"playbooks/install.yml, nox_deployment: container, the image from the registry {REGISTRY}")
    install(inventory, nox_container_image=pulled)
    say("the same again")
    recap = install(inventory, nox_container_image=pulled)
    assert " changed=0 " in recap, recap[-3000:]
    token = on_host("grep NOX_API_TOKEN /etc/default/nox-api | cut -d= -f2").strip()
    assert on_host("podman ps --format '{{.Names}}' | sort").split() == ["nox-api", "nox-runner"]
    owners = on_host(
        "ps -eo user:20,args | grep -e 'm nox_api ' -e 'm nox_runner ' | grep /opt/nox/venv | grep -v grep | cut -d' ' -f1 | sort"
    )
    assert owners.split() == ["nox", "nox-api"]
    status, result = ask("/run_py", {"code": "print(6 * 7)", "env": {"KEY": "swordfish"}}, 8080, token)
    assert status == 200 and result["stdout"] == "42\n", result
    status, kept = ask(f"/history/{result['run_id']}", None, 8080, token)
    assert status == 200 and kept["env"] == ["KEY"], kept
    log = on_host("git -C /var/lib/nox-api/history fsck --strict && git -C /var/lib/nox-api/history log --patch")
    assert str(result["run_id"]) in log and "swordfish" not in log
    say("reload, restart, a kill")
    on_host("sed -i s/^NOX_TIMEOUT=.*/NOX_TIMEOUT=7/ /etc/default/nox-api && systemctl reload nox-api")
    wait_for("the reload", lambda: ask("/health", None, 8080, token)[1].get("settings", {}).get("timeout") == 7)
    on_host("systemctl restart nox-api")
    wait_for("the restart", lambda: ask("/health", None, 8080, token)[0] == 200)
    on_host("systemctl kill --signal=KILL nox-runner")
    wait_for("the runner after a kill", lambda: ask("/run_sh", {"cmd": "true"}, 8080, token)[0] == 200)
    on_host("nox-debug > /dev/null || test $? = 1")  # 1: warnings, such as the limits that don't hold
    say("hostile programs")
    secret = inventory / ".token"
    secret.touch(mode=0o600)
    secret.write_text(token)
    verdicts = attack(LAB, f"https://{address_of(inventory)}", secret, inventory / ".ca/nox1.crt", WALLS)
    for verdict in verdicts:
        print(f"{verdict.number:2} {verdict.verdict:17} {verdict.case}: {verdict.got[:90]}", flush=True)
    assert len(verdicts) == len(WALLS) and not [one for one in verdicts if one.verdict == "FAILED"]
    say("the image as `docker save` wrote it, shipped")
    archive = inventory / ".image.tar"
    with archive.open("wb") as file:
        subprocess.run([*LOGIN, "cat /root/nox.tar"], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, check=True)
    install(inventory, nox_container_image="localhost/nox:0.1.0", nox_container_archive=str(archive))
    assert on_host("podman inspect --format '{{.ImageName}}' nox-api nox-runner").split() == ["localhost/nox:0.1.0"] * 2
    assert ask("/run_sh", {"cmd": "true"}, 8080, token)[0] == 200


def wait_for(what: str, condition: Callable[[], object]) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.5)


def run() -> None:
    """AssertionError says what failed, CannotRunHere what is missing."""
    check = subprocess.run([sys.executable, "-m", "lab", "check"], cwd=ROOT, capture_output=True, text=True)
    if check.returncode != 0:
        raise CannotRunHere((check.stdout + check.stderr).strip())
    with tempfile.TemporaryDirectory(prefix="nox-container-") as inventory:
        try:
            control("-m", "lab", "up", "--lab", LAB, "-n", "1", "--inventory", inventory)
            say("podman, buildah and Docker, from the distribution")
            on_host(ENGINE)
            packages = subprocess.run(
                [*LOGIN, INSTALL], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
            if packages.returncode != 0:
                raise CannotRunHere(f"the engines can't be installed on the lab host: {packages.stderr.strip()[-500:]}")
            say("a base image, by mmdebstrap")
            on_host(BASE_IMAGE)
            say("the image, by buildah")
            archive = subprocess.run(
                ["tar", "c", "--exclude=__pycache__", *CONTEXT], cwd=ROOT, capture_output=True, check=True
            ).stdout
            on_host("mkdir -p /root/nox && tar x -C /root/nox", archive)
            on_host(BUILD)
            image()
            docker()
            deployment(Path(inventory))
        finally:
            subprocess.run([sys.executable, "-m", "lab", "down", f"--lab={LAB}"], cwd=ROOT, capture_output=True)


def main() -> int:
    try:
        run()
    except (AssertionError, CannotRunHere) as error:
        print(error, file=sys.stderr)
        return 3 if isinstance(error, CannotRunHere) else 1
    print("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
