"""Load, loss, reload and stop of the two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
from service import APP, Service, as_user, environment, running, wait_for

from nox_runner import protocol

Make = Callable[..., Service]


def test_a_full_queue(own: Make) -> None:
    nox = own(NOX_SLOTS=1, NOX_QUEUE=2).start()
    with ThreadPoolExecutor(12) as pool, nox.client() as client:
        body = {"cmd": "sleep 2"}
        answers = [pool.submit(client.post, "/run_sh", json=body) for _ in range(12)]
        slowest = 0.0
        while not all(answer.done() for answer in answers):
            started = time.monotonic()
            assert client.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
        results = [answer.result() for answer in answers]
    statuses = [result.status_code for result in results]
    assert statuses.count(200) >= 3 and statuses.count(429) >= 5
    assert set(statuses) == {200, 429}
    full = next(result for result in results if result.status_code == 429)
    assert 1 <= int(full.headers["retry-after"]) <= 20
    assert full.headers["content-type"] == "application/problem+json"
    assert slowest < 2  # it waited for no run
    assert nox.detail()["slots"]["used"] == 0


def test_a_client_that_leaves(own: Make) -> None:
    nox = own(NOX_SLOTS=1, NOX_QUEUE=5, NOX_TIMEOUT=20).start()
    marker = "31415"

    def leave(seconds: float) -> None:
        with nox.client(timeout=seconds) as client:
            try:
                client.post("/run_sh", json={"cmd": f"sleep {marker}"})
            except httpx.ReadTimeout:
                return
        raise AssertionError("the run ended")

    first = threading.Thread(target=leave, args=(5.0,))
    first.start()
    wait_for(lambda: list(running("sleep", marker)), "the run")
    second = threading.Thread(target=leave, args=(2.5,))
    second.start()
    wait_for(lambda: nox.detail()["queue"]["used"] == 1, "the one who waits")
    second.join()
    wait_for(lambda: nox.detail()["queue"]["used"] == 0, "the empty queue")
    first.join()
    wait_for(lambda: not list(running("sleep", marker)), "the kill")
    started = time.monotonic()
    assert nox.shell("echo next")["stdout"] == "next\n"
    assert time.monotonic() - started < 10
    log = [json.loads(line) for line in nox.front_log().splitlines()]
    assert sum(line.get("status") == 499 for line in log) == 2
    assert "run_cancelled" in nox.runner_log()
    assert (nox.logs / "error.log").read_text() == ""


def test_the_runner_lost_and_back(own: Make) -> None:
    nox = own().start()
    assert nox.runner is not None
    with nox.client() as client, ThreadPoolExecutor(1) as pool:
        lost = pool.submit(client.post, "/run_sh", json={"cmd": "sleep 27182"})
        wait_for(lambda: list(running("sleep", "27182")), "the run")
        nox.runner.kill()
        nox.runner.wait()
        assert lost.result().status_code == 503
        wait_for(lambda: not list(running("sleep", "27182")), "the end of its run")
        for answer in (client.post("/run_py", json={"code": "1"}), client.get("/files")):
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert answer.headers["content-type"] == "application/problem+json"
        wait_for(lambda: client.get("/health").status_code == 503, "bad health")
        nox.start_runner()
        assert client.post("/run_py", json={"code": "print(1)"}).json()["stdout"] == "1\n"
        wait_for(lambda: client.get("/health").status_code == 200, "good health")


def test_a_sandbox_that_does_not_work_and_recovers(own: Make) -> None:
    nox = own()
    nox.sandbox.rename(nox.sandbox.with_name("away"))
    nox.start()
    assert '"sandbox_unable"' in nox.runner_log()
    with nox.client() as client:
        answer = client.get("/health")
        assert answer.status_code == 503 and "trial run" in answer.json()["detail"]
        public = httpx.get(f"{nox.url}/health")
        assert public.status_code == 503 and "trial" not in public.text
        assert client.post("/run_sh", json={"cmd": "true"}).status_code == 503
        nox.sandbox.with_name("away").rename(nox.sandbox)
        wait_for(lambda: client.get("/health").status_code == 200, "health")
    assert nox.shell("true")["status"] == "ok"


def test_reload(own: Make) -> None:
    nox = own().start()
    assert nox.front is not None and nox.runner is not None
    old = nox.token
    with ThreadPoolExecutor(1) as pool, nox.client(old) as client:
        long = pool.submit(client.post, "/run_sh", json={"cmd": "sleep 1.2; echo kept"})
        wait_for(lambda: nox.detail()["slots"]["used"] == 1, "the run")
        nox.token = "f" * 64
        nox.write_settings(NOX_TIMEOUT=3, NOX_SLOTS=2, NOX_PORT=1, NOX_QUEU=3)
        for process in (nox.front, nox.runner):
            process.send_signal(signal.SIGHUP)
        wait_for(lambda: '"reloaded"' in nox.front_log(), "the front's reload")
        wait_for(lambda: '"reloaded"' in nox.runner_log(), "the runner's reload")
        assert client.get("/files").status_code == 401
        detail = nox.detail()
        assert detail["settings"]["timeout"] == 3 and detail["slots"]["total"] == 2
        assert long.result().json()["stdout"] == "kept\n"
    errors = (nox.logs / "error.log").read_text()
    assert "needs a restart" in errors and "did you mean NOX_QUEUE" in errors
    nox.write_settings(NOX_TIMEOUT="never")
    nox.front.send_signal(signal.SIGHUP)
    nox.runner.send_signal(signal.SIGHUP)
    wait_for(lambda: '"reload_failed"' in nox.front_log(), "the refusal")
    wait_for(lambda: '"reload_failed"' in nox.runner_log(), "the refusal")
    assert nox.detail()["settings"]["timeout"] == 3
    assert nox.token not in nox.front_log()


def test_two_tokens_for_a_while(own: Make) -> None:
    nox = own().start()
    assert nox.front is not None
    old, nox.token = nox.token, "e" * 64
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3))
    nox.write_settings(NOX_API_TOKEN_PREVIOUS=old, NOX_API_TOKEN_PREVIOUS_UNTIL=until)
    nox.front.send_signal(signal.SIGHUP)
    wait_for(lambda: '"reloaded"' in nox.front_log(), "the reload")
    with nox.client(old) as before, nox.client() as after, nox.client("d" * 64) as wrong:
        assert before.get("/files").status_code == 200
        assert after.get("/files").status_code == 200
        assert wrong.get("/files").status_code == 401
        wait_for(lambda: before.get("/files").status_code == 401, "its end")
        assert after.get("/files").status_code == 200


def test_rotation_loses_no_line(own: Make) -> None:
    nox = own().start()
    ids = []
    with nox.client() as client:
        for number in range(90):
            if number % 30 == 15:
                log = nox.logs / "nox-api.log"
                log.rename(nox.logs / f"nox-api.log.{number}")
            ids.append(client.get("/health").headers["x-request-id"])

    def logged() -> set[str]:
        lines = [
            json.loads(line)
            for path in nox.logs.glob("nox-api.log*")
            for line in path.read_text().splitlines()
        ]
        return {line["request_id"] for line in lines if "request_id" in line}

    wait_for(lambda: set(ids) <= logged(), "each line")
    assert len(list(nox.logs.glob("nox-api.log*"))) == 4


def test_an_orderly_stop(own: Make) -> None:
    nox = own().start()
    assert nox.front is not None and nox.runner is not None
    with ThreadPoolExecutor(1) as pool, nox.client() as client:
        last = pool.submit(client.post, "/run_sh", json={"cmd": "sleep 0.8; echo finished"})
        wait_for(lambda: nox.detail()["slots"]["used"] == 1, "the run")
        nox.front.send_signal(signal.SIGTERM)
        nox.runner.send_signal(signal.SIGTERM)
        assert last.result().json()["stdout"] == "finished\n"
    assert nox.front.wait(5) == 0 and nox.runner.wait(5) == 0
    assert not nox.socket.exists()


def test_systemd_is_told(own: Make) -> None:
    nox = own()
    path = str(nox.run / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        os.chmod(path, 0o777)
        manager.settimeout(60)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(nox.socket))
        listener.listen()
        os.chmod(nox.socket, 0o777)
        # What systemd does: descriptor 3, and the pid that is to use it.
        passing = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.argv[1], sys.argv[1:])"  # noqa: E501
        command = as_user(
            sys.executable, "-c", passing, sys.executable, "-m", "nox_runner",
            "--settings", str(nox.runner_settings), "--client-user", "self",
        )  # fmt: skip
        env = {**environment(), "NOTIFY_SOCKET": path, "LISTEN_FDS": "1"}

        def third() -> None:
            os.dup2(listener.fileno(), 3)

        nox.runner = subprocess.Popen(command, cwd=APP, env=env, preexec_fn=third, pass_fds=[3])
        assert manager.recv(4096) == b"READY=1"
        nox.runner.send_signal(signal.SIGHUP)
        assert manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(4096) == b"READY=1"
        nox.start_front()
        assert nox.shell("echo 1")["stdout"] == "1\n"
        nox.runner.send_signal(signal.SIGTERM)
        assert b"STOPPING=1\nEXTEND_TIMEOUT_USEC=" in manager.recv(4096)
        assert nox.runner.wait(10) == 0
        listener.close()


def test_a_restart_closes_no_connection(own: Make) -> None:
    nox = own()
    nox.start_runner()
    path = str(nox.run / "notify")
    stored: dict[str, list[int]] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        os.chmod(path, 0o777)
        manager.settimeout(60)

        def obey_until(last: str) -> None:
            """What systemd does with messages, up to one that begins with `last`."""
            message = ""
            while not message.startswith(last):
                data, descriptors, _, _ = socket.recv_fds(manager, 4096, 8)
                message = data.decode()
                name = message.partition("FDNAME=")[2]
                if message.startswith("FDSTORE=1"):
                    stored.setdefault(name, []).extend(descriptors)
                else:  # a barrier's end, or none
                    for descriptor in [*descriptors, *stored.pop(name, [])]:
                        os.close(descriptor)

        def start() -> None:
            passed = [(name, one) for name, many in stored.items() for one in many]
            names = ":".join(name for name, _ in passed)
            env = {"LISTEN_FDS": str(len(passed)), "LISTEN_FDNAMES": names, "NOTIFY_SOCKET": path}
            nox.start_front(env, [one for _, one in passed])
            obey_until("READY=1")

        start()
        assert list(stored) == ["listener"]
        with nox.client() as idle, nox.client() as busy, ThreadPoolExecutor(1) as pool:
            assert idle.get("/files").status_code == 200
            assert busy.get("/files").status_code == 200
            running_one = pool.submit(busy.post, "/run_sh", json={"cmd": "sleep 1; echo done"})
            wait_for(lambda: list(running("sleep", "1")), "the run")
            assert nox.front is not None
            nox.front.send_signal(signal.SIGTERM)
            obey_until("BARRIER=1")
            assert nox.front.wait(60) == 0
            assert running_one.result().json()["stdout"] == "done\n"
            assert running_one.result().headers["connection"] == "close"
            assert len(stored["connection"]) == 1
            # Sent while nobody is there to read it.
            late = pool.submit(idle.post, "/run_sh", json={"cmd": "echo late"})
            start()
            assert late.result().json()["stdout"] == "late\n"
            assert list(stored) == ["listener"]
        # An address of its own follows the settings, kept socket or not.
        nox.front.send_signal(signal.SIGTERM)
        obey_until("BARRIER=1")
        assert nox.front.wait(60) == 0
        old = nox.port
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            nox.port = probe.getsockname()[1]
        nox.write_settings(NOX_PORT=nox.port)
        start()
        assert nox.shell("echo moved")["stdout"] == "moved\n"
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", old)) != 0
        for descriptor in stored.pop("listener"):
            os.close(descriptor)


def test_strangers_and_nonsense_at_the_runners_socket(own: Make) -> None:
    nox = own().start()
    assert nox.runner is not None
    if os.getuid() == 0:  # the runner is another user's
        os.chmod(nox.socket, 0o777)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(nox.socket))
            assert stranger.recv(1) == b""
        assert '"peer_refused"' in nox.runner_log()
    nonsense = (
        "import socket, sys\nfor data in (b'', b'GET / HTTP/1.1\\r\\n\\r\\n', b'\\0\\0\\0\\2{}',"
        " b'\\xff' * 99, b'\\0\\0\\0\\5ab'):\n"
        "    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(data)\n"
        "    s.shutdown(socket.SHUT_WR); print(s.recv(999))"
    )
    told = subprocess.run(
        as_user(sys.executable, "-c", nonsense, str(nox.socket)),
        capture_output=True, text=True, env=environment(), timeout=20,
    )  # fmt: skip
    assert told.stdout.count('"protocol"') == 5, told
    assert nox.runner.poll() is None and nox.shell("true")["status"] == "ok"


def test_the_front_refuses_bad_settings(own: Make) -> None:
    nox = own()
    nox.token = "replace_with_secure_token"
    nox.write_settings()
    started = subprocess.run(
        as_user(sys.executable, "-m", "nox_api", "--settings", str(nox.front_settings)),
        cwd=APP, env=environment(), capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert started.returncode == os.EX_CONFIG, "systemd is told to try no more"
    reason = json.loads(started.stderr.splitlines()[-1])["reason"]
    assert "NOX_API_TOKEN" in reason and "openssl rand -hex 32" in reason
    assert nox.token not in started.stderr


def test_the_runner_refuses_to_be_root(own: Make) -> None:
    if os.getuid() != 0:
        print("not root: nothing to refuse")
        return
    nox = own()
    started = subprocess.run(
        [sys.executable, "-m", "nox_runner", "--settings", str(nox.runner_settings),
         "--socket", str(nox.socket)],
        cwd=APP, env=environment(), capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert started.returncode == 1 and "setpriv" in started.stderr


def test_the_app_is_there_for_uvicorn(own: Make) -> None:
    nox = own()
    code = (
        "import sys, nox_api, nox_api.settings as s; s.DEFAULT_PATH = sys.argv[1]\n"
        "print(type(nox_api.app).__name__, nox_api.app is nox_api.app)"
    )
    told = subprocess.run(
        as_user(sys.executable, "-c", code, str(nox.front_settings)),
        cwd=APP, env=environment(), capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert told.stdout == "FastAPI True\n", told.stderr


def test_health_is_the_protocols(own: Make) -> None:
    assert protocol.encode_request(protocol.Health())[4:] == b'{"v":1,"op":"health"}'


def test_a_bubblewrap_that_is_missing_and_then_there(own: Make) -> None:
    nox = own(NOX_BACKEND="bubblewrap")
    path = nox.root / "bwrap"
    nox.start("--bwrap", str(path))
    with nox.client() as client:
        answer = client.get("/health")
        assert answer.status_code == 503 and str(path) in answer.json()["detail"]
        path.symlink_to("/usr/bin/bwrap")
        wait_for(lambda: client.get("/health").status_code == 200, "health")


def test_a_client_that_leaves_a_download(own: Make) -> None:
    nox = own().start()
    nox.python("open('large', 'wb').write(bytes(60 << 20))")
    with nox.client() as client:
        with client.stream("GET", "/files/large") as answer:
            assert int(answer.headers["content-length"]) == 60 << 20
            next(answer.iter_bytes())
        assert client.get("/health").status_code == 200
    wait_for(lambda: '"path": "/files/large"' in nox.front_log(), "the end of the download")
    assert (nox.logs / "error.log").read_text() == ""
    assert '"error"' not in nox.runner_log()


def test_a_zygote_that_is_killed_is_replaced(own: Make) -> None:
    """Each of its three processes; and no sandbox, or anything else, outlives it, or the runner."""
    nox = own(NOX_BACKEND="zygote").start()
    assert nox.runner is not None
    runner = nox.runner.pid
    assert nox.python("print(1)")["stdout"] == "1\n"
    old: dict[int, str] = {}
    for which in ("starter", "init", "zygote"):
        old = descendants(runner)
        killed = {name: pid for pid, name in old.items()}[which]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: nox.python("print(1)")["stdout"] == "1\n", "a run")
        wait_for(partial(are_gone, list(old)), "the end of the old ones")
    old = descendants(runner)
    assert set(old.values()) == {"starter", "init", "zygote", "sandbox's init", "program"}
    nox.runner.kill()
    nox.runner.wait()
    wait_for(partial(are_gone, list(old)), "the end")


def test_programs_that_run_outlive_a_change_of_their_limits(own: Make) -> None:
    """Sandboxes are made anew then; the old zygote ends with the last program of its."""
    nox = own(NOX_BACKEND="zygote", NOX_SLOTS=4).start()
    assert nox.runner is not None
    text = "open('here', 'w').close()\nimport time; time.sleep(3); print('done')"
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(nox.python, text)
        wait_for(lambda: (nox.sandbox / "here").exists(), "the program")
        old = descendants(nox.runner.pid)
        nox.settings["NOX_MEMORY"] = "300M"
        nox.write_settings()
        nox.runner.send_signal(signal.SIGHUP)
        limit = "import resource; print(resource.getrlimit(resource.RLIMIT_DATA)[0] >> 20)"
        wait_for(lambda: nox.python(limit)["stdout"] == "300\n", "the new limit")
        assert not run.done()
        assert (run.result()["status"], run.result()["stdout"]) == ("ok", "done\n")
    wait_for(partial(are_gone, list(old)), "the end of the old zygote")
    assert nox.python("print(1)")["stdout"] == "1\n"


def are_gone(pids: list[int]) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_sandbox_that_is_killed_from_outside_is_the_services_fault(own: Make) -> None:
    """Its init by itself, and with all others; the program's own end stays the program's."""
    nox = own(NOX_BACKEND="zygote").start()
    assert nox.runner is not None
    runner = nox.runner.pid
    text = "open('here', 'w').close()\nimport time; time.sleep(20)"
    for which in ("sandbox's init", "zygote"):
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(nox.post, "/run_py", code=text)
            wait_for(lambda: (nox.sandbox / "here").exists(), "the program")
            for pid, name in descendants(runner).items():
                if name == which:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            assert run.result()["status"] == "sandbox_error"
        (nox.sandbox / "here").unlink()
        wait_for(lambda: nox.python("print(1)")["stdout"] == "1\n", "a run")
    result = nox.python("import os; os.kill(os.getpid(), 9)")
    assert (result["status"], result["signal"]) == ("error", 9)


def test_a_sandbox_directory_that_is_replaced(own: Make) -> None:
    nox = own(NOX_BACKEND="zygote").start()
    nox.python("open('old', 'w').close()")
    nox.sandbox.rename(nox.sandbox.with_name("away"))
    nox.sandbox.mkdir()
    if os.getuid() == 0:
        shutil.chown(nox.sandbox, "nobody")
    assert nox.python("import os; print(os.listdir('.'))")["stdout"] == "[]\n"


def test_modules_that_cannot_be_loaded_ahead_are_skipped(own: Make) -> None:
    nox = own(NOX_BACKEND="auto", NOX_PREIMPORT="antigravity_does_not_exist,json").start()
    assert nox.detail()["runner"]["backend"] == "zygote"
    assert "antigravity_does_not_exist" in nox.runner_log()
    assert "preimport_skipped" in nox.runner_log()


def descendants(runner: int) -> dict[int, str]:
    """What each process below the runner is, by how deep in pid namespaces it is, and which one."""
    names = {
        (0, False): "starter", (1, True): "init", (1, False): "zygote",
        (2, True): "sandbox's init", (2, False): "program",
    }  # fmt: skip
    found: dict[int, str] = {}
    waiting = children(runner)
    while waiting:
        pid = waiting.pop()
        try:
            numbers = pids(pid)
            waiting += children(pid)
        except OSError:
            continue
        deep = len(numbers) - len(pids(runner))
        found[pid] = names[deep, deep > 0 and numbers[-1] == "1"]
    return found


def pids(pid: int) -> list[str]:
    """A process's number in each pid namespace it is in."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        main = list(map(int, file.read().split()))
    for thread in os.listdir(f"/proc/{pid}/task"):
        if int(thread) != pid:
            try:
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    main += map(int, file.read().split())
            except FileNotFoundError:
                continue
    return main
