"""Week 0. One writer at a time in a folder, held by a lock of the operating system.

    with folder_lock(Path("indexes/handbook"), "saving the index"):
        ...

The lock belongs to the open file: it ends with the process, however that ends, and leaves nothing to clean
up. `process_lock` is the same for what one process may take more than once, such as a run and its log.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import lock_descriptor, unlock_descriptor

LOCK_NAME = ".lock"
"""The file in the folder that is locked. A killed process leaves it there: that it exists says nothing."""
NOTE_AT = 1
"""Where in it the holder's note begins: Windows lets nobody else read the locked byte, which is the first."""
POLL_SECONDS = 0.05


@contextmanager
def folder_lock(
    folder: Path,
    what: str,
    *,
    wait: float = 0,
    name: str = LOCK_NAME,
    say: Callable[[str], None] = print,
) -> Iterator[None]:
    """Inside, nobody else who asks for this folder's lock gets it: no other process, thread, or this one.

    folder: made if needed. what: what the folder is held for, told to those who are refused ("training").
    wait: for how many seconds to try. name: of the file, where a part of the folder has a lock of its own.
    Raises ValueError, naming the holder's process and what it does, where the lock is held by then. On a
    filesystem that has no locks, `say` is given a line and nothing is locked.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    descriptor, locked = _open_and_lock(path, time.monotonic() + wait, say)
    try:
        if locked:
            _write_note(descriptor, what)
        yield
    finally:
        if locked:
            with suppress(OSError):  # Windows deletes no file that is open: there it stays, empty
                os.ftruncate(descriptor, 0)
                path.unlink()
            unlock_descriptor(descriptor)
        os.close(descriptor)


@dataclass
class _Held:
    """A lock that this process has, and how often it has taken it."""

    lock: ExitStack
    times: int


_held: dict[Path, _Held] = {}
_changing = threading.RLock()
"""Held while `_held` is changed; by one thread twice where the garbage collector closes a run in between."""


@contextmanager
def process_lock(folder: Path, what: str, *, name: str = LOCK_NAME) -> Iterator[None]:
    """Inside, no other process gets this folder's lock; this one may take it again, in any thread.

    folder, what, name: as in `folder_lock`. Raises ValueError where another process holds the lock.
    """
    path = Path(folder).resolve() / name
    with _changing:
        if path in _held:
            _held[path].times += 1
        else:
            lock = ExitStack()
            lock.enter_context(folder_lock(Path(folder), what, name=name))
            _held[path] = _Held(lock, 1)
    try:
        yield
    finally:
        with _changing:
            _held[path].times -= 1
            if not _held[path].times:
                _held.pop(path).lock.close()


def _open_and_lock(path: Path, deadline: float, say: Callable[[str], None]) -> tuple[int, bool]:
    """The open file, and whether it is locked: not on a filesystem without locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(descriptor, path, deadline, say)
        except BaseException:
            os.close(descriptor)
            raise
        # The one before deletes the file: a lock on what is no longer there keeps nobody out.
        if not locked or _is_still_there(path, descriptor):
            return descriptor, locked
        os.close(descriptor)


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, path: Path, deadline: float, say: Callable[[str], None]) -> bool:
    """Whether it is locked; False on a filesystem without locks. Raises ValueError where another holds it."""
    try:
        while not lock_descriptor(descriptor, blocking=False):
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"{path.parent} is in use by {_holder(path)}: wait until that has ended, or choose"
                    " another folder"
                )
            time.sleep(POLL_SECONDS)
    except OSError as error:
        say(
            f"{path.parent} cannot be locked ({error.strerror or error}): its filesystem has no locks, so see"
            " to it yourself that nothing else writes there"
        )
        return False
    return True


def _write_note(descriptor: int, what: str) -> None:
    note = {
        "pid": os.getpid(),
        "host": platform.node(),
        "what": what,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, b"\n" * NOTE_AT + json.dumps(note).encode() + b"\n")


def _holder(path: Path) -> str:
    """What the holder's note says."""
    try:
        with open(path, "rb") as file:
            file.seek(NOTE_AT)
            note = json.loads(file.read())
        process = "this process" if note["pid"] == os.getpid() else f"process {note['pid']}"
        return f"{process} on {note['host']} ({note['what']}, since {note['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is being written at this moment
        return "another process"
