"""What a run can see and reach."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from service import Service


def test_no_environment_and_no_token_leak(nox: Service) -> None:
    code = (
        "import glob\nfor name in glob.glob('/proc/[0-9]*/environ') + "
        "glob.glob('/proc/[0-9]*/cmdline'):\n"
        "    try: print(name, open(name, 'rb').read())\n    except OSError as e: print(name, e)"
    )
    result = nox.python(code)
    assert nox.token not in result["stdout"]
    # Not to be read, or covered.
    of_init = "/proc/1/environ "
    assert of_init not in result["stdout"] or f"{of_init}[Errno 13]" in result["stdout"]
    assert "/proc/2/environ b'" in result["stdout"]
    names = set(nox.shell("env | cut -d= -f1")["stdout"].split())
    own = {"NOX_RUN_ID", "PWD", "PYTHONNOUSERSITE"}
    assert names == {"PATH", "HOME", "LANG", "TMPDIR", "USER", *own}


def test_no_descriptor_leaks(nox: Service) -> None:
    code = "import os; print(sorted(os.listdir('/proc/self/fd'), key=int))"
    assert nox.python(code)["stdout"] == "['0', '1', '2', '3']\n"  # 3 is the listing itself


def test_the_code_is_in_no_command_line(nox: Service) -> None:
    result = nox.python("marker='m4rk3r'; print(open('/proc/self/cmdline').read())")
    assert "m4rk3r" not in result["stdout"]


def test_only_loopback_without_the_host(nox: Service) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0nox-test-abstract")
    abstract.listen()
    with listening, abstract:
        code = (
            "import socket\ndef attempt(family, address):\n"
            "    s = socket.socket(family); s.settimeout(1)\n"
            "    try: s.connect(address); print('REACHED', address)\n"
            "    except OSError as e: print(e.errno)\n"
            f"attempt(socket.AF_INET, ('127.0.0.1', {listening.getsockname()[1]}))\n"
            f"attempt(socket.AF_INET, ('127.0.0.1', {nox.port}))\n"
            "attempt(socket.AF_INET, ('169.254.169.254', 80))\n"
            "attempt(socket.AF_INET, ('1.1.1.1', 53))\n"
            "attempt(socket.AF_UNIX, '\\0nox-test-abstract')\n"
            f"attempt(socket.AF_UNIX, {str(nox.socket)!r})\n"
        )
        result = nox.python(code)
    assert "REACHED" not in result["stdout"] and len(result["stdout"].split()) == 6


def test_the_host_is_not_seen(nox: Service) -> None:
    hidden = [
        str(nox.root / "front.settings"), "/etc/default", "/etc/shadow", "/etc/ssh", "/root",
        "/opt", "/srv", "/boot", "/sys", "/var/log", "/etc/systemd", "/run/systemd",
    ]  # fmt: skip
    code = f"import os\nfor p in {hidden!r}: print(p, os.path.lexists(p))"
    result = nox.python(code)
    assert "True" not in result["stdout"] and result["status"] == "ok"


def test_the_system_is_read_only(nox: Service) -> None:
    places = ["/usr", "/etc", "/", "/dev", "/usr/lib", "/bin", "/lib", "/var", "/home", "/proc"]
    code = (
        f"import os\nfor p in {places!r}:\n    try: open(p + '/x', 'w'); print('WROTE', p)\n"
        "    except OSError: pass\n"
        "for p in ('/proc/sysrq-trigger', '/proc/sys/kernel/core_pattern'):\n"
        "    try: open(p, 'w').write('x'); print('WROTE', p)\n    except OSError: pass\n"
        "for p in ('/tmp', '/var/tmp', '/dev/shm', '.'):\n    open(p + '/nox-x', 'w').write('x')\n"
        "print('end')"
    )
    result = nox.python(code)
    assert (result["stdout"], result["stderr"]) == ("end\n", "")
    nox.shell("rm nox-x")


def test_the_way_to_the_sandbox_is_empty_and_read_only(nox: Service) -> None:
    result = nox.shell('ls -A "$1" "$1/home"; touch "$1/home/x" 2>&1', args=[str(nox.root)])
    assert result["stdout"].splitlines()[:4] == [f"{nox.root}:", "home", "", f"{nox.root}/home:"]


@pytest.mark.parametrize("backend", ["zygote", "bubblewrap"])
def test_a_sandbox_below_var_tmp(
    own: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(Service, "home", "/var/tmp")
    nox = own(NOX_BACKEND=backend).start()
    assert nox.put("a", b"x").status_code == 201
    told = nox.shell("cat a; pwd; touch /var/tmp/y 2>/dev/null; ls /var/tmp")
    assert told["stdout"] == f"x{nox.sandbox}\n{nox.root.name}\n"


def test_temporary_files_are_gone_with_the_run(nox: Service) -> None:
    places = "/tmp /var/tmp /dev/shm /run"
    nox.shell(f"for d in {places}; do touch $d/left; mkdir $d/left2; done")
    assert "left" not in nox.shell(f"ls -A {places}")["stdout"]


def test_temporary_space_is_limited(nox: Service) -> None:
    assert "tmp_size" in nox.detail()["limits"]["enforced"]
    for place in ("/tmp", "/dev/shm"):
        code = (
            f"for i in range(9):\n    with open('{place}/%d' % i, 'wb') as f: "
            "f.write(bytes(32 << 20))"
        )
        assert "No space left" in nox.python(code)["stderr"]


def test_no_privilege(nox: Service) -> None:
    status = nox.shell("cat /proc/self/status")["stdout"]
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert f"{name}:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert nox.shell("su -c id </dev/null; mount -t tmpfs x /mnt")["status"] == "error"
    assert "uid=0" not in nox.shell("su -c id")["stdout"]


def test_runs_do_not_see_each_other(nox: Service) -> None:
    assert nox.shell("ls -d /proc/[0-9]* | wc -l")["stdout"].strip() in ("2", "3", "4", "5")
    assert nox.shell("hostname; cat /etc/hostname")["stdout"] == "nox\nnox\n"


def test_no_core_file(nox: Service) -> None:
    code = (
        "import ctypes, resource\n"
        "try: resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))\n"
        "except ValueError: pass\nctypes.string_at(0)"
    )
    assert nox.python(code, files=True)["files"] == []


def test_links_planted_by_a_run(nox: Service, tmp_path: Path) -> None:
    outside = nox.root / "outside"
    outside.write_text("intact")
    os.chmod(outside, 0o666)
    plant = "import os, sys\nos.symlink(sys.argv[1], 'planted'); os.symlink('/etc', 'planted-dir')"
    nox.python(plant, args=[str(outside)])
    for overwrite in ("true", "false"):
        assert nox.put("planted", b"evil", overwrite=overwrite).status_code == 409
        assert nox.put("planted-dir/x", b"evil", overwrite=overwrite).status_code == 409
    with nox.client() as client:
        assert client.get("/files/planted").status_code == 409
        assert client.get("/files/planted-dir/passwd").status_code == 409
        assert client.delete("/files/planted").status_code == 204
        assert client.delete("/files/planted-dir").status_code == 204
    assert outside.read_text() == "intact"
    nox.shell("mkfifo pipe; ln -s /etc/shadow out.txt")
    with nox.client(timeout=5) as client:
        assert client.get("/files/pipe").status_code == 409
        assert client.get("/files/out.txt").status_code == 409
    nox.shell("rm pipe out.txt")


def test_many_temporary_files(nox: Service) -> None:
    code = "i = 0\nwhile True:\n    open('/tmp/%d' % i, 'w').close()\n    i += 1"
    result = nox.python(code)
    assert result["status"] == "memory_limit" or "No space left" in result["stderr"]


def test_temporary_space_with_the_bubblewrap_of_ubuntu_22_04(own: Callable[..., Service]) -> None:
    nox = own(NOX_BACKEND="bubblewrap")
    old = nox.root / "bwrap"
    # What 0.6.1 does not know is refused, as it would.
    old.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo bubblewrap 0.6.1; exit; }\n'
        "grep -zqx -e --size /proc/self/fd/$2 && { echo unknown option --size >&2; exit 1; }\n"
        'exec /usr/bin/bwrap "$@"\n'
    )
    old.chmod(0o755)
    nox.start("--bwrap", str(old))
    limits = nox.detail()["limits"]
    assert "watched" in limits["enforced"]["tmp_size"]
    for place in ("/tmp", "/dev/shm"):
        code = f"for i in range(4): open('{place}/%d' % i, 'wb').write(bytes(32 << 20))\nwhile 1: 1"
        result = nox.python(code)
        assert (result["status"], result["exit_code"]) == ("memory_limit", None)
        assert result["duration_ms"] < 10_000
    assert "Read-only" in nox.shell("touch /run/x /x")["stderr"]
    assert nox.python("print(1)")["stdout"] == "1\n"


LAYERS = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
count = 0
while True:
    attributes = struct.pack("=Q", 1 << 12)
    rules = libc.syscall(444, attributes, ctypes.c_size_t(8), 0)
    if rules < 0 or libc.syscall(446, rules, 0) != 0:
        break
    count += 1
print(count)
"""


def test_landlock_is_in_force(nox: Service) -> None:
    """The kernel allows 16 layers of it: where the sandbox has put one, 15 are left."""
    limits = nox.detail()["limits"]
    left = int(nox.python(LAYERS)["stdout"])
    assert left == (15 if "landlock" in limits["enforced"] else 16 if left else 0)
    assert ("landlock" in limits["enforced"]) != ("landlock" in limits["not_enforced"])


def test_renaming_between_directories_is_allowed(nox: Service) -> None:
    script = "mkdir -p a b && echo x >a/f && mv a/f b/ && ln b/f a/g && cat a/g && rm -r a b"
    assert nox.shell(script)["stdout"] == "x\n"


@pytest.mark.parametrize("backend", ["zygote", "bubblewrap"])
def test_the_network_where_it_is_wanted(own: Callable[..., Service], backend: str) -> None:
    """On a host the unit decides what can be reached; here that is this machine's loopback."""
    nox = own(NOX_BACKEND=backend, NOX_NETWORK="on").start()
    limits = nox.detail()["limits"]
    assert "network" in limits["not_enforced"] and "network" not in limits["enforced"]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        code = (
            "import socket, os\n"
            f"socket.create_connection(('127.0.0.1', {listening.getsockname()[1]}), 5)\n"
            "print(os.path.exists('/etc/resolv.conf'))"
        )
        result = nox.python(code)
    resolvers = os.path.exists("/etc/resolv.conf")
    assert result["stdout"] == f"{resolvers}\n", result
    assert nox.python("open('/etc/x', 'w')")["status"] == "error"
