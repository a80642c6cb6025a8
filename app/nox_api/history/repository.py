"""The Git repository. One process writes it; `git log` in it works for whoever may read it.

History is one line of commits on `main`, cut into segments: one for each day, or part of a day. A
segment's objects lie in a directory of their own that objects/info/alternates names, and its first
commit has an empty tree, so no later segment needs anything of it. To forget the oldest segment its
successor's first commit is named in `shallow`, by which Git takes it for the beginning, and the
directory goes.

    HEAD, config, shallow -> objects/info/shallow     for root alone to write: Git obeys them
    refs/heads/main
    objects/info/{alternates,shallow,writer.lock}
    objects/segments/20261123T020815123/{first,pack/}

A run is in its commit's tree under the time of its id, which is how it is found without an index:

    2026-11-23/02/08/15/<run_id>.py  (or .sh)         the script
    2026-11-23/02/08/15/<run_id>.<status>.json        the record
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import cast

from dulwich.object_store import DiskObjectStore
from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tree
from dulwich.pack import full_unpacked_object
from dulwich.refs import DiskRefsContainer, Ref

from nox_api.history import prose
from nox_api.history.record import Record, milliseconds

_BRANCH = Ref(b"refs/heads/main")
_AUTHOR = b"Nox API <nox-api@localhost>"
_FILE, _DIRECTORY = 0o100644, 0o040000
_CONFIG = (
    "[core]\n  repositoryformatversion = 0\n  filemode = true\n  bare = true\n[gc]\n  auto = 0\n"
)
_SUFFIX = {"python": "py", "sh": "sh"}

_PARTS = 8
"""A segment ends at this part of the whole size, so that forgetting one makes room."""
_MAX_SEGMENT = 256 << 20
_MERGE_COUNT = 16
"""Packs of about one size that are made one."""
_MERGED_ENOUGH = 8 << 20
_MAX_EXAMINED = 20_000
_MAX_PAGE = 4 << 20
_PATIENCE = 10.0
_DAY = 86_400


class RepositoryError(Exception):
    """The repository cannot be used; the message names path and cause."""


@dataclass(frozen=True)
class Found:
    """A page of records, newest first; `next` is where the next page begins, if there is one."""

    runs: list[Record]
    next: str | None


@dataclass
class _Segment:
    path: str
    size: int = 0
    """Bytes on disk."""
    store: DiskObjectStore = field(init=False)

    def __post_init__(self) -> None:
        self.store = DiskObjectStore(self.path, fsync_object_files=True)

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def ends(self) -> float:
        """The midnight after its beginning, in seconds since the epoch."""
        return (_stamp(self.name) // _DAY + 1) * _DAY

    def first(self) -> ObjectID | None:
        try:
            with open(os.path.join(self.path, "first"), "rb") as file:
                return ObjectID(file.read().strip())
        except FileNotFoundError:
            return None

    def measure(self) -> None:
        size = 0
        for directory in (self.path, os.path.join(self.path, "pack")):
            with os.scandir(directory) as entries:
                size += sum(entry.stat().st_blocks * 512 for entry in entries)
        self.size = size


@dataclass(frozen=True)
class _Entry:
    run_id: str
    status: str
    record: ObjectID
    store: DiskObjectStore


class Repository:
    """Raises RepositoryError and OSError. `days` 0: however old; `size` in bytes."""

    def __init__(self, path: str, days: int, size: int) -> None:
        self.days = days
        self.size = size
        self._path = path
        self._objects = os.path.join(path, "objects")
        self._info = os.path.join(self._objects, "info")
        self._make()
        self._lock = self._locked()
        self._refs = DiskRefsContainer(path)
        self._trees: dict[ObjectID, Tree] = {}
        self._segments: list[_Segment] = []
        self._tip: ObjectID | None = None
        self._recover()

    @property
    def used(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self._segments)

    def close(self) -> None:
        """Let another process write."""
        for segment in self._segments:
            segment.store.close()
        os.close(self._lock)

    # ── Writing

    def add(self, runs: Sequence[prose.Run]) -> None:
        """Commit `runs`, all or none."""
        new: list[ShaFile] = []
        files: list[tuple[list[bytes], ObjectID]] = []
        for record, script in runs:
            directories = _directories(record["run_id"])
            kept = [(f"{record['status']}.json", _pretty(record))]
            if len(script) == record["script"]["bytes"]:
                kept.append((_SUFFIX[record["language"]], script))
            for suffix, content in kept:
                blob = Blob.from_string(content)
                new.append(blob)
                files.append(([*directories, f"{record['run_id']}.{suffix}".encode()], blob.id))
        if self._tip is None or self._is_full():
            self._begin(new, files, prose.tell(runs))
        else:
            tree = _commit(self._segments[-1].store, self._tip).tree
            self._write(new, files, tree, prose.tell(runs))
        self.forget()

    def forget(self) -> None:
        """Drop what is too old, and the oldest of what is too much."""
        if not self._segments:
            return
        oldest = time.time() - self.days * _DAY if self.days else -math.inf
        if self._segments[-1].ends <= oldest:
            self._begin([], [], "")
        count = 0
        size = self.used
        for segment in self._segments[:-1]:
            too_much = size > self.size - self.size // _PARTS
            if not too_much and segment.ends > oldest:
                break
            size -= segment.size
            count += 1
        if count:
            self._forget(count)

    def _forget(self, count: int) -> None:
        first = self._segments[count].first()
        assert first is not None
        self._replace("shallow", first + b"\n")
        gone, self._segments = self._segments[:count], self._segments[count:]
        self._write_alternates()
        for segment in gone:
            segment.store.close()
            shutil.rmtree(segment.path)

    def _is_full(self) -> bool:
        current = self._segments[-1]
        most = min(self.size // _PARTS, _MAX_SEGMENT)
        return current.size > most or current.ends <= time.time()

    def _begin(
        self, new: list[ShaFile], files: list[tuple[list[bytes], ObjectID]], message: str
    ) -> None:
        """Begin a segment: with a chapter if there is something before it, then with `files`."""
        stamp = time.time()
        if self._segments:
            stamp = max(stamp, _stamp(self._segments[-1].name) + 0.001)
        path = os.path.join(self._objects, "segments", _name(stamp))
        os.makedirs(os.path.join(path, "pack"))
        self._segments.append(_Segment(path))
        self._write_alternates()
        tree = Tree()
        chapter: Commit | None = None
        if self._tip is not None:
            chapter = _new_commit(tree.id, [self._tip], prose.chapter())
            new += [tree, chapter]
        self._trees = {tree.id: tree}
        try:
            self._write(new, files, tree.id, message, chapter)
        except BaseException:
            self._segments.pop()
            shutil.rmtree(path, ignore_errors=True)
            self._write_alternates()
            raise

    def _write(
        self,
        new: list[ShaFile],
        files: list[tuple[list[bytes], ObjectID]],
        tree: ObjectID,
        message: str,
        chapter: Commit | None = None,
    ) -> None:
        """Write `new`, and a commit of `files` in `tree`, then let the branch name it."""
        segment = self._segments[-1]
        tip, first = self._tip, chapter
        if chapter is not None:
            tip = chapter.id
        if files:
            trees: dict[ObjectID, Tree] = {}
            root = self._grown(segment.store, tree, files, trees)
            commit = _new_commit(root, [] if tip is None else [tip], message)
            new = [*new, *trees.values(), commit]
            self._trees = trees
            tip = commit.id
            first = first or commit
        assert tip is not None
        unique = {shafile.id: shafile for shafile in new}
        segment.store.add_objects([(shafile, None) for shafile in unique.values()])
        _sync(os.path.join(segment.path, "pack"))
        if segment.first() is None and first is not None:
            _replace(os.path.join(segment.path, "first"), first.id + b"\n")
        if not self._refs.set_if_equals(_BRANCH, self._tip, tip):
            raise RepositoryError(f"{self._path}: somebody else moved the branch main")
        self._tip = tip
        self._merge(segment)
        segment.measure()

    def _grown(
        self,
        store: DiskObjectStore,
        old: ObjectID | None,
        files: Iterable[tuple[list[bytes], ObjectID]],
        new: dict[ObjectID, Tree],
    ) -> ObjectID:
        """The tree `old` with `files` in it; what had to be made for it is added to `new`."""
        tree = Tree()
        if old is not None:
            known = self._trees[old] if old in self._trees else _tree(store, old)
            tree = Tree.from_string(known.as_raw_string())
        below: dict[bytes, list[tuple[list[bytes], ObjectID]]] = defaultdict(list)
        for (name, *rest), blob in files:
            if rest:
                below[name].append((rest, blob))
            else:
                tree.add(name, _FILE, blob)
        for name, inner in below.items():
            existing = tree[name][1] if name in tree else None
            tree.add(name, _DIRECTORY, self._grown(store, existing, inner, new))
        new[tree.id] = tree
        return tree.id

    def _merge(self, segment: _Segment) -> None:
        """Make one pack of many that are about as large as each other."""
        tiers: dict[int, list[str]] = defaultdict(list)
        directory = os.path.join(segment.path, "pack")
        with os.scandir(directory) as entries:
            for entry in entries:
                size = entry.stat().st_size
                if entry.name.endswith(".pack") and size < _MERGED_ENOUGH:
                    tiers[(size >> 12).bit_length() // 3].append(entry.name[: -len(".pack")])
        names = next((names for names in tiers.values() if len(names) >= _MERGE_COUNT), None)
        if names is None:
            return
        packs = [pack for pack in segment.store.packs if f"pack-{pack.name().decode()}" in names]
        ids = list(dict.fromkeys(sha for pack in packs for sha in pack))
        objects = (full_unpacked_object(segment.store[sha]) for sha in ids)
        segment.store.add_pack_data(len(ids), objects)
        segment.store.close()
        _sync(directory)
        for name in names:
            # The index first, as Git does: without it the pack is not looked at.
            for suffix in (".idx", ".pack"):
                os.unlink(os.path.join(directory, name + suffix))
        segment.store = DiskObjectStore(segment.path, fsync_object_files=True)

    # ── Reading

    def get(self, run_id: str) -> tuple[Record, bytes | None] | None:
        """A run's record, and its script where that is kept; None if it is not known."""
        for segment, tip in self._tips():
            tree: Tree | None = _tree(segment.store, _commit(segment.store, tip).tree)
            for name in _directories(run_id):
                tree = _tree(segment.store, tree[name][1]) if tree and name in tree else None
            record, script = None, None
            for item in tree.items() if tree else ():
                if item.path.startswith(run_id.encode()):
                    content = _blob(segment.store, item.sha)
                    if item.path.endswith(b".json"):
                        record = cast("Record", json.loads(content))
                    else:
                        script = content
            if record is not None:
                return record, script
        return None

    def page(self, low: str, high: str, status: str | None, limit: int) -> Found:
        """Runs with ids from `low` on and below `high`. A page may be short, or empty, before
        the last: only so many runs are looked at for it."""
        runs: list[Record] = []
        size = 0
        sources = [self._descend(segment, tip, low, high) for segment, tip in self._tips()]
        entries = heapq.merge(*sources, key=lambda entry: entry.run_id, reverse=True)
        for examined, entry in enumerate(entries, start=1):
            if status is None or entry.status == status:
                content = _blob(entry.store, entry.record)
                runs.append(json.loads(content))
                size += len(content)
            if len(runs) == limit or size > _MAX_PAGE or examined == _MAX_EXAMINED:
                return Found(runs, entry.run_id)
        return Found(runs, None)

    def _tips(self) -> Iterator[tuple[_Segment, ObjectID]]:
        """The segments, newest first, each with its last commit."""
        tip = self._tip
        for segment in reversed(self._segments):
            if tip is None:
                return
            yield segment, tip
            first = segment.first()
            parents = _commit(segment.store, first).parents if first else []
            tip = parents[0] if parents else None

    def _descend(self, segment: _Segment, tip: ObjectID, low: str, high: str) -> Iterator[_Entry]:
        """The runs of a segment from `low` on and below `high`, last first."""
        store = segment.store
        lowest, highest = _directories(low), _directories(high)

        def walk(tree: Tree, above: list[bytes]) -> Iterator[_Entry]:
            depth = len(above) + 1
            if depth > len(lowest):
                yield from _entries(store, tree, low, high)
                return
            for item in reversed(list(tree.items())):
                place = [*above, item.path]
                if lowest[:depth] <= place <= highest[:depth]:
                    yield from walk(_tree(store, item.sha), place)

        yield from walk(_tree(store, _commit(store, tip).tree), [])

    # ── Opening

    def _make(self) -> None:
        """Make what is missing. On a host where root made the place, nothing is."""
        try:
            for name in ("objects/info", "objects/pack", "objects/segments", "refs/heads"):
                os.makedirs(os.path.join(self._path, name), exist_ok=True)
            for name, content in (("config", _CONFIG), ("HEAD", "ref: refs/heads/main\n")):
                path = os.path.join(self._path, name)
                if not os.path.exists(path):
                    _replace(path, content.encode())
            shallow = os.path.join(self._path, "shallow")
            if not os.path.lexists(shallow):
                os.symlink("objects/info/shallow", shallow)
        except OSError as error:
            raise RepositoryError(f"{error.filename}: {error.strerror}") from None

    def _locked(self) -> int:
        path = os.path.join(self._info, "writer.lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() > end:
                    os.close(descriptor)
                    raise RepositoryError(f"{path}: another process holds it") from None
                time.sleep(0.05)

    def _recover(self) -> None:
        """Find the end of the history, and remove what a writer that was killed left."""
        for name in ("refs/heads/main.lock", "objects/info/alternates.new",
                     "objects/info/shallow.new"):  # fmt: skip
            _remove(os.path.join(self._path, name))
        self._tip = self._refs.as_dict().get(_BRANCH)
        root = os.path.join(self._objects, "segments")
        self._segments = [_Segment(os.path.join(root, name)) for name in sorted(os.listdir(root))]
        for segment in self._segments:
            os.makedirs(os.path.join(segment.path, "pack"), exist_ok=True)
        if self._segments and not self._holds_tip(self._segments[-1]):
            # Begun, but nothing in it was ever named.
            begun, named = self._segments[-1], self._segments[:-1]
            if not (self._holds_tip(named[-1]) if named else self._tip is None):
                raise RepositoryError(self._damage())
            shutil.rmtree(begun.path)
            self._segments = named
        if self._tip is not None and not self._segments:
            raise RepositoryError(self._damage())
        boundary = self._shallow()
        firsts = [segment.first() for segment in self._segments]
        if boundary in firsts:
            for segment in self._segments[: firsts.index(boundary)]:
                shutil.rmtree(segment.path)
            self._segments = self._segments[firsts.index(boundary) :]
        self._write_alternates()
        for segment in self._segments:
            _clean(os.path.join(segment.path, "pack"))
            segment.measure()

    def _damage(self) -> str:
        return (
            f"{self._path}: the commit that main names is missing; git fsck says more."
            " Move objects and refs away, and a new history begins"
        )

    def _holds_tip(self, segment: _Segment) -> bool:
        return self._tip is not None and self._tip in segment.store and segment.first() is not None

    def _shallow(self) -> ObjectID | None:
        try:
            with open(os.path.join(self._info, "shallow"), "rb") as file:
                return ObjectID(file.read().strip())
        except FileNotFoundError:
            return None

    def _write_alternates(self) -> None:
        lines = [f"segments/{segment.name}\n" for segment in self._segments]
        self._replace("alternates", "".join(lines).encode())

    def _replace(self, name: str, content: bytes) -> None:
        _replace(os.path.join(self._info, name), content)


def _directories(run_id: str) -> list[bytes]:
    """Where a run lies in the tree: day, hour, minute, second."""
    # The last day that datetime knows; an id from a bound may be beyond it.
    seconds = min(milliseconds(run_id) // 1000, 253_402_300_799)
    time = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{time:%Y-%m-%d/%H/%M/%S}".encode().split(b"/")


def _entries(store: DiskObjectStore, tree: Tree, low: str, high: str) -> Iterator[_Entry]:
    for item in reversed(list(tree.items())):
        name = item.path.decode()
        if name.endswith(".json") and low <= name[:32] < high:
            yield _Entry(name[:32], name[33 : -len(".json")], item.sha, store)


def _pretty(record: Record) -> bytes:
    return (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode()


def _new_commit(tree: ObjectID, parents: list[ObjectID], message: str) -> Commit:
    commit = Commit()
    commit.tree = tree
    commit.parents = parents
    commit.author = commit.committer = _AUTHOR
    commit.author_time = commit.commit_time = int(time.time())
    commit.author_timezone = commit.commit_timezone = 0
    commit.encoding = b"UTF-8"
    commit.message = message.encode()
    return commit


def _tree(store: DiskObjectStore, name: ObjectID) -> Tree:
    return cast("Tree", store[name])


def _commit(store: DiskObjectStore, name: ObjectID) -> Commit:
    return cast("Commit", store[name])


def _blob(store: DiskObjectStore, name: ObjectID) -> bytes:
    return cast("Blob", store[name]).data


def _name(stamp: float) -> str:
    time = datetime.fromtimestamp(round(stamp, 3), timezone.utc)
    return f"{time:%Y%m%dT%H%M%S}{time.microsecond // 1000:03}"


def _stamp(name: str) -> float:
    whole = datetime.strptime(name[:15], "%Y%m%dT%H%M%S").replace(tzinfo=timezone.utc)
    return whole.timestamp() + int(name[15:]) / 1000


def _replace(path: str, content: bytes) -> None:
    """Write a file whole or not at all."""
    with open(f"{path}.new", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path)
    _sync(os.path.dirname(path))


def _sync(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clean(directory: str) -> None:
    """Remove packs that were not finished: those that no index belongs to, and the other way."""
    names = set(os.listdir(directory))
    for name in names:
        stem, suffix = os.path.splitext(name)
        other = {".pack": ".idx", ".idx": ".pack"}.get(suffix)
        if other is None or stem + other not in names:
            _remove(os.path.join(directory, name))


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
