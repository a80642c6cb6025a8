"""The cases. Each function attacks, then tells what came of it, or raises Failed or NotEnforced."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.hostile.target import PREFIX, Failed, NotEnforced, Target

Attack = Callable[[Target], str]


@dataclass(frozen=True)
class Case:
    number: int
    title: str
    expected: str
    attack: Attack


CASES: list[Case] = []


def case(number: int, title: str, expected: str) -> Callable[[Attack], Attack]:
    def add(attack: Attack) -> Attack:
        CASES.append(Case(number, title, expected, attack))
        return attack

    return add


def need(condition: object, got: object) -> None:
    if not condition:
        raise Failed(str(got)[:300])


def told(result: dict[str, Any]) -> str:
    """A run's outcome in short."""
    end = f"signal {result['signal']}" if result["signal"] else f"exit {result['exit_code']}"
    return f"{result['status']}, {end}, {result['duration_ms']} ms"


def said(result: dict[str, Any]) -> str:
    return f"{told(result)}: {result['stdout'][-300:]} {result['stderr'][-300:]}"


def ended(result: dict[str, Any], *statuses: str) -> str:
    need(result["status"] in statuses, said(result))
    return told(result)


def in_sandbox(target: Target, code: str, **fields: Any) -> str:
    """Run code that must exit 0; what it printed."""
    result = target.python(code, **fields)
    need(result["status"] == "ok", said(result))
    return str(result["stdout"]).strip()


# Prelude of those that try system calls: number by name, for both architectures. A refused call gives -1.
SYSCALLS = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
ARM = os.uname().machine == "aarch64"
NUMBER = dict(ptrace=(101, 117), bpf=(321, 280), perf_event_open=(298, 241), userfaultfd=(323, 282),
    open_by_handle_at=(304, 265), unshare=(272, 97), setns=(308, 268), clone3=(435, 435),
    io_uring_setup=(425, 425), mount=(165, 40), add_key=(248, 217))
def call(name, *arguments):
    result = libc.syscall(ctypes.c_long(NUMBER[name][ARM]), *arguments)
    if result >= 0: return "POSSIBLE"
    name = errno.errorcode[ctypes.get_errno()]
    # Any other error means that the kernel went on to look at the arguments.
    return ("denied " if name in ("EPERM", "ENOSYS", "EACCES") else "POSSIBLE ") + name
"""
ATTEMPT = """
def attempt(what, action):
    try:
        action()
        print(what, "POSSIBLE")
    except OSError as error:
        print(what, "denied", error.strerror)
"""


def all_denied(output: str) -> str:
    need(output and "POSSIBLE" not in output, output)
    return f"all {len(output.splitlines())} denied"


# ── CPU, processes


@case(1, "while True: pass", "timeout within timeout + 1 s")
def _(target: Target) -> str:
    result = target.python("while True: pass", timeout=1)
    need(result["duration_ms"] < 2000, said(result))
    return ended(result, "timeout")


@case(2, "while 1: os.fork()", "contained")
def _(target: Target) -> str:
    code = "import os\nwhile 1:\n    try: os.fork()\n    except OSError: pass"
    return ended(target.python(code, timeout=2), "timeout", "memory_limit", "error")


@case(3, ":(){ :|:& };: by /run_sh", "contained, or refused by the shell policy and contained from a file")
def _(target: Target) -> str:
    answer = target.post("/run_sh", {"cmd": ":(){ :|:& };:", "timeout": 2})
    need(answer.status in (200, 403), answer.status)
    bomb = f"printf 'f() {'{'} f | f & {'}'}; f' >{PREFIX}bomb; . ./{PREFIX}bomb; sleep 9"
    result = target.shell(bomb, timeout=2)
    return f"{answer.status}; from a file {ended(result, 'timeout', 'memory_limit', 'error')}"


@case(4, "more processes than the cap", "EAGAIN in user code")
def _(target: Target) -> str:
    code = """
import errno, os, time
count = 0
try:
    for count in range(5000):
        if os.fork() == 0:
            time.sleep(5); os._exit(0)
except OSError as error:
    print(errno.errorcode[error.errno], count)
os._exit(0)
"""
    output = in_sandbox(target, code)
    name, _, count = output.partition(" ")
    need(name == "EAGAIN" and int(count) <= target.settings["pids"], output)
    return output


HEARTBEAT = f"""
import os, time
def beat():
    end = time.monotonic() + 15
    while time.monotonic() < end:
        with open("{PREFIX}beat", "a") as file: file.write("x")
        time.sleep(0.02)
"""


def beats_no_more(target: Target) -> None:
    before = target.size_of(f"{PREFIX}beat")
    need(before >= 0, "it never began")
    time.sleep(0.4)
    need(target.size_of(f"{PREFIX}beat") == before, "a survivor still writes")


@case(5, "double fork and setsid, the parent exits", "no survivor")
def _(target: Target) -> str:
    code = (
        HEARTBEAT
        + """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        beat()
    os._exit(0)
time.sleep(0.3)
"""
    )
    result = target.python(code, timeout=5)
    beats_no_more(target)
    return f"{told(result)}, no survivor"


@case(6, "trap '' TERM INT HUP; sleep", "killed at the timeout")
def _(target: Target) -> str:
    result = target.shell("trap '' TERM INT HUP; while :; do sleep 9; done", timeout=1)
    need(result["duration_ms"] < 2000, said(result))
    return ended(result, "timeout")


@case(7, "os.kill(-1, 9)", "harms nothing outside")
def _(target: Target) -> str:
    return told(target.python("import os\nos.kill(-1, 9)", timeout=3))


@case(8, "kill of the parent and the group", "service alive")
def _(target: Target) -> str:
    code = "import os\nfor f in (lambda: os.kill(os.getppid(), 9), lambda: os.kill(1, 9), lambda: os.killpg(0, 9)):\n"
    return told(target.python(code + "    try: f()\n    except OSError: pass", timeout=3))


@case(9, "SIGSEGV by ctypes", "error, signal 11")
def _(target: Target) -> str:
    result = target.python("import ctypes\nctypes.string_at(0)")
    need(result["status"] == "error" and result["signal"] == 11, said(result))
    return told(result)


@case(10, "the client disconnects mid-run", "run killed, slot freed")
def _(target: Target) -> str:
    connection = target.connect()
    body = json.dumps({"code": HEARTBEAT + "beat()"}).encode()
    headers = {"Authorization": f"Bearer {target.token}", "Content-Type": "application/json"}
    connection.request("POST", "/run_py", body, headers)
    time.sleep(1)
    connection.close()
    time.sleep(0.7)
    beats_no_more(target)
    need(target.health()["slots"]["used"] == 0, target.health()["slots"])
    return "killed, slots free"


# ── Memory, disk


@case(11, "b'a' * (1 << 30)", "MemoryError or memory_limit")
def _(target: Target) -> str:
    result = target.python("x = b'a' * (1 << 30)")
    need(result["status"] == "memory_limit" or "MemoryError" in result["stderr"], said(result))
    return told(result)


@case(12, "two children that are too large only together", "the group's limit counts")
def _(target: Target) -> str:
    limits = target.health()["limits"]
    if "memory_per_run" not in limits["enforced"]:
        raise NotEnforced(limits["not_enforced"].get("memory_per_run", "not among the enforced limits"))
    size = int(target.settings["memory"] * 0.6)
    code = f"""
import os, time
for _ in range(2):
    if os.fork() == 0:
        held = bytearray(b"x") * {size}
        time.sleep(3); os._exit(0)
print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)])
"""
    result = target.python(code, timeout=15)
    need(result["status"] == "memory_limit" or "-9" in result["stdout"], said(result))
    return told(result)


FILL = """
import errno, os
def fill(directory):
    total, block = 0, b"x" * (1 << 20)
    try:
        for number in range(64):
            with open(f"{directory}/fill{number}", "wb", buffering=0) as file:
                for _ in range(50): total += file.write(block)
    except OSError as error:
        print(directory, errno.errorcode[error.errno], total, flush=True)
    else:
        print(directory, "UNBOUNDED", total, flush=True)
"""


def filled(target: Target, *directories: str) -> str:
    calls = "\n".join(f"fill({directory!r})" for directory in directories)
    result = target.python(FILL + calls)
    if result["status"] == "memory_limit":
        return told(result)
    lines = [line.split() for line in result["stdout"].splitlines()]
    need(result["status"] == "ok" and len(lines) == len(directories), said(result))
    for directory, name, total in lines:
        need(name in ("ENOSPC", "EROFS", "EACCES", "EPERM", "ENOENT"), said(result))
        need(int(total) <= target.settings["tmp_size"], f"{directory} took {total}")
    return ", ".join(" ".join(line) for line in lines)


@case(13, "fill /dev/shm", "ENOSPC at its cap")
def _(target: Target) -> str:
    return filled(target, "/dev/shm")


@case(14, "fill /, /dev, /tmp, /run, /etc", "EROFS, or ENOSPC at its cap")
def _(target: Target) -> str:
    return filled(target, "/", "/dev", "/tmp", "/run", "/etc")


@case(15, "a file of 200 MB", "EFBIG or quota")
def _(target: Target) -> str:
    code = f"""
import errno
try:
    with open("{PREFIX}large", "wb", buffering=0) as file:
        for _ in range(200): file.write(b"x" * 1000000)
except OSError as error: print(errno.errorcode[error.errno])
"""
    result = target.python(code)
    need("EFBIG" in result["stdout"] or result["status"] == "output_limit", said(result))
    return f"{told(result)} {result['stdout'].strip()}"


@case(16, "truncate(1 << 50)", "EFBIG, never read back")
def _(target: Target) -> str:
    code = f"""
import errno
try: open("{PREFIX}sparse", "wb").truncate(1 << 50)
except OSError as error: print(errno.errorcode[error.errno])
"""
    output = in_sandbox(target, code)
    need(output == "EFBIG" and target.size_of(f"{PREFIX}sparse") <= 0, output)
    return output


@case(17, "a million tiny files, in /tmp and in the sandbox", "inode cap, quota")
def _(target: Target) -> str:
    code = """
import errno
for i in range(1000000):
    try: open(f"{}{i}", "w").close()
    except OSError as error: print(errno.errorcode[error.errno], i); break
"""
    results = []
    for where in ("/tmp/", PREFIX):
        result = target.python(code.replace("{}", where, 1))
        stopped = result["status"] in ("memory_limit", "output_limit") or "ENOSPC" in result["stdout"]
        need(stopped or "EDQUOT" in result["stdout"], said(result))
        results.append(told(result))
    left = sum(name.startswith(PREFIX) for name in target.files())
    need(left == 0, f"{left} of its files are left in the sandbox")
    return "; ".join(results)


@case(18, "directories 1000 deep", "clean-up succeeds")
def _(target: Target) -> str:
    code = f"""
import os
os.mkdir("{PREFIX}deep"); os.chdir("{PREFIX}deep")
for _ in range(1000): os.mkdir("d" * 60); os.chdir("d" * 60)
open("leaf", "w").close()
print("made")
"""
    need(in_sandbox(target, code) == "made", "not made")
    need(target.request("GET", "/files").status == 200, "the listing fails")
    result = target.shell(f"rm -rf {PREFIX}deep && ! ls -d {PREFIX}deep 2>/dev/null && echo gone")
    need("gone" in result["stdout"], said(result))
    return "listed and removed"


@case(19, "descriptors until EMFILE, inotify until exhausted", "own run only")
def _(target: Target) -> str:
    code = (
        SYSCALLS
        + """
kept, watches = [], 0
try:
    while len(kept) < 100000: kept.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error: print(errno.errorcode[error.errno], len(kept), flush=True)
for fd in kept: os.close(fd)
while watches < 100000 and libc.inotify_init() >= 0: watches += 1
print("inotify", watches)
"""
    )
    output = in_sandbox(target, code)
    need(output.startswith("EMFILE"), output)
    return output.replace("\n", ", ")


@case(20, "a crash with the core limit raised", "no core file")
def _(target: Target) -> str:
    code = """
import ctypes, resource
try: resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))
except (ValueError, OSError): pass
ctypes.string_at(0)
"""
    before = target.files()
    result = target.python(code)
    need(target.files() == before and result["signal"] == 11, said(result))
    return told(result)


# ── Output, input


def flooded(target: Target, stream: str) -> str:
    limit = target.settings["output_limit"]
    result = target.python(f"import sys\nwhile True: sys.{stream}.write('x' * 4096)")
    need(len(result[stream]) <= limit + 256 and result[f"{stream}_truncated"], told(result))
    return f"{ended(result, 'output_limit')}, {len(result[stream])} bytes"


@case(21, "endless print", "output_limit, truncated")
def _(target: Target) -> str:
    return flooded(target, "stdout")


@case(22, "flood of stderr alone", "output_limit, truncated")
def _(target: Target) -> str:
    return flooded(target, "stderr")


@case(23, "bytes that are not UTF-8", "valid JSON")
def _(target: Target) -> str:
    result = target.python("import sys\nsys.stdout.buffer.write(bytes(range(256)))")
    need("\ufffd" in result["stdout"], said(result))
    return ended(result, "ok")


@case(24, "NUL in the code", "422 or user error")
def _(target: Target) -> str:
    answers = [target.post("/run_py", {"code": "a\0b"}), target.post("/run_sh", {"cmd": "a\0b"})]
    for answer in answers:
        need(answer.status == 422 or (answer.status == 200 and answer.json()["status"] == "error"), answer.status)
    return ", ".join(str(answer.status) for answer in answers)


@case(25, 'NaN, -1, 0, 1e308, "5", true as timeout', "422 each")
def _(target: Target) -> str:
    values = ("NaN", "Infinity", "-1", "0", "1e308", '"5"', "true", "[]")
    for value in values:
        body = f'{{"code":"pass","timeout":{value}}}'.encode()
        answer = target.request("POST", "/run_py", body, {"Content-Type": "application/json"})
        need(answer.status == 422, f"{value}: {answer.status}")
    return f"422 for all {len(values)}"


# ── Files, API


def all_refused(target: Target, paths: tuple[str, ...]) -> str:
    before = target.files()
    for path in paths:
        status = target.put(path, b"evil", overwrite=True).status
        need(400 <= status < 500, f"put {path[:40]!r}: {status}")
    need(target.files() == before, "something was written")
    return f"4xx for all {len(paths)}, nothing written"


@case(26, "../../etc/x, /etc/x, a/../../x, ..%2f, empty, ., 300 characters", "4xx, nothing written")
def _(target: Target) -> str:
    for path in ("..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "a%2f..%2f..%2fx", "%2e%2e/%2e%2e/etc/passwd"):
        status = target.request("GET", f"/files/{path}").status
        need(400 <= status < 500, f"get {path}: {status}")
    return all_refused(target, ("../../etc/x", "/etc/x", "a/../../x", "../x", "..", "", ".", "a//b", "n" * 300))


@case(27, "a sibling with the same prefix", "4xx")
def _(target: Target) -> str:
    sandbox = target.settings["sandbox"]
    name = sandbox.rpartition("/")[2]
    return all_refused(target, (f"{sandbox}-evil/x", f"../{name}-evil/x", f"{sandbox}/../{name}-evil/x"))


def linked(target: Target, name: str, to: str) -> None:
    in_sandbox(target, f"import os\nos.symlink({to!r}, {name!r})")


@case(28, "a run plants x -> /etc/cron.d/…, then PUT x", "refused, target intact")
def _(target: Target) -> str:
    linked(target, f"{PREFIX}x", f"/etc/cron.d/{PREFIX}x")
    linked(target, f"{PREFIX}d", "/etc/cron.d")
    puts = [target.put(f"{PREFIX}x", b"evil", overwrite).status for overwrite in (False, True)]
    puts.append(target.put(f"{PREFIX}d/{PREFIX}x", b"evil").status)
    need(puts == [409, 409, 409], puts)
    return "409, 409, 409"


@case(29, "a planted link met by delete, listing, clean-up", "not followed")
def _(target: Target) -> str:
    need(target.put(f"{PREFIX}real/kept", b"kept").status == 201, "put")
    linked(target, f"{PREFIX}tree", f"{PREFIX}real")
    linked(target, f"{PREFIX}one", f"{PREFIX}real/kept")
    need(target.request("DELETE", f"/files/{PREFIX}tree/kept").status == 409, "delete went through a link")
    need(f"{PREFIX}tree/kept" not in target.files(), "the listing followed a link")
    for name in ("tree", "one"):
        need(target.request("DELETE", f"/files/{PREFIX}{name}").status == 204, name)
    need(target.size_of(f"{PREFIX}real/kept") == 4, "the target is gone")
    return "links removed, target intact"


@case(30, "out.txt -> /etc/shadow, fetched", "refused")
def _(target: Target) -> str:
    linked(target, f"{PREFIX}out.txt", "/etc/shadow")
    status = target.request("GET", f"/files/{PREFIX}out.txt").status
    need(400 <= status < 500, status)
    return str(status)


@case(31, "a body over the cap, with and without a length", "413, disk clean")
def _(target: Target) -> str:
    before = target.files()
    size = target.settings["max_body"] + (1 << 20)
    length = target.put(f"{PREFIX}big", b"x" * size)
    pieces = (b"x" * (1 << 16) for _ in range(size >> 16))
    form = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    chunked = target.request("POST", "/run_py", pieces, form)
    need((length.status, chunked.status) == (413, 413), (length.status, chunked.status))
    need(target.files() == before, "something was written")
    return "413, 413"


@case(32, "500 parallel runs", "some 429 with Retry-After, /health answers throughout")
def _(target: Target) -> str:
    done, slowest = threading.Event(), 0.0

    def watch() -> None:
        nonlocal slowest
        while not done.is_set():
            started = time.monotonic()
            target.health()
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.1)

    with ThreadPoolExecutor(501) as pool:
        watching = pool.submit(watch)
        answers = list(pool.map(lambda _: target.post("/run_sh", {"cmd": "sleep 0.1"}, 120), range(500)))
        done.set()
        watching.result()
    ran = sum(answer.status == 200 for answer in answers)
    refused = [answer for answer in answers if answer.status == 429]
    need(refused and ran and ran + len(refused) == 500, f"{ran} times 200, {len(refused)} times 429, the rest other")
    need(all(int(answer.headers["Retry-After"]) >= 1 for answer in refused), "429 without Retry-After")
    need(slowest < 2, f"/health took {slowest:.1f} s")
    return f"{ran} times 200, {len(refused)} times 429, /health at most {slowest * 1000:.0f} ms"


@case(33, "wrong, absent, double, non-ASCII Bearer", "401, never 500")
def _(target: Target) -> str:
    right = b"Authorization: Bearer " + target.token.encode()
    for lines in (
        b"Authorization: Bearer wrong",
        b"X: y",
        right + b"\r\n" + right,
        b"Authorization: Bearer \xc3\xa9\xff",
    ):
        head = b"GET /files HTTP/1.1\r\nHost: " + target.name.encode() + b"\r\nConnection: close\r\n" + lines
        status = target.raw(head + b"\r\n\r\n").split(b" ", 2)[1]
        need(status in (b"401", b"400"), f"{status!r} for {lines[:30]!r}")
    return "401 each"


# ── Isolation


@case(34, "the token in any /proc/*/environ or cmdline", "absent")
def _(target: Target) -> str:
    code = """
import base64, glob
found = b""
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline") + glob.glob("/proc/*/task/*/environ"):
    try: found += open(path, "rb").read()
    except OSError: pass
print(base64.b64encode(found).decode())
"""
    seen = base64.b64decode(in_sandbox(target, code))
    need(target.token.encode() not in seen and b"API_TOKEN" not in seen, "it was there")
    return f"not in {len(seen)} bytes"


@case(35, "reads of the config, the release, /root, other homes", "denied or absent")
def _(target: Target) -> str:
    code = (
        ATTEMPT
        + """
import os
for path in ("/etc/default/nox-api", "/etc/shadow", "/run/nox-runner/settings", "/run/nox-api/settings",
             "/proc/1/root/etc/shadow", "/var/log/nox-api/nox-api.log"):
    attempt(path, lambda: open(path).read(1))
for path in ("/opt/nox/current/", "/opt/nox/releases", "/root", "/home/admin", "/var/lib", "/run/systemd"):
    attempt(path, lambda: os.listdir(path))
"""
    )
    return all_denied(in_sandbox(target, code))


@case(36, "connect to 127.0.0.1:API, a metadata address, any other", "fails")
def _(target: Target) -> str:
    code = (
        ATTEMPT
        + f"""
import socket
for place in (("127.0.0.1", 8080), ("127.0.0.1", 443), ("127.0.0.1", 22), ("169.254.169.254", 80),
              ({target.name!r}, {target.port}), ("192.0.2.1", 80)):
    attempt(place, lambda: socket.create_connection(place, 1))
attempt("datagram", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9)))
"""
    )
    return all_denied(in_sandbox(target, code))


def beside(target: Target, code: str) -> Callable[[], dict[str, Any]]:
    """Start a run of 3 seconds; its result when it has ended."""
    pool = ThreadPoolExecutor(1)
    running = pool.submit(target.python, code + "\nimport time\ntime.sleep(3)")
    time.sleep(1)
    return running.result


@case(37, "another run's abstract unix socket", "unreachable")
def _(target: Target) -> str:
    name = "\\0" + PREFIX + "socket"
    other = beside(target, f"import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind('{name}')\ns.listen()")
    code = (
        ATTEMPT
        + f"""
import socket
for name in ("{name}", "/run/nox-runner.sock", "\\0/org/freedesktop/systemd1/private", "/run/systemd/private",
             "/run/dbus/system_bus_socket"):
    attempt(name[:9].strip("\\0"), lambda: socket.socket(socket.AF_UNIX).connect(name))
"""
    )
    outcome = all_denied(in_sandbox(target, code))
    need(other()["status"] == "ok", "the other run failed")
    return outcome


@case(38, "write to /proc/sysrq-trigger, core_pattern", "denied")
def _(target: Target) -> str:
    code = (
        ATTEMPT
        + """
for path in ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname",
             "/proc/sys/vm/drop_caches", "/proc/sys/net/ipv4/ip_forward"):
    attempt(path, lambda: open(path, "w").write("x"))
"""
    )
    return all_denied(in_sandbox(target, code))


@case(39, "write under /etc, /usr, /lib", "EROFS")
def _(target: Target) -> str:
    code = (
        ATTEMPT
        + """
import os
for path in ("/etc", "/usr", "/usr/bin", "/lib", "/usr/local", "/bin", "/", "/opt", "/home"):
    if os.path.isdir(path): attempt(path, lambda: open(path + "/planted", "w"))
"""
    )
    return all_denied(in_sandbox(target, code))


@case(40, "what a run leaves in /tmp, /dev/shm, /var/tmp, /run", "gone in the next")
def _(target: Target) -> str:
    directories = '("/tmp", "/dev/shm", "/var/tmp", "/run")'
    plant = f"""
for directory in {directories}:
    try: open(directory + "/{PREFIX}left", "w").close()
    except OSError: pass
"""
    in_sandbox(target, plant)
    look = f"import os\nprint([d for d in {directories} if os.path.exists(d + '/{PREFIX}left')])"
    output = in_sandbox(target, look)
    need(output == "[]", output)
    return "gone"


@case(41, "AF_VSOCK, io_uring", "denied")
def _(target: Target) -> str:
    code = (
        SYSCALLS
        + ATTEMPT
        + """
import socket
attempt("vsock", lambda: socket.socket(40, socket.SOCK_STREAM))
print("io_uring", call("io_uring_setup", 4, ctypes.create_string_buffer(120)))
"""
    )
    return all_denied(in_sandbox(target, code))


@case(42, "unshare(NEWUSER) and mount, clone3, setns", "denied")
def _(target: Target) -> str:
    code = (
        SYSCALLS
        + """
print("mount", call("mount", b"none", b"/tmp", b"tmpfs", 0, 0))
print("setns", call("setns", os.open("/proc/1/ns/mnt", os.O_RDONLY), 0) if os.path.exists("/proc/1/ns/mnt") else "denied")
arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
result = libc.syscall(ctypes.c_long(435), arguments, ctypes.c_size_t(88))
if result == 0: os._exit(0)
print("clone3", "denied" if result < 0 else "POSSIBLE", errno.errorcode.get(ctypes.get_errno()))
print("unshare", call("unshare", 0x10000000))
print("mount", call("mount", b"none", b"/tmp", b"tmpfs", 0, 0))
"""
    )
    return all_denied(in_sandbox(target, code))


@case(43, "ptrace, bpf, perf_event_open, userfaultfd, open_by_handle_at, add_key", "denied")
def _(target: Target) -> str:
    code = (
        SYSCALLS
        + """
pid = os.fork()
if pid == 0:
    import time; time.sleep(5); os._exit(0)
print("ptrace", call("ptrace", 16, pid, 0, 0))
os.kill(pid, 9)
print("bpf", call("bpf", 0, ctypes.create_string_buffer(128), 128))
attributes = ctypes.create_string_buffer(b"\\x01\\0\\0\\0\\x78" + bytes(115))
print("perf", call("perf_event_open", attributes, 0, -1, -1, 0))
print("userfaultfd", call("userfaultfd", 0))
print("handle", call("open_by_handle_at", -100, ctypes.create_string_buffer(b"\\x08" + bytes(20)), 0))
print("key", call("add_key", b"user", b"x", b"y", 1, -3))
"""
    )
    return all_denied(in_sandbox(target, code))


@case(44, "a setuid binary", "no privilege")
def _(target: Target) -> str:
    code = """
import os, subprocess
fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(fields["NoNewPrivs"].strip(), int(fields["CapEff"], 16), int(fields["CapBnd"], 16))
for command in (["su", "-c", "id"], ["mount", "-t", "tmpfs", "x", "/tmp"], ["passwd", "-d", "root"], ["sudo", "-n", "id"]):
    try: print(subprocess.run(command, capture_output=True, text=True, stdin=-3, timeout=5).returncode != 0)
    except (OSError, subprocess.TimeoutExpired): print(True)
print(os.geteuid() != 0)
"""
    output = in_sandbox(target, code).split("\n")
    need(output[0] == "1 0 0" and set(output[1:]) == {"True"}, output)
    return "no_new_privs, no capability, all fail"


@case(45, "run B reads the private tmp or memory of run A while both run", "impossible")
def _(target: Target) -> str:
    secret = base64.b32encode(b"only A's own").decode()
    other = beside(target, f"secret = '{secret}'\nopen('/tmp/{PREFIX}secret', 'w').write(secret)")
    code = f"""
import glob, os
needle = {secret[:6]!r} + {secret[6:]!r}
found = [path for path in glob.glob("/proc/*/root/tmp/{PREFIX}secret") + glob.glob("/tmp/{PREFIX}secret")]
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) == os.getpid(): continue
    try: command = open(f"/proc/{{pid}}/cmdline").read()
    except OSError: continue
    if "{PREFIX}secret" in command: continue
    try:
        memory = open(f"/proc/{{pid}}/mem", "rb")
        for line in open(f"/proc/{{pid}}/maps"):
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            try:
                memory.seek(start)
                if needle.encode() in memory.read(min(end - start, 1 << 24)): found.append(line)
            except (OSError, OverflowError, ValueError): pass
    except OSError: pass
print(found)
"""
    output = in_sandbox(target, code)
    need(other()["status"] == "ok" and output == "[]", output)
    return "nothing seen"


@case(46, "processes of one run that want all cores", "no more than NOX_CPUS together")
def _(target: Target) -> str:
    limits = target.health()["limits"]
    held = limits["enforced"].get("cpu_share", "")
    if "cpu.max" not in held:
        raise NotEnforced(held or limits["not_enforced"]["cpu_share"])
    cores = float(held.partition("at most ")[2].split()[0])
    code = """
import os, time
end = time.monotonic() + 3
for _ in range(2): os.fork()
while time.monotonic() < end: pass
try:
    while True: os.wait()
except ChildProcessError: pass
"""
    result = target.python(code, timeout=15)
    need(result["status"] == "ok" and result["cpu_ms"] < 1.3 * cores * result["duration_ms"], result)
    return f"{result['cpu_ms']} ms of CPU in {result['duration_ms']} ms, {held}"


@case(47, "memory that other runs have, too, written to", "none is mapped")
def _(target: Target) -> str:
    code = """
shared = [line for line in open("/proc/self/maps") if {"w", "s"} <= set(line.split()[1])]
print(len(shared), *shared)
"""
    output = in_sandbox(target, code)
    need(output == "0", output)
    return "none"


@case(48, "children with the runner as their parent (CLONE_PARENT)", "denied, ends on time")
def _(target: Target) -> str:
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
number = 220 if os.uname().machine == "aarch64" else 56
made = [libc.syscall(number, 0x8000 | 17, 0, 0, 0, 0) for _ in range(50)]
if 0 in made: os._exit(0)
print(set(made), ctypes.get_errno(), flush=True)
while True: pass
"""
    result = target.python(code, timeout=1)
    ended(result, "timeout")
    need(result["stdout"] == "{-1} 1\n" and result["duration_ms"] < 5000, said(result))
    return told(result)


@case(49, "descriptors under way in sockets until the kernel allows no more", "own run only")
def _(target: Target) -> str:
    attack = beside(
        target,
        """
import array, socket
held = []
try:
    while len(held) < 5000:
        held.append(socket.socketpair())
        held[-1][0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 250))])
except OSError as error: print(error.errno, flush=True)
""",
    )
    for _ in range(20):
        need(in_sandbox(target, "print(1)") == "1", "another run is disturbed")
    result = attack()
    ended(result, "ok")
    return f"{told(result)}, errno {result['stdout'].splitlines()[0]}; 20 others undisturbed"


@case(50, "chmod 0 on the sandbox directory, names that the self-test may want", "others go on")
def _(target: Target) -> str:
    code = """
import os
for number in range(200):
    try: os.mkdir(f"nox-proof-{number}")
    except FileExistsError: pass
os.chmod(".", 0)
"""
    result = target.python(code)
    try:
        need(target.put(f"{PREFIX}after", b"x", overwrite=True).status in (200, 201), "an upload is refused")
        need(target.request("GET", "/files").status == 200, "a listing is refused")
        need(in_sandbox(target, f"print(open('{PREFIX}after').read())") == "x", "a run can't read")
        need(target.health()["status"] == "ok", "not healthy")
    finally:
        target.shell(f"rm -rf nox-proof-* {PREFIX}after")
    return f"{told(result)}; upload, listing and run go on"


@case(51, "sparse files and hard links that use up the quota, by runs that end at once", "room again")
def _(target: Target) -> str:
    quota = target.health()["sandbox"]
    sparse = f"""
import resource
size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
for i in range({quota["quota_bytes"]} // size + 1): open(b"{PREFIX}\\xff%d" % i, "wb").truncate(size)
"""
    links = f"""
import os
for i in range({quota["quota_files"]} + 1):
    if i % 50000 == 0: open(f"{PREFIX}{{i}}", "w").close(); last = i
    else: os.link(f"{PREFIX}{{last}}", f"{PREFIX}{{i}}")
"""
    taken = []
    for code in (sparse, links):
        result = target.python(code)
        need(result["status"] in ("ok", "output_limit"), said(result))
        time.sleep(3)  # until a scan has seen it
        started = time.monotonic()
        while target.post("/run_py", {"code": "print(1)"}).status != 200 or target.health()["sandbox"]["files"] > 1000:
            need(time.monotonic() < started + 30, f"full for 30 s: {target.health()['sandbox']}")
            time.sleep(0.2)
        taken.append(f"{result['status']}: {time.monotonic() - started:.1f} s")
    need(target.put(f"{PREFIX}room", b"x").status == 201, "an upload is refused")
    return f"3 s later room after {', '.join(taken)}"


@case(52, "modules planted for what Python's own libraries look for", "never imported")
def _(target: Target) -> str:
    plant = """
import os
os.makedirs("org/python")
for name in ("org/__init__", "org/python/__init__", "org/python/core", "_winapi", "nt", "msvcrt", "winreg", "java"):
    with open(name + ".py", "w") as file: file.write("print('planted')")
"""
    try:
        in_sandbox(target, plant)
        output = in_sandbox(target, "import pickle, zipfile, multiprocessing, subprocess, mimetypes, platform")
    finally:
        target.shell("rm -rf org _winapi.py nt.py msvcrt.py winreg.py java.py")
    need(output == "", output)
    return "not imported"
