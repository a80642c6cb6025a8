"""Ordinary programs feel neither the walls nor how they were started, on both backends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from service import Service


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        # What a program leaves to the interpreter's end.
        ("f = open('left', 'w'); f.write('flushed')", ""),
        ("print(open('left').read()); import os; os.remove('left')", "flushed\n"),
        ("import atexit; atexit.register(print, 'bye'); print('hi')", "hi\nbye\n"),
        ("class A:\n    def __del__(self): print('gone')\na = A()", "gone\n"),
        (
            "import threading, time\n"
            "threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
            "late\n",
        ),
        ("import sys; sys.stdout.write('no newline')", "no newline"),
        # Processes, threads, loops.
        (
            "import multiprocessing as m\ndef f(x): return x * x\n"
            "if __name__ == '__main__':\n"
            "    with m.get_context('fork').Pool(2) as p: print(p.map(f, [1, 2, 3]))",
            "[1, 4, 9]\n",
        ),
        (
            "import multiprocessing as m\ndef f(q): q.put('spawned')\n"
            "if __name__ == '__main__':\n    c = m.get_context('spawn'); q = c.Queue()\n"
            "    p = c.Process(target=f, args=(q,)); p.start(); print(q.get()); p.join()",
            "spawned\n",
        ),
        (
            "import asyncio\nasync def main():\n"
            "    p = await asyncio.create_subprocess_exec('echo', 'a', stdout=-1)\n"
            "    print((await p.communicate())[0], await asyncio.to_thread(lambda: 1))\n"
            "asyncio.run(main())",
            "b'a\\n' 1\n",
        ),
        (
            "from concurrent.futures import ProcessPoolExecutor as P, ThreadPoolExecutor as T\n"
            "if __name__ == '__main__':\n    for K in (P, T):\n"
            "        with K(2) as pool: print(sum(pool.map(abs, range(-5, 0))))",
            "15\n15\n",
        ),
        ("import os\npid = os.fork()\nif pid: os.wait()\nprint('child' if not pid else 'parent')",
         "child\nparent\n"),
        # The interpreter's own state.
        ("import sys; print(sys.flags.isolated, sys.stdout.encoding, sys.executable)",
         "1 utf-8 /usr/bin/python3\n"),
        ("import gc, sys\nprint('nox_runner' in sys.modules, sys.dont_write_bytecode)\n"
         "print(gc.isenabled())", "False False\nTrue\n"),
        ("import __main__; x = 5; print(__main__.x, __main__.__file__)", "5 /run/nox/main.py\n"),
        ("import pickle\nclass C: pass\nprint(type(pickle.loads(pickle.dumps(C()))).__name__)",
         "C\n"),
        ("import inspect\ndef f(): return 1\nprint(inspect.getsource(f))",
         "def f(): return 1\n\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass D:\n    a: int = 1\nprint(D())",
         "D(a=1)\n"),
        ("import tempfile, sqlite3, mmap, pty, os\n"
         "with tempfile.TemporaryFile() as f: f.write(b'1')\n"
         "print(sqlite3.connect('/tmp/db').execute('select 1').fetchone())\n"
         "mmap.mmap(-1, 4096); m, s = pty.openpty(); print(os.isatty(s))", "(1,)\nTrue\n"),
        ("import shutil, ssl, hashlib, zlib, ctypes, uuid, random, secrets, socket\nprint('ok')",
         "ok\n"),
    ],
)  # fmt: skip
def test_python(nox: Service, code: str, stdout: str) -> None:
    result = nox.python(code)
    assert (result["stdout"], result["stderr"], result["status"]) == (stdout, "", "ok")


@pytest.mark.parametrize(
    ("code", "exit_code", "signal", "stderr"),
    [
        ("raise KeyboardInterrupt", None, 2, "KeyboardInterrupt"),
        ("import os; os._exit(9)", 9, None, ""),
        ("import sys; sys.exit(300)", 44, None, ""),
        ("raise SystemExit", 0, None, ""),
        ("import atexit\natexit.register(lambda: 1 / 0)", 0, None, "ZeroDivisionError"),
        ("import os, sys; os.close(1); print('x'); sys.exit(0)", None, None, "Bad file"),
        ("def f(): raise ValueError from OSError('why')\nf()", 1, None, "direct cause"),
    ],
)
def test_ends(
    nox: Service, code: str, exit_code: int | None, signal: int | None, stderr: str
) -> None:
    result = nox.python(code)
    assert stderr in result["stderr"]
    if (exit_code, signal) != (None, None):
        assert (result["exit_code"], result["signal"]) == (exit_code, signal)


@pytest.mark.parametrize(
    ("code", "exit_code", "printed"),
    [
        # A finalizer at the end finds all of its module.
        ("import os\nclass A:\n    def __del__(self): print(os.getpid() > 1)\na = A()", 0, "True"),
        ("class A:\n    def __del__(self): print('end')\nkeep = [A()]\n"
         "def f(): return keep\nimport builtins; builtins.held = f", 0, "end"),
        ("import signal\nf = open('late', 'w'); f.write('x')\n"
         "signal.signal(signal.SIGTERM, lambda *_: f)\n"
         "class A:\n    def __del__(self): print('end')\na = A()", 0, "end"),
        ("import os\nprint(open('late').read() if os.path.exists('late') else 'x')", 0, "x"),
        ("import sys\nsys.excepthook = 1\nraise ValueError('first')", 1, "first"),
        ("import sys\ndel sys.excepthook\nraise ValueError('first')", 1, "first"),
        ("import sys\nsys.exit(2 ** 70)", 255, ""),
        ("import sys\nsys.exit(-1)", 255, ""),
        ("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [2])\nraise KeyboardInterrupt",
         130, "KeyboardInterrupt"),
        ("import threading\nthreading._register_atexit(print, 'at the end')", 0, "at the end"),
    ],
)  # fmt: skip
def test_ends_as_by_the_interpreter(
    nox: Service, tmp_path: Path, code: str, exit_code: int, printed: str
) -> None:
    result = nox.python(code)
    # By bubblewrap a code that a shell uses for signals is read as one.
    assert (result["exit_code"], result["signal"]) in ((exit_code, None), (None, exit_code - 128))
    assert printed in result["stdout"] + result["stderr"], result
    own = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert own.returncode in (exit_code, -2) and printed in own.stdout + own.stderr


def test_chance_is_each_runs_own(nox: Service) -> None:
    code = "import random, uuid, tempfile; print(random.random(), uuid.uuid4(), tempfile.mktemp())"
    told = [nox.python(code)["stdout"].split() for _ in range(6)]
    for values in zip(*told, strict=True):
        assert len(set(values)) == len(told)


def test_shell(nox: Service) -> None:
    result = nox.shell(
        "set -e; seq 100000 | sort -n | tail -1; yes | head -1; (exit 3) || echo $?; "
        "find /usr/bin -name sh; date +%Y | wc -c; mkfifo p; echo x >p & cat p; rm p; wait; "
        "ulimit -n; awk 'BEGIN { print 1 + 1 }'"
    )
    assert result["stdout"].split() == ["100000", "y", "3", "/usr/bin/sh", "5", "x", "1024", "2"]
