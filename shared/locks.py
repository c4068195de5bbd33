"""Week 0. One writer at a time in a folder, held by a lock of the operating system.

    with folder_lock(Path("indexes/handbook"), "saving the index"):
        ...

The lock belongs to the open file: it ends with the process, however that ends, and leaves nothing to clean
up.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import lock_descriptor, unlock_descriptor

LOCK_NAME = ".lock"
"""The file in the folder that is locked. It stays there; that it exists says nothing."""
NOTE_AT = 1
"""Where in it the holder's note begins: Windows lets nobody else read the locked byte, which is the first."""
POLL_SECONDS = 0.05


@contextmanager
def folder_lock(
    folder: Path, what: str, *, wait: float = 0, say: Callable[[str], None] = print
) -> Iterator[None]:
    """Inside, nobody else who asks for this folder's lock gets it: no other process, thread, or this one.

    folder: made if needed. what: what the folder is held for, told to those who are refused ("training").
    wait: for how many seconds to try. Raises ValueError, naming the holder's process and what it does, where
    the lock is held by then. On a filesystem that has no locks, `say` is given a line and nothing is locked.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked = _lock(descriptor, path, wait, say)
        if locked:
            _write_note(descriptor, what)
        try:
            yield
        finally:
            if locked:
                os.ftruncate(descriptor, 0)
                unlock_descriptor(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, wait: float, say: Callable[[str], None]) -> bool:
    """Whether it is locked; False on a filesystem without locks. Raises ValueError where another holds it."""
    deadline = time.monotonic() + wait
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
