"""What hostile programs try on the sandbox itself, on both backends. After each, an honest run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from service import Service, resident

_CALL = """
import ctypes, errno, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    result = libc.syscall(number, *map(ctypes.c_long, arguments))
    print(number, 'OPEN' if result >= 0 else errno.errorcode[ctypes.get_errno()])
arm = os.uname().machine == 'aarch64'
"""


@pytest.fixture(autouse=True)
def honest_afterwards(nox: Service) -> Iterator[None]:
    yield
    result = nox.python("print('honest')")
    assert (result["status"], result["stdout"]) == ("ok", "honest\n")
    assert result["duration_ms"] < 10_000


def test_system_calls_that_no_program_needs(nox: Service) -> None:
    # unshare, setns, mount, ptrace, bpf, perf_event_open, userfaultfd, open_by_handle_at, add_key,
    # keyctl, kexec_load, chroot, pivot_root, process_vm_readv, kcmp, swapon, reboot
    amd = (272, 308, 165, 101, 321, 298, 323, 304, 248, 250, 246, 161, 155, 310, 312, 167, 169)
    arm = (97, 268, 40, 117, 280, 241, 282, 265, 217, 219, 104, 51, 41, 270, 272, 224, 142)
    # io_uring_setup, io_uring_enter, pidfd_getfd, mount_setattr, fsopen, move_mount, open_tree
    both = (425, 426, 438, 442, 430, 429, 428)
    code = f"{_CALL}for n in ({arm} if arm else {amd}) + {both}: call(n, 0, 0, 0, 0, 0)"
    told = nox.python(code)["stdout"].splitlines()
    assert len(told) == len(amd) + len(both)
    assert {line.split()[1] for line in told} == {"EPERM"}


def test_no_new_namespaces(nox: Service) -> None:
    code = (
        f"{_CALL}clone = 220 if arm else 56\n"
        "for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 1 << 28, 1 << 29, 1 << 30):\n"
        "    call(clone, bit | 17, 0, 0, 0, 0)\n"
        "call(435, 0, 0)"
    )
    told = [line.split()[1] for line in nox.python(code)["stdout"].splitlines()]
    assert told == ["EPERM"] * 7 + ["ENOSYS"]
    assert "OPEN" not in nox.shell("unshare -Ur echo OPEN; unshare -n echo OPEN")["stdout"]


def test_only_ordinary_sockets(nox: Service) -> None:
    code = (
        "import socket\nfor family, kind in ((40, 1), (17, 3), (38, 5), (31, 3), (16, 3), (21, 5)):"
        "\n    protocol = 9 if family == 16 else 0\n"
        "    try: socket.socket(family, kind, protocol); print('OPEN', family)\n"
        "    except OSError: pass\n"
        "socket.socketpair(); socket.socket(socket.AF_UNIX); print('end')"
    )
    assert nox.python(code)["stdout"] == "end\n"


def test_the_init_is_out_of_reach(nox: Service) -> None:
    code = f"""{_CALL}import resource, signal
for path in ('fd', 'mem', 'environ', 'maps', 'root', 'cwd'):
    try:
        target = '/proc/1/' + path
        print(path, 'OPEN', os.listdir(target) if path == 'fd' else open(target, 'rb').read(1))
    except OSError as error:
        print(path, errno.errorcode[error.errno])
for number in range(1, 65):
    try: os.kill(1, number)
    except OSError: pass
for limits in ((0, 0),):
    try: resource.prlimit(1, resource.RLIMIT_CPU, limits); print('OPEN')
    except OSError as error: print(errno.errorcode[error.errno])
sys.exit(42)
"""
    result = nox.python(code)
    assert (result["status"], result["exit_code"]) == ("error", 42)
    # bubblewrap's init is a copy of bubblewrap, without anything to be seen.
    assert "mem OPEN" not in result["stdout"]
    assert result["stdout"].endswith("EPERM\n")


def test_the_exit_status_is_not_the_programs_to_tell(nox: Service) -> None:
    # Everything that may be a channel is written to, at any number that a descriptor could have.
    code = (
        "import os, struct, sys\n"
        "for n in range(3, 1024):\n"
        "    for text in (struct.pack('=i?qq', 0, True, 0, 0), b'{\"exit-code\": 0}\\n'):\n"
        "        try: os.write(n, text)\n        except OSError: pass\n"
        "sys.stdout.flush(); os.kill(os.getpid(), 11)"
    )
    result = nox.python(code)
    assert (result["status"], result["exit_code"], result["signal"]) == ("error", None, 11)


def test_descriptors_until_there_are_no_more(nox: Service) -> None:
    code = (
        "import ctypes, os\nheld = []\n"
        "try:\n    while True: held.append(os.open('/dev/null', os.O_RDONLY))\n"
        "except OSError as error: print(error.errno)\n"
        "for d in held: os.close(d)\nlibc = ctypes.CDLL(None)\n"
        "while libc.inotify_init() >= 0: pass\nprint('end')"
    )
    assert nox.python(code)["stdout"] == "24\nend\n"


def test_no_memory_is_shared_with_other_runs(nox: Service) -> None:
    # What is mapped for all to write: the stack of the sandboxes' inits was.
    code = (
        "shared = [l for l in open('/proc/self/maps') if {'w', 's'} <= set(l.split()[1])]\n"
        "print(shared)"
    )
    assert nox.python(code)["stdout"] == "[]\n"


def test_a_child_of_the_runner_cannot_be_made(nox: Service) -> None:
    # CLONE_PARENT: the parent of a run's first process is the runner.
    code = (
        "import ctypes, os, platform\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "number = {'x86_64': 56, 'aarch64': 220}[platform.machine()]\n"
        "for flags in (0x8000 | 17, 0x8000, 0x8000 | 0x100 | 0x4000 | 17):\n"
        "    made = libc.syscall(number, flags, 0, 0, 0, 0)\n"
        "    if made == 0: os._exit(0)\n"
        "    print(made, ctypes.get_errno())"
    )
    assert nox.python(code)["stdout"] == "-1 1\n" * 3


DESCRIPTORS_UNDER_WAY = """
import array, socket, sys, time
held = []
for size in (250, 1):
    try:
        while True:
            held.append(socket.socketpair())
            rights = array.array("i", [0] * size)
            held[-1][0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    except OSError as error:
        print(error.errno, flush=True)
time.sleep(3)
"""


def test_descriptors_under_way_between_processes(nox: Service) -> None:
    """The kernel counts them for all of a user's processes together, the services' too."""
    before = nox.runner_log().count("zygote_failed")
    with ThreadPoolExecutor() as pool:
        attack = pool.submit(nox.python, DESCRIPTORS_UNDER_WAY)
        victim = pool.submit(nox.shell, "sleep 2; echo undisturbed")
        time.sleep(0.7)
        for _ in range(20):
            assert nox.python("print(1)")["stdout"] == "1\n"
        assert victim.result()["stdout"] == "undisturbed\n"
    # ETOOMANYREFS
    assert attack.result()["stdout"] == "109\n109\n"
    assert nox.runner_log().count("zygote_failed") == before


def test_what_counts_for_all_of_a_user_is_limited_for_a_run(nox: Service) -> None:
    code = (
        "import os, resource\n"
        "print(*(resource.getrlimit(getattr(resource, 'RLIMIT_' + name))[0]"
        " for name in ('SIGPENDING', 'MSGQUEUE', 'NOFILE')))\n"
        "held = []\n"
        "try:\n    while len(held) < 200: held.append(os.openpty())\n"
        "except OSError as error: print(len(held))"
    )
    told = nox.python(code)["stdout"].splitlines()
    assert told[0] == "4096 819200 1024"
    if nox.detail()["runner"]["backend"] == "zygote":
        assert told[1] == "64"


def test_the_sandbox_directory_is_given_back(nox: Service) -> None:
    for closed in ("0", "0o500", "0o055"):
        assert nox.python(f"import os; os.chmod('.', {closed})")["status"] == "ok"
        assert nox.put("after", b"x").status_code == 201
        assert nox.python("print(open('after').read())")["stdout"] == "x\n"
        with nox.client() as client:
            assert client.get("/files").status_code == 200
            assert client.delete("/files/after").status_code == 204


def test_the_directory_keeps_its_own_rights_for_new_files(nox: Service) -> None:
    code = (
        "import os, struct\n"
        "def entry(tag): return struct.pack('<HHI', tag, 0, 0xffffffff)\n"
        "acl = struct.pack('<I', 2) + entry(1) + entry(4) + entry(32)\n"
        "for name in ('system.posix_acl_default', 'user.x'):\n"
        "    try: os.setxattr('.', name, acl)\n"
        "    except OSError as error: print(error.errno)\n"
        "import shutil\nopen('a', 'w').close()\nshutil.copy2('a', 'b'); print(os.path.exists('b'))"
    )
    # EOPNOTSUPP
    assert nox.python(code)["stdout"] == "95\n95\nTrue\n"
    nox.shell("rm -f a b")


def test_nothing_is_imported_in_place_of_what_the_host_lacks(nox: Service) -> None:
    planted = (
        "import os\nos.makedirs('org/python'); os.mkdir('tzdata')\nevil = 'print(\"planted\")'\n"
        "for name in ('org/__init__', 'org/python/__init__', 'org/python/core', '_winapi', 'nt',"
        " 'msvcrt', 'winreg', 'java', 'tzdata/__init__', 'mine'):\n"
        "    with open(name + '.py', 'w') as file: file.write(evil)"
    )
    assert nox.python(planted)["status"] == "ok"
    code = (
        "import pickle, zipfile, multiprocessing, subprocess, platform, mimetypes, ntpath\n"
        "platform.java_ver(); mimetypes.init()\n"
        "try: __import__('zoneinfo').ZoneInfo('Europe/Nowhere')\nexcept Exception: pass\n"
        "for name in ('nt', '_winapi'):\n"
        "    try: __import__(name)\n    except ModuleNotFoundError: print('none')\n"
        "import mine"
    )
    try:
        assert nox.python(code)["stdout"] == "none\nnone\nplanted\n"
    finally:
        nox.shell("rm -rf *")


@pytest.mark.parametrize("backend", ["zygote", "bubblewrap", "auto"])
@pytest.mark.parametrize(
    "prepare",
    [
        "import os; os.mkdir('nox-proof-2'); os.mkdir('nox-proof-3')",
        "import os; os.mkfifo('nox-proof-2'); os.mkfifo('nox-proof')",
        "import os; os.chmod('.', 0)",
    ],
)
def test_no_run_can_spoil_the_next_self_test(
    own: Callable[..., Service], backend: str, prepare: str
) -> None:
    nox = own(NOX_BACKEND=backend).start()
    assert nox.python(prepare)["status"] == "ok"
    assert nox.runner is not None
    nox.runner.terminate()
    nox.runner.wait(30)
    nox.start_runner()
    assert nox.python("print(1)")["stdout"] == "1\n"
    assert nox.detail()["runner"]["backend"] == backend.replace("auto", "zygote")
    assert "sandbox" not in nox.detail()["limits"]["not_enforced"]


def test_setuid_programs_gain_nothing(nox: Service) -> None:
    code = (
        "for p in /usr/bin/su /usr/bin/passwd /usr/bin/mount; do [ -u $p ] || continue; "
        "cp $p /tmp/x; chmod 4755 /tmp/x; /tmp/x --version >/dev/null 2>&1; done; id -u; "
        "cp /usr/bin/id ./id-set; chmod 4755 id-set; ./id-set -u; rm id-set"
    )
    told = set(nox.shell(code)["stdout"].split())
    assert len(told) == 1 and told != {"0"}


def test_one_run_cannot_reach_another(nox: Service) -> None:
    secret = "s3cr3t-of-the-other"
    victim = (
        f"import mmap, os, socket, time\nopen('/tmp/other', 'w').write('{secret}')\n"
        f"open('/dev/shm/other', 'w').write('{secret}')\ns = socket.socket(socket.AF_UNIX)\n"
        "s.bind('\\0other'); s.listen()\nopen('victim-ready', 'w').close()\ntime.sleep(3)"
    )
    spy = (
        "import glob, os, socket, time\n"
        "while not os.path.exists('victim-ready'): time.sleep(0.01)\n"
        "print(glob.glob('/tmp/other') + glob.glob('/dev/shm/other'))\n"
        "try: socket.socket(socket.AF_UNIX).connect('\\0other'); print('OPEN')\n"
        "except OSError: pass\n"
        "for p in filter(str.isdigit, os.listdir('/proc')):\n"
        "    try: text = open(f'/proc/{p}/cmdline').read() + os.readlink(f'/proc/{p}/root')\n"
        "    except OSError: continue\n"
        "    for name in ('/tmp/other', '/dev/shm/other'):\n"
        "        if os.path.exists(f'/proc/{p}/root{name}'): print('OPEN', p)\n"
        "os.remove('victim-ready')"
    )
    running = threading.Thread(target=nox.python, args=(victim,))
    running.start()
    result = nox.python(spy)
    running.join()
    assert (result["stdout"], result["stderr"]) == ("[]\n", "")


def test_a_crowd_of_survivors_is_gone_with_the_answer(nox: Service) -> None:
    code = (
        "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        os.setsid()\n"
        "        while True: open('alive', 'w').close(); time.sleep(0.005)\n"
        "time.sleep(0.2)\n"
    )
    assert nox.python(code)["status"] == "ok"
    assert nox.python("import os; os.remove('alive')")["status"] == "ok"
    assert (
        nox.python("import os, time; time.sleep(0.1); print(os.path.exists('alive'))")["stdout"]
        == "False\n"
    )


def test_floods_leave_the_runner_as_it_was(nox: Service) -> None:
    assert nox.runner is not None
    nox.shell("yes", timeout=1)
    before = resident(nox.runner.pid)
    for code in ("yes >&2", "yes | head -c 300000000 & yes"):
        assert nox.shell(code)["status"] == "output_limit"
    assert resident(nox.runner.pid) - before < 16 << 20


def test_deep_recursion_and_wild_signals(nox: Service) -> None:
    deep = "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(): f()\nf()"
    assert nox.python(deep, timeout=1)["status"] in ("error", "timeout")
    assert nox.python("import os; os.abort()")["signal"] == 6
    assert nox.shell("kill -STOP $$", timeout=0.5)["status"] == "timeout"
