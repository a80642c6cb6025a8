"""The listening socket: who may connect, threads for the connections, reload and stop."""

from __future__ import annotations

import os
import queue
import selectors
import signal
import socket
import struct
import threading
import time
import types
from collections.abc import Callable

from nox_runner import protocol, systemd
from nox_runner.log import log
from nox_runner.operations import Service
from nox_runner.protocol import Failure

_FILE_OPERATIONS = 32
"""Connections beside those that run: uploads, downloads, listings, health."""
_DRAIN_MARGIN = 5.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Server:
    """Serves `listener` until SIGTERM or SIGINT; SIGHUP calls `reload`."""

    def __init__(
        self,
        listener: socket.socket,
        service: Service,
        client_uid: int,
        reload: Callable[[], None],
    ) -> None:
        self._listener = listener
        self._service = service
        self._client_uid = client_uid
        self._reload = reload
        self._signals: set[int] = set()
        # Threads stay and take one connection after the other: to start one for each costs a
        # hello world a tenth of its time.
        self._waiting: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._free = threading.Condition()
        self._threads = 0
        self._busy = 0

    def run(self) -> None:
        """Serve, and return when the work that was under way at the stop has ended."""
        wake_read, wake_write = socket.socketpair()
        wake_read.setblocking(False)
        wake_write.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        # A handler alone would not end select (PEP 475).
        signal.set_wakeup_fd(wake_write.fileno())
        self._listener.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            systemd.ready()
            log("info", "ready", backend=self._service.backend.name)
            while not self._signals & {signal.SIGTERM, signal.SIGINT}:
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        wake_read.recv(64)
                if signal.SIGHUP in self._signals:
                    self._signals.discard(signal.SIGHUP)
                    systemd.reloading()
                    self._reload()
                    systemd.ready()
        self._listener.close()
        self._drain()

    def _on_signal(self, number: int, _frame: types.FrameType | None) -> None:
        self._signals.add(number)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, most likely
            log("error", "accept_failed", reason=str(error))
            time.sleep(0.05)  # or this would spin until one is free
            return
        pid, uid, _gid = peer(connection)
        if uid != self._client_uid:
            log("warning", "peer_refused", pid=pid, uid=uid)
            connection.close()
            return
        with self._free:
            full = self._busy >= self._service.settings.slots + _FILE_OPERATIONS
            if not full:
                self._busy += 1
            wants_thread = self._busy > self._threads
        if full:
            self._refuse(connection)
            return
        if wants_thread:
            try:
                threading.Thread(target=self._work, daemon=True).start()
                self._threads += 1
            except RuntimeError:  # no more threads on this host
                self._done()
                self._refuse(connection)
                return
        self._waiting.put(connection)

    def _refuse(self, connection: socket.socket) -> None:
        log("warning", "too_many_connections")
        connection.settimeout(0)
        try:
            connection.send(protocol.encode_failure(Failure("busy", "too many connections")))
        except OSError:
            pass
        finally:
            connection.close()

    def _work(self) -> None:
        while True:
            connection = self._waiting.get()
            try:
                with connection:
                    self._service.serve(connection)
            except Exception as error:  # a bug must cost one connection, not the runner
                log("error", "internal_error", reason=repr(error))
            finally:
                del connection
                self._done()

    def _done(self) -> None:
        with self._free:
            self._busy -= 1
            self._free.notify_all()

    def _drain(self) -> None:
        # Who connects from now on waits for the next runner. Who was accepted is served: a refusal
        # would lose a request that could as well run.
        patience = self._service.settings.timeout + _DRAIN_MARGIN
        systemd.stopping(patience)
        log("info", "stopping")
        with self._free:
            self._free.wait_for(lambda: not self._busy, patience)
            left = self._busy
        if left:
            log("warning", "stopped_with_work_left", connections=left)
        log("info", "stopped")


def peer(connection: socket.socket) -> tuple[int, int, int]:
    """pid, uid and gid of the process at the other end, as the kernel knows them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def listen(path: str) -> socket.socket:
    """A listening socket at `path`, for this user only (mode 0600). OSError if it cannot be.

    A socket that a dead runner left there is replaced; one that answers is not.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            _remove_dead(path)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_dead(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise FileExistsError(f"another runner answers at {path}")
