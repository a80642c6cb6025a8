"""What becomes of runs."""

from __future__ import annotations

import time

import pytest
from service import Service, parent, resident, running


def test_python(nox: Service) -> None:
    result = nox.python("import sys; print('out'); print('err', file=sys.stderr)")
    assert result["status"] == "ok" and result["exit_code"] == 0 and result["signal"] is None
    assert (result["stdout"], result["stderr"]) == ("out\n", "err\n")
    assert not result["stdout_truncated"] and not result["stderr_truncated"]
    assert result["duration_ms"] > 0 and result["cpu_ms"] > 0
    assert 1 << 20 < result["max_rss_bytes"] < 1 << 28
    assert len(result["run_id"]) == 32 and "files" not in result


def test_python_is_a_program_like_any_other(nox: Service) -> None:
    result = nox.python(
        "import os, sys\nprint(__name__, sys.argv[1:], os.getcwd() == sys.path[-1])\n"
        "print(sys.stdin.read(), os.environ['GREETING'], len(os.environ['NOX_RUN_ID']))",
        args=["a b", "", "é"],
        stdin="hé\0llo",
        env={"GREETING": "héllo\n"},
    )
    assert result["stdout"] == "__main__ ['a b', '', 'é'] True\nhé\0llo héllo\n 32\n"


def test_shell(nox: Service) -> None:
    result = nox.shell('echo "$1-$2-$#"; cat; exit 3', args=["a b", "c"], stdin="in")
    assert (result["stdout"], result["exit_code"]) == ("a b-c-2\nin", 3)
    assert result["status"] == "error"


def test_no_stdin_is_the_null_device(nox: Service) -> None:
    assert nox.shell("readlink /proc/self/fd/0")["stdout"] == "/dev/null\n"


def test_a_traceback_shows_the_users_lines_only(nox: Service) -> None:
    result = nox.python("def f():\n    return 1 / 0\nf()\n")
    assert result["exit_code"] == 1
    assert 'File "/run/nox/main.py", line 2, in f\n    return 1 / 0' in result["stderr"]
    assert "<string>" not in result["stderr"]
    assert "SyntaxError" in nox.python("a b")["stderr"]


def test_large_code_input_and_output(nox: Service) -> None:
    code = f"x = '{'é' * 400_000}'\nimport sys; sys.stdout.write(sys.stdin.read()); print(len(x))"
    result = nox.python(code, stdin="y" * 900_000)
    assert result["stdout"] == "y" * 900_000 + "400000\n"


def test_input_that_nobody_reads(nox: Service) -> None:
    assert nox.python("print('done')", stdin="y" * 5_000_000)["stdout"] == "done\n"


def test_sys_exit_and_threads(nox: Service) -> None:
    assert nox.python("import sys; sys.exit(7)")["exit_code"] == 7
    assert nox.python("import sys; sys.exit('why')")["stderr"] == "why\n"
    code = (
        "import threading, subprocess\n"
        "ts = [threading.Thread(target=lambda: None) for _ in range(30)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]\n"
        "print(subprocess.run(['echo', 'child'], capture_output=True, text=True).stdout)"
    )
    assert nox.python(code)["stdout"] == "child\n\n"


@pytest.mark.parametrize(
    ("code", "signal"),
    [("import ctypes; ctypes.string_at(0)", 11), ("import os; os.kill(os.getpid(), 15)", 15)],
)
def test_death_by_a_signal(nox: Service, code: str, signal: int) -> None:
    result = nox.python(code)
    assert (result["status"], result["exit_code"], result["signal"]) == ("error", None, signal)


def test_exit_codes_beside_those_of_signals(nox: Service) -> None:
    for code in (128, 145, 160, 255):  # 145 would be SIGCHLD, which kills nobody
        assert nox.shell(f"exit {code}")["exit_code"] == code


@pytest.mark.parametrize("path", ["/run_py", "/run_sh"])
def test_timeout(nox: Service, path: str) -> None:
    source = {
        "/run_py": {"code": "print('early')\nwhile True: pass"},
        "/run_sh": {"cmd": "trap '' TERM INT HUP; echo early; while :; do :; done"},
    }[path]
    started = time.monotonic()
    result = nox.post(path, timeout=0.6, **source)
    assert time.monotonic() - started < 4
    assert (result["status"], result["exit_code"], result["signal"]) == ("timeout", None, None)
    assert result["stdout"] == "early\n"
    assert result["cpu_ms"] >= 20 and result["max_rss_bytes"] > 0


def test_timeout_while_asleep(nox: Service) -> None:
    result = nox.shell("sleep 999", timeout=0.3)
    assert result["status"] == "timeout" and result["duration_ms"] < 4000


def test_output_limit(nox: Service) -> None:
    assert nox.runner is not None
    before = resident(nox.runner.pid)
    result = nox.python("while True: print('x' * 1000)")
    assert result["status"] == "output_limit"
    assert len(result["stdout"]) == 1 << 20 and result["stdout_truncated"]
    result = nox.shell("yes >&2")
    assert result["status"] == "output_limit"
    assert len(result["stderr"]) == 1 << 20 and result["stderr_truncated"]
    assert not result["stdout_truncated"]
    assert resident(nox.runner.pid) - before < 16 << 20


def test_output_of_exactly_the_limit(nox: Service) -> None:
    result = nox.python("import sys; sys.stdout.write('x' * (1 << 20))")
    assert result["status"] == "ok" and not result["stdout_truncated"]
    assert len(result["stdout"]) == 1 << 20


def test_output_that_is_not_utf8(nox: Service) -> None:
    result = nox.python("import os; os.write(1, b'a\\xff\\xfeb\\0')")
    assert result["stdout"] == "a\ufffd\ufffdb\0"


def test_a_closed_output(nox: Service) -> None:
    result = nox.shell("exec >&- 2>&-; sleep 0.2; exit 4")
    assert (result["exit_code"], result["stdout"]) == (4, "")
    assert result["duration_ms"] >= 200


def test_one_big_allocation(nox: Service) -> None:
    result = nox.python("b = b'a' * (1 << 30)")
    assert result["status"] == "error" and "MemoryError" in result["stderr"]
    assert nox.python("import mmap; mmap.mmap(-1, 8 << 30)")["status"] == "error"


def test_files_that_a_run_changed(nox: Service) -> None:
    nox.put("changes/old", b"old", overwrite="true")
    code = (
        "import os\nopen('changes/new', 'w').write('12345')\nos.utime('changes/new', (0, 0))\n"
        "os.symlink('/etc/passwd', 'changes/link')\nos.mkfifo('changes/pipe')"
    )
    result = nox.python(code, files=True)
    assert result["files"] == [{"path": "changes/new", "size": 5}]
    assert nox.python("pass", files=True)["files"] == []


def test_what_was_put_can_be_imported_but_shadows_nothing(nox: Service) -> None:
    planted = ("json.py", "sitecustomize.py", "usercustomize.py", "encodings/__init__.py", "os.py")
    for name in planted:
        assert nox.put(name, b"raise SystemExit('hijacked')").status_code == 201
    nox.put("mine.py", b"value = 42")
    result = nox.python("import json, os, mine; print(json.dumps(mine.value))")
    for name in (*planted, "mine.py"):
        nox.shell('rm -r "$1"', args=[name])
    assert (result["stdout"], result["stderr"]) == ("42\n", "")


def test_a_daemon_does_not_survive(nox: Service) -> None:
    code = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.execv('/bin/sleep', ['sleep', '4242'])\n    os._exit(0)\n"
        "os.wait()\ntime.sleep(0.1)\nprint('parent done')"
    )
    result = nox.python(code)
    assert (result["status"], result["stdout"]) == ("ok", "parent done\n")
    assert list(running("sleep", "4242")) == []


def test_a_fork_bomb_is_contained(nox: Service) -> None:
    bombs = (
        (
            "/run_py",
            {"code": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"},
        ),
        # From a file: the shell policy would refuse it.
        ("/run_sh", {"cmd": "echo 'f() { f | f & }; f' >bomb; . ./bomb; sleep 9"}),
    )
    for path, source in bombs:
        result = nox.post(path, timeout=0.7, **source)
        assert result["status"] in ("timeout", "error", "output_limit")
        assert result["duration_ms"] < 4000
        assert nox.python("print('honest')")["stdout"] == "honest\n"


def test_the_cap_on_processes_is_each_runs_own(nox: Service) -> None:
    code = (
        "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0:\n"
        "            time.sleep(9)\n            os._exit(0)\n        n += 1\n"
        "except BlockingIOError:\n    print(n)"
    )
    assert 100 < int(nox.python(code)["stdout"]) <= 128


def test_signals_to_everybody_harm_nobody_else(nox: Service) -> None:
    nox.python("import os; os.kill(-1, 9)")
    nox.python("import os; os.kill(os.getppid(), 9); os.killpg(0, 9)")
    assert nox.python("print(1)")["stdout"] == "1\n"


def test_large_files_are_cut(nox: Service) -> None:
    for how in ("f.write(b'x' * (200 << 20))", "f.truncate(1 << 50)"):
        result = nox.python(f"with open('big', 'wb') as f: {how}")
        assert result["status"] == "error" and "File too large" in result["stderr"]
    nox.shell("rm -f big")


def test_nothing_is_left(nox: Service) -> None:
    import os

    assert nox.runner is not None
    pid = nox.runner.pid
    nox.shell("true")

    def state() -> tuple[int, int, int]:
        return (
            len(os.listdir(f"/proc/{pid}/fd")),
            len(os.listdir(f"/proc/{pid}/task")),
            len(open(f"/proc/{pid}/task/{pid}/children").read().split()),
        )

    time.sleep(0.3)  # sandboxes made ahead take the place of those that were used
    before = state()
    for _ in range(5):
        nox.shell("sleep 99 & exit 0")
        nox.shell("sleep 99", timeout=0.1)
        nox.shell("yes")
    end = time.monotonic() + 5
    while state() != before and time.monotonic() < end:
        time.sleep(0.01)  # the thread ends a moment after its answer
    assert state() == before
    assert before[2] == 0
    # of this runner: others on the machine may have sandboxes of their own
    orphans = [one for one in running("bwrap", "--args") if parent(one) == pid]
    assert orphans == []
