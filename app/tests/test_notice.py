"""How a program ended is the kernel's word: nothing inside the sandbox can say it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from service import APP, Service, as_user, environment

from nox_runner.zygote import kernel
from nox_runner.zygote.notice import Notice

# What the fast backend has a program's own process do last, from where it must not be believed.
_MARKED = f"""
import ctypes, os, time
def leave(code):
    ctypes.CDLL(None).syscall({kernel._EXIT_GROUP.value}, ctypes.c_ulong({kernel.MARK} | code))
"""
_BEATS = "    while 1: open('beat', 'w').write(str(time.time()))\n"
_POOL = """
import os, sys
from nox_runner.limits import Limits
from nox_runner.zygote.pool import Plan, Pool
sandbox, pool = sys.argv[1], Pool(None)
found = os.stat(sandbox)
limits = Limits(5.0, 1 << 20, 512 << 20, 64, 64 << 20, 64 << 20)
plan = Plan(sandbox, (found.st_dev, found.st_ino), limits, 1 << 20, (), 1)
hatchling = pool.take(plan, 20)
print(hatchling.notice is not None)
pool.give_back(hatchling)
pool.close()
"""


def test_the_kernel_tells_on_this_machine(possible: None, tmp_path: Path) -> None:
    """Or the tests below would show nothing of it: without it the init reports, a bit later."""
    for place in (tmp_path, *tmp_path.parents[:2]):  # pytest's own; above is the machine's
        place.chmod(0o755)
    done = subprocess.run(
        as_user(sys.executable, "-c", _POOL, str(tmp_path)),
        cwd=APP, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["True"], done.stdout + done.stderr


def test_a_marked_exit_is_the_programs_own(nox: Service) -> None:
    result = nox.python(f"{_MARKED}leave(7)\nprint('not reached')")
    assert (result["status"], result["exit_code"], result["stdout"]) == ("error", 7, "")


def test_an_exit_with_anything_else_in_its_upper_half(nox: Service) -> None:
    for upper in (0, 1, (kernel.MARK >> 32) - 1, (kernel.MARK >> 32) + 1, 0xFFFFFFFF):
        text = f"{_MARKED}ctypes.CDLL(None).syscall({kernel._EXIT_GROUP.value}, "
        result = nox.python(f"{text}ctypes.c_ulong({upper} << 32 | 6))\nprint('not reached')")
        assert (result["exit_code"], result["stdout"]) == (6, ""), upper


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")
@pytest.mark.parametrize("handled", [(), (32,), (33,)])
def test_a_handler_that_would_run_in_the_last_call(
    tmp_path: Path, handled: tuple[int, ...]
) -> None:
    """Of a signal that the C library keeps for itself, and a program may have all the same."""
    text = f"""
import ctypes, signal, struct
libc = ctypes.CDLL(None)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
for number in {handled}:
    # A handler that is never called, at an address that is none.
    assert libc.syscall(13, number, struct.pack('QQQQ', 1 << 12, 0x04000000, 0, 0), 0, 8) == 0
print("ready", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (tmp_path / "empty").touch()
        own = f"/proc/{process.pid}"
        files = [
            os.open(path, os.O_RDONLY)
            for path in (
                *(f"{own}/stat", tmp_path / "empty", f"{own}/status"),
                *(f"{own}/task/{process.pid}/children", f"{own}/stat"),
            )
        ]
        found = Notice(files, None)._exit(process.pid, 7)
        for file in files:
            os.close(file)
        process.communicate(b"\n")
    if handled:
        assert found is None
    else:
        assert found is not None and found.code == 7


def test_another_process_does_not_speak_for_the_program(nox: Service) -> None:
    result = nox.python(
        f"{_MARKED}pid = os.fork()\nif not pid: leave(0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\nraise SystemExit(9)"
    )
    assert (result["exit_code"], result["stdout"]) == (9, "0\n")


def test_an_exit_by_another_thread(nox: Service) -> None:
    text = "import threading\nthreading.Thread(target=leave, args=(5,)).start()\ntime.sleep(9)"
    result = nox.python(_MARKED + text)
    assert (result["status"], result["exit_code"]) == ("error", 5)


def test_who_is_left_behind_has_ended_before_the_answer(nox: Service) -> None:
    """A child, and a grandchild that came to the init."""
    for orphan in ("", "    if os.fork(): os._exit(0)\n"):
        text = f"{_MARKED}if not os.fork():\n    os.setsid()\n{orphan}{_BEATS}"
        result = nox.python(f"{text}while not os.path.exists('beat'): pass\nleave(4)")
        assert result["exit_code"] == 4
        beats = [nox.python("print(open('beat').read())")["stdout"] for _ in range(2)]
        assert beats[0] == beats[1]
        nox.python("import os; os.remove('beat')")


def test_what_it_used_is_told(nox: Service) -> None:
    alone = nox.python("x = bytearray(60 << 20)\nfor i in range(3_000_000): pass")
    assert alone["cpu_ms"] >= 20
    assert alone["max_rss_bytes"] > 60 << 20
    loop = "'for i in range(6_000_000): pass'"
    child = nox.python(f"import subprocess; subprocess.run(['python3', '-c', {loop}])")
    assert child["cpu_ms"] >= 60


def test_exits_without_end_harm_the_program_alone(nox: Service) -> None:
    text = "    pid = os.fork()\n    if not pid: leave(1)\n    os.waitpid(pid, 0)\nprint('done')"
    result = nox.python(f"{_MARKED}for _ in range(200):\n{text}")
    assert (result["status"], result["stdout"]) == ("ok", "done\n")


def test_a_program_that_may_yet_go_on_is_not_taken_as_ended(nox: Service) -> None:
    """A signal that is not blocked interrupts its last call, and a handler runs."""
    text = (
        "import signal\n"
        "def late(*_):\n    while True: open('late', 'w').write(str(time.time()))\n"
        "signal.signal(signal.SIGALRM, late)\nopen('late', 'w').close()\n"
        "signal.setitimer(signal.ITIMER_REAL, {seconds})\nwhile True: leave(0)"
    )
    for seconds in (0.0002, 0.0004, 0.0006, 0.0008, 0.001, 0.0015):
        nox.post("/run_py", code=_MARKED + text.format(seconds=seconds), timeout=1)
        found = [nox.python("print(open('late').read())")["stdout"] for _ in range(2)]
        assert found[0] == found[1]
    nox.python("import os; os.remove('late')")


def test_the_sandboxs_init_is_out_of_reach(nox: Service) -> None:
    """Or a run could keep it from ending the run, or have it report what it likes."""
    result = nox.python(
        "import os\ndef tried(what, *given):\n    try: what(*given); return 'done'\n"
        "    except OSError as error: return type(error).__name__\n"
        "def write(path):\n    with open(path, 'w') as file: file.write('1')\n"
        "print(tried(os.setpriority, os.PRIO_PROCESS, 1, 19),\n"
        "      tried(os.setpriority, os.PRIO_USER, 0, 19),\n"
        "      tried(os.sched_setscheduler, 1, os.SCHED_IDLE, os.sched_param(0)),\n"
        "      tried(os.sched_setaffinity, 1, {0}),\n"
        "      *(tried(write, f'/proc/1/{name}') for name in\n"
        "        ('mem', 'oom_score_adj', 'clear_refs', 'coredump_filter', 'timerslack_ns')),\n"
        "      tried(os.setpriority, os.PRIO_PROCESS, 0, 1),\n"
        "      tried(os.sched_setaffinity, 0, os.sched_getaffinity(0)))"
    )
    *barred, nice, own = result["stdout"].split()
    assert len(barred) == 9 and set(barred[:4]) == {"PermissionError"}
    # Of bubblewrap's nothing is to be seen; that of the fast backend shares the zygote's memory.
    assert "done" not in barred, barred
    assert (nice, own) == ("done", "done")


def test_signals_to_the_sandboxs_init_do_nothing(nox: Service) -> None:
    """With the fast backend it shares the zygote's memory: a handler there would run in both."""
    failed = nox.runner_log().count("zygote_failed")
    tried = "    try: os.kill(1, number)\n    except ProcessLookupError: pass\n"
    text = f"import os\nfor number in [*range(1, 65)] * 50:\n{tried}print('here')"
    for _ in range(3):
        result = nox.python(text)
        assert (result["status"], result["stdout"]) == ("ok", "here\n"), result
    assert nox.runner_log().count("zygote_failed") == failed


def test_what_a_run_leaves_in_its_home_does_not_begin_later_interpreters(nox: Service) -> None:
    plant = (
        "import os, sys\nplace = os.path.join(os.environ['HOME'], '.local/lib', "
        "'python%d.%d' % sys.version_info[:2], 'site-packages')\n"
        "os.makedirs(place)\nopen(place + '/usercustomize.py', 'w').write('print(666)')\n"
        "open(place + '/x.pth', 'w').write('import sys; print(667)')"
    )
    assert nox.python(plant)["status"] == "ok"
    assert nox.shell("python3 -c 'print(1)'")["stdout"] == "1\n"
    nox.shell("rm -r .local")
