"""kernel.Fork: what the interpreter is not told of, and is right all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

from service import APP, Service, environment

_FORKS = """
from nox_runner.zygote import kernel
hooks = kernel.ForkHooks()
import os, random, sys, threading
calls = []
for kind in ("before", "after_in_parent", "after_in_child"):
    os.register_at_fork(**{kind: lambda kind=kind: calls.append(kind)})
hooks.close()
os.register_at_fork(before=lambda: calls.append("too late"))
print(len(hooks.before), len(hooks.in_parent), len(hooks.in_child), flush=True)
before = random.getstate()
pid, handle = kernel.Fork(hooks)(0)
if pid:
    print(pid, "parent", *calls, random.getstate() == before, flush=True)
    os._exit(0)
thread = threading.Thread(target=calls.append, args=("thread",))
thread.start()
thread.join()
forked = os.fork()
if forked == 0:
    calls.append("grandchild")
    os._exit(len(calls) + (calls.count("after_in_child") == 2) * 100)
calls.append(os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))
print("child", *calls, random.getstate() == before, flush=True)
"""


def test_a_fork_calls_what_modules_registered() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _FORKS], cwd=APP, env=environment(), stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    counts, parent, *rest = process.stdout.read().splitlines()  # to the child's end
    assert process.wait() == 0
    # random's is the one more.
    assert counts == "1 1 2"
    pid, parent = parent.split(" ", 1)
    assert parent == "parent before after_in_parent True"
    # Of its own fork the interpreter is told, with all its hooks: five calls, and its word.
    own = "before after_in_child thread too late before after_in_parent"
    assert rest == [f"child {own} 107 False"], rest
    # It is a child of this process, not of the one that forked.
    assert os.waitpid(int(pid), 0)[1] == 0


def test_a_module_that_handles_forks_may_be_preimported(own: Callable[..., Service]) -> None:
    nox = own(NOX_BACKEND="zygote", NOX_PREIMPORT="logging,random,concurrent.futures.thread")
    nox.start()
    program = (
        "import sys; print('logging' in sys.modules, 'concurrent.futures.thread' in sys.modules)\n"
        "import logging, concurrent.futures as f, os\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "logging.error('said')\n"
        "pool = f.ThreadPoolExecutor(2)\n"
        "pool.submit(lambda: (__import__('time').sleep(0.2), print('at the end')))\n"
        "if not os.fork():\n"
        "    logging.error('by a fork'); os._exit(0)\n"
        "os.wait()\n"
    )
    result = nox.python(program)
    assert result["stdout"] == "True True\nsaid\nby a fork\nat the end\n", result


def test_signals_reach_a_program_that_was_forked_so(own: Callable[..., Service]) -> None:
    nox = own(NOX_BACKEND="zygote")
    nox.start()
    code = (
        "import os, signal, threading, _thread\n"
        "assert os.getpid() == 2 == threading.get_native_id(), threading.get_native_id()\n"
        "assert threading.main_thread().native_id == 2\n"
        "lock = threading.RLock(); lock.acquire(); lock.release()\n"
        "signal.raise_signal(signal.SIGTERM)"
    )
    assert nox.python(code)["signal"] == signal.SIGTERM
