"""The quota on the sandbox, kept before uploads and runs, and while runs are going.

The truth is a scan of the whole tree. As that costs, it is made only after something may have
changed: at a bounded rate, or at once when the file system's free space (one cheap call) tells that
the quota may be used up. A run that breaks the quota costs itself and its like, never what was
there before: all runs that are going are killed, and what was changed since the first of them
began, or the first of those that have ended since the last good scan, is removed, except uploads.
See docs/decisions/0007-quota.md.
"""

from __future__ import annotations

import math
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from nox_runner import directories, paths, tree
from nox_runner.log import log
from nox_runner.protocol import Failure, SandboxUsage
from nox_runner.settings import Settings

_TICK = 0.05
"""Seconds between two looks at the free space while runs are going."""
_SCAN_SECONDS = 2.0
_SCAN_SHARE = 20
"""A scan of n seconds is followed by 20 n without one, unless there is suspicion."""
_FRESH_SECONDS = 0.2
_KILL_SECONDS = 15.0
_CLOCK_SLACK_NS = 20_000_000  # the kernel stamps files by a clock that lags by up to 10 ms
_HOUSEKEEPING_SECONDS = 3600.0
_PRUNINGS = 20
_LOOK_SECONDS = 0.2
"""For what runs' processes hold; it stops a run that makes that long."""


class _EnoughError(Exception):
    """The quota is exceeded; by how much does not matter."""


@dataclass(frozen=True)
class _Usage:
    """`files` counts every entry of a directory. Sparse files count in full, hard links once."""

    bytes: int = 0
    files: int = 0


@dataclass(eq=False)
class Lease:
    """A run that is going. `exceeded` tells that the quota was, and this run was cut for it."""

    connection: socket.socket
    started_ns: int
    exceeded: bool = False

    def cut(self) -> None:
        """End the run: by this shutdown its supervision sees the client as gone."""
        self.exceeded = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)


class Quota:
    """Used by many threads. Nothing is done by `__init__` or before `start`."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._scanning = threading.Lock()
        self._running: set[Lease] = set()
        self._uploads: list[Upload] = []
        self._uploaded: dict[tuple[int, int], tuple[int, float]] = {}
        """By device and inode size and time of late uploads, which are not a run's."""
        self._cutting = False
        self._dirty = True
        self._usage = _Usage()
        self._base, self._free = _Usage(), _Usage()
        """What was used, and what the file system had, when nothing was hidden from a scan."""
        self._suspects_ns = math.inf
        """When the first run began of those that ended since the last scan within the quota."""
        self._scanned = float("-inf")
        self._cost = 0.0
        self._kept = time.monotonic()

    def start(self) -> None:
        """Scan, and watch from now on."""
        try:
            self._check()
        except OSError as error:  # the proof of the sandbox will say what is wrong with it
            log("error", "quota_unknown", reason=str(error))
        threading.Thread(target=self._watch, name="quota", daemon=True).start()

    def usage(self) -> SandboxUsage:
        """As far as is known without a scan."""
        settings, usage = self._settings(), self._usage
        return SandboxUsage(usage.bytes, usage.files, settings.quota_bytes, settings.quota_files)

    def touched(self) -> None:
        """Something was removed, or may have been written."""
        with self._changed:
            self._dirty = True
            self._changed.notify_all()

    @contextmanager
    def run(self, connection: socket.socket) -> Iterator[Lease]:
        """Hold a lease for a run. Failure `no_space` if the sandbox is full."""
        if self._is_full() and self._is_stale():
            self._check()
        with self._changed:
            self._changed.wait_for(lambda: not self._cutting, _KILL_SECONDS)
            if self._cutting or self._is_full():
                raise self._full()
            lease = Lease(connection, _now_ns())
            self._running.add(lease)
            self._dirty = True
            self._changed.notify_all()
        try:
            yield lease
        finally:
            with self._changed:
                self._running.discard(lease)
                self._suspects_ns = min(self._suspects_ns, lease.started_ns)
                self._changed.notify_all()
                # Whoever is told of the removal may rely on it.
                self._changed.wait_for(lambda: not self._cutting, _KILL_SECONDS)
            if not lease.exceeded and self._is_suspicious():
                self._check(lease)

    @contextmanager
    def upload(self, path: str) -> Iterator[Upload]:
        """Room for an upload to `path` and its directories, reserved piece by piece."""
        if self._dirty and self._is_stale():
            self._check()
        upload = Upload(self, files=path.count("/") + 1)
        with self._changed:
            self._uploads.append(upload)
        try:
            yield upload
            with self._changed:
                self._usage = _Usage(
                    self._usage.bytes + upload.size, self._usage.files + upload.files
                )
        finally:
            with self._changed:
                self._uploads.remove(upload)
                if upload.state:
                    self._remember(upload.state, time.time_ns())
                self._dirty = True
                self._changed.notify_all()

    def reserve(self, upload: Upload, size: int) -> None:
        """Give `upload` room for `size` bytes more; Failure `no_space` if there is none."""
        settings = self._settings()
        with self._changed:
            taken = self._usage.bytes + sum(each.size for each in self._uploads)
            files = self._usage.files + sum(each.files for each in self._uploads)
            if taken + size > settings.quota_bytes or files > settings.quota_files:
                raise self._full()
            upload.size += size

    def stored(self, upload: Upload, state: os.stat_result) -> None:
        """An upload is just about to be in its place, and counts as one however long that takes."""
        with self._changed:
            upload.state = state
            self._remember(state, math.inf)

    def _remember(self, state: os.stat_result, at_ns: float) -> None:
        self._uploaded[state.st_dev, state.st_ino] = (state.st_size, at_ns)

    def _full(self) -> Failure:
        settings = self._settings()
        return Failure(
            "no_space",
            f"the sandbox is full: its quota is {settings.quota_bytes} bytes and"
            f" {settings.quota_files} files",
        )

    def _is_full(self) -> bool:
        settings = self._settings()
        return (
            self._usage.bytes >= settings.quota_bytes or self._usage.files >= settings.quota_files
        )

    def _is_stale(self) -> bool:
        return time.monotonic() - self._scanned > max(_FRESH_SECONDS, 5 * self._cost)

    def _is_suspicious(self) -> bool:
        """Whether the file system lost as much since `_base` as would use up the quota."""
        settings = self._settings()
        try:
            free = _free(settings.sandbox)
        except OSError:
            return False
        usage, before = self._base, self._free
        return (
            usage.bytes + before.bytes - free.bytes > settings.quota_bytes
            or usage.files + before.files - free.files > settings.quota_files
        )

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty, _HOUSEKEEPING_SECONDS)
            time.sleep(_TICK)
            try:
                since = time.monotonic() - self._scanned
                due = since >= max(_SCAN_SECONDS, _SCAN_SHARE * self._cost)
                if self._dirty and (due or self._is_suspicious()):
                    self._check()
                if time.monotonic() - self._kept >= _HOUSEKEEPING_SECONDS:
                    self._kept = time.monotonic()
                    self.housekeep()
            except Exception as error:  # such as a sandbox that was taken away; the watch goes on
                log("error", "quota_unknown", reason=repr(error))
                time.sleep(_SCAN_SECONDS)

    def housekeep(self) -> int:
        """Remove what did not change for NOX_KEEP_DAYS, if that is set; how many files.

        By the time of change, which a run cannot set, unlike the time of modification.
        """
        settings = self._settings()
        if not settings.keep_days:
            return 0
        before_ns = time.time_ns() - settings.keep_days * 86_400 * 1_000_000_000
        with self._scanning:
            removed = _remove(settings.sandbox, lambda _, state: state.st_ctime_ns < before_ns)
        if removed:
            log("info", "housekeeping", removed=removed, keep_days=settings.keep_days)
            self.touched()
        return removed

    def _check(self, ended: Lease | None = None) -> None:
        """Scan, and enforce. `ended` is a run that ended just now and is to be told as well."""
        with self._scanning, suppress(FileNotFoundError):
            if self._is_within():
                return
            with self._changed:
                self._cutting = True
                cut = {*self._running, *((ended,) if ended else ())}
                for lease in cut:
                    lease.cut()
                self._changed.wait_for(lambda: not cut & self._running, _KILL_SECONDS)
            try:
                # Without a run there is nobody to blame: an operator may have copied files there,
                # or lowered the quota. Then it is only full.
                since_ns = min([self._suspects_ns, *(lease.started_ns for lease in cut)])
                if since_ns < math.inf:
                    removed = self._prune(int(since_ns))
                    self._suspects_ns = math.inf
                    log("warning", "quota_exceeded", runs=len(cut), removed=removed)
            finally:
                with self._changed:
                    self._cutting = False
                    self._changed.notify_all()

    def _prune(self, since_ns: int) -> int:
        """Remove what changed since then; how many files."""

        def is_surplus(name: str, state: os.stat_result) -> bool:
            if state.st_ctime_ns < since_ns:
                return False
            inode = state.st_dev, state.st_ino
            under_way = {upload.inode for upload in tuple(self._uploads)}
            # None: one that is just being made. By its name alone a run's would be taken for one.
            if inode in under_way or (
                None in under_way and name.startswith(paths.TEMPORARY_PREFIX)
            ):
                return False
            size, _ = self._uploaded.get(inode, (-1, 0))
            return size != state.st_size

        directories.give_back(self._settings().sandbox)
        removed = 0
        for _ in range(_PRUNINGS):
            # A directory that shrinks while it is read may not show all of its entries.
            now = _remove(self._settings().sandbox, is_surplus)
            if not now:
                break
            removed += now
        self._scan()
        return removed

    def _is_within(self) -> bool:
        """A scan. Who goes on while it can't be made may be the cause, so that is not within."""
        sandbox = self._settings().sandbox
        directories.give_back(sandbox)
        try:
            return self._scan()
        except PermissionError as error:
            if not self._running or os.stat(sandbox).st_uid != os.getuid():
                raise
            log("warning", "quota_unknown", reason=repr(error))
            return False

    def _scan(self) -> bool:
        """Find what the sandbox holds; whether that is within the quota.

        If so, nobody who had ended before is suspected any more.
        """
        with self._changed:
            # Who ends from now on may have written where the scan has been already.
            suspects_ns, self._suspects_ns = self._suspects_ns, math.inf
        within = False
        try:
            within = self._measured()
        finally:
            if not within:
                with self._changed:
                    self._suspects_ns = min(self._suspects_ns, suspects_ns)
        return within

    def _measured(self) -> bool:
        settings = self._settings()
        started = time.monotonic()
        with self._changed:
            going = bool(self._running)
            oldest_ns = min([_now_ns(), *(lease.started_ns for lease in self._running)])
            self._dirty = bool(self._running or self._uploads)
        is_suspicious = self._is_suspicious()
        free = _free(settings.sandbox)
        usage, complete = _measure(settings)
        # Who fills it up to the last byte breaks it: there is no room for anybody else.
        within = usage.bytes < settings.quota_bytes and usage.files < settings.quota_files
        self._cost = time.monotonic() - started
        if within and (is_suspicious or going):
            # What was unlinked while it is open takes room, but is nowhere in the tree. Others may
            # free room meanwhile, so it is looked for without suspicion, too.
            size, files = _hidden(os.stat(settings.sandbox).st_dev)
            if is_suspicious or size < math.inf:
                within = (
                    usage.bytes + size < settings.quota_bytes
                    and usage.files + files < settings.quota_files
                )
            # A tree that is moved about so that it can't be seen gets no benefit of the doubt.
            within &= complete or not is_suspicious
        self._scanned = time.monotonic()
        if complete or not within:
            self._usage = usage
            # While a run is going it may hold what is in no directory. A loss that is not looked
            # into must not be forgotten.
            if is_suspicious or not going:
                self._base, self._free = usage, free
        with self._changed:
            self._dirty |= within and not complete
            for key in [k for k, (_, at_ns) in self._uploaded.items() if at_ns < oldest_ns]:
                del self._uploaded[key]
        return within


@dataclass(eq=False)
class Upload:
    """What an upload has taken of the quota."""

    quota: Quota
    files: int
    size: int = 0
    inode: tuple[int, int] | None = None
    """Its file's, with the device in front, once there is one."""
    state: os.stat_result | None = None
    """Its file's, once that is complete."""

    def metered(self, content: Iterable[bytes]) -> Iterator[bytes]:
        """`content`, for which room is reserved before each piece; Failure `no_space`."""
        self.quota.reserve(self, 0)
        for piece in content:
            self.quota.reserve(self, len(piece))
            yield piece

    def begun(self, state: os.stat_result) -> None:
        """Its file is there, and empty."""
        self.inode = state.st_dev, state.st_ino

    def stored(self, state: os.stat_result) -> None:
        """Its file is complete, and just about to be in its place."""
        self.quota.stored(self, state)


def _now_ns() -> int:
    """Now, as the kernel may have stamped a file that is written only now."""
    return time.time_ns() - _CLOCK_SLACK_NS


def _free(sandbox: str) -> _Usage:
    state = os.statvfs(sandbox)
    return _Usage(state.f_bfree * state.f_frsize, state.f_ffree)


def _measure(settings: Settings) -> tuple[_Usage, bool]:
    """What the sandbox holds, and whether all of it was seen."""
    size = files = 0
    linked: set[tuple[int, int]] = set()

    def on_entry(_directory: int, _name: str, state: os.stat_result) -> None:
        nonlocal size, files
        files += 1
        if state.st_nlink > 1 and not stat.S_ISDIR(state.st_mode):
            key = (state.st_dev, state.st_ino)
            if key in linked:
                return
            linked.add(key)
        # Blocks may not be allocated yet, and small files take a whole one.
        size += max(state.st_blocks * 512, state.st_size)
        if files > settings.quota_files or size > settings.quota_bytes:
            raise _EnoughError

    try:
        complete = tree.walk(settings.sandbox, on_entry)
    except _EnoughError:
        complete = False
    return _Usage(size, files), complete


def _hidden(device: int) -> tuple[float, float]:
    """Bytes and number of files on `device` without a name that runs hold.

    Infinite if one of their processes holds what can't be measured: it keeps others from looking at
    it, has descriptors under way in a socket, has mapped such a file and closed it, or has so much
    that it takes too long.
    """
    found: dict[int, int] = {}
    end = time.monotonic() + _LOOK_SECONDS
    try:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(ProcessLookupError, FileNotFoundError):
                if _is_of_a_run(pid) and not _look_into(pid, device, found, end):
                    return math.inf, math.inf
    except (PermissionError, ValueError, LookupError):
        return math.inf, math.inf
    return sum(found.values()), len(found)


def _look_into(pid: str, device: int, found: dict[int, int], end: float) -> bool:
    """Add to `found`, by inode, the bytes of what a process holds; False if that can't be told."""
    for thread in os.listdir(f"/proc/{pid}/task"):  # one may have descriptors of its own
        place = f"/proc/{pid}/task/{thread}"
        with suppress(ProcessLookupError, FileNotFoundError):
            for descriptor in os.listdir(f"{place}/fd"):
                if time.monotonic() > end:
                    return False
                with suppress(ProcessLookupError, FileNotFoundError):
                    state = os.stat(f"{place}/fd/{descriptor}")
                    if state.st_dev == device and state.st_nlink == 0:
                        found[state.st_ino] = max(state.st_blocks * 512, state.st_size)
                    if stat.S_ISSOCK(state.st_mode) and _has_some_under_way(place, descriptor):
                        return False
    where = b"%02x:%02x" % (os.major(device), os.minor(device))
    with open(f"/proc/{pid}/maps", "rb") as file:
        for line in file:
            if time.monotonic() > end:
                return False
            if line.endswith(b"(deleted)\n"):
                fields = line.split(None, 5)
                if fields[3] == where and int(fields[4]) not in found:
                    return False
    return True


def _is_of_a_run(pid: str) -> bool:
    """Whether a process is one that a run has: this user's, with no privilege, and no init."""
    with open(f"/proc/{pid}/status", "rb") as file:
        told = dict(line.split(b":", 1) for line in file if b":" in line)
    numbers = told[b"NSpid"].split()
    return (
        int(told[b"Uid"].split()[0]) == os.getuid()
        and int(told[b"CapBnd"], 16) == 0
        and len(numbers) > 1
        and numbers[-1] != b"1"
    )


def _has_some_under_way(place: str, descriptor: str) -> bool:
    """Whether a socket was sent descriptors that nobody has received: Linux 5.6 and later tell."""
    with open(f"{place}/fdinfo/{descriptor}", "rb") as file:
        return any(line.startswith(b"scm_fds:") and line.split()[1] != b"0" for line in file)


def _remove(sandbox: str, is_surplus: Callable[[str, os.stat_result], bool]) -> int:
    """Remove what is surplus: files and links, and directories that are empty then; how many."""
    removed = 0

    def on_entry(directory: int, name: str, state: os.stat_result) -> None:
        nonlocal removed
        if not stat.S_ISDIR(state.st_mode) and is_surplus(name, state):
            with suppress(OSError):
                tree.insist(directory, lambda: os.unlink(name, dir_fd=directory))
                removed += 1

    def on_leave(directory: int, name: str, state: os.stat_result) -> None:
        nonlocal removed
        if is_surplus(name, state):
            with suppress(OSError):
                tree.insist(directory, lambda: os.rmdir(name, dir_fd=directory))
                removed += 1

    tree.walk(sandbox, on_entry, on_leave)
    return removed
