"""The listening socket: who may connect, threads for the connections, reload and stop."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import threading
import time
import types
from collections.abc import Callable
from contextlib import suppress

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
        self._stop_read, self._stop = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._changed = threading.Condition()
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
        if not self._start_thread():
            raise OSError("no thread and no epoll can be had to listen with")
        systemd.ready()
        log("info", "ready", backend=self._service.backend.name)
        while not self._signals & {signal.SIGTERM, signal.SIGINT}:
            select.select([wake_read], [], [])
            wake_read.recv(64)
            if signal.SIGHUP in self._signals:
                self._signals.discard(signal.SIGHUP)
                systemd.reloading()
                self._reload()
                systemd.ready()
        self._drain()

    def _on_signal(self, number: int, _frame: types.FrameType | None) -> None:
        self._signals.add(number)

    def _start_thread(self) -> bool:
        try:
            poll = select.epoll()
        except OSError:  # no more descriptors
            return False
        # Exclusive: one connection wakes one thread.
        poll.register(self._listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        poll.register(self._stop_read, select.EPOLLIN)
        self._threads += 1
        try:
            threading.Thread(target=self._work, args=(poll,), daemon=True).start()
        except RuntimeError:  # no more threads on this host
            poll.close()
            self._threads -= 1
            return False
        return True

    def _work(self, poll: select.epoll) -> None:
        """Take one connection after the other, until the stop.

        Whoever accepts serves: a hand-over to another thread costs a hello world a tenth of its
        time. And threads stay, for the same reason.
        """
        with poll:
            while all(descriptor != self._stop_read for descriptor, _ in poll.poll()):
                self._accept()
        with self._changed:
            self._threads -= 1
            self._changed.notify_all()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, most likely
            log("error", "accept_failed", reason=str(error))
            time.sleep(0.05)  # or this would spin until one is free
            return
        with connection:
            pid, uid, _gid = peer(connection)
            if uid != self._client_uid:
                log("warning", "peer_refused", pid=pid, uid=uid)
                return
            with self._changed:
                self._busy += 1
                # The last thread that is left refuses, so that nobody waits in silence.
                full = self._busy > self._service.settings.slots + _FILE_OPERATIONS
                if self._busy == self._threads and not full:
                    full = not self._start_thread()
            try:
                if full:
                    self._refuse(connection)
                else:
                    self._service.serve(connection)
            except Exception as error:  # a bug must cost one connection, not the runner
                log("error", "internal_error", reason=repr(error))
            finally:
                with self._changed:
                    self._busy -= 1

    def _refuse(self, connection: socket.socket) -> None:
        log("warning", "too_many_connections")
        connection.settimeout(0)
        with suppress(OSError):
            connection.send(protocol.encode_failure(Failure("busy", "too many connections")))

    def _drain(self) -> None:
        # Who connects from now on waits for the next runner. Who was accepted is served: a refusal
        # would lose a request that could as well run.
        patience = self._service.settings.timeout + _DRAIN_MARGIN
        systemd.stopping(patience)
        log("info", "stopping")
        os.write(self._stop, b"x")
        with self._changed:
            # Those that serve, too, end by themselves when they are done.
            self._changed.wait_for(lambda: self._threads <= self._busy, patience)
            self._listener.close()
            self._changed.wait_for(lambda: not self._threads, patience)
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
