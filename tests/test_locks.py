"""shared/locks.py: one writer at a time, named to the others; a killed one leaves nothing behind."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from shared import locks
from shared.commandline import errors_for_people
from shared.locks import LOCK_NAME, folder_lock, process_lock

HOLDER = """
import sys
from pathlib import Path
from shared.locks import folder_lock

with folder_lock(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder's lock until it gets a line."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_a_second_writer_is_told_who_the_first_is(tmp_path, holder, capsys):
    with pytest.raises(SystemExit, match="2"), errors_for_people(), folder_lock(tmp_path, "serving"):
        raise AssertionError("two have the lock")
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path} is in use by process {holder.pid} on ")
    assert "(training, since 2" in message and message.count("\n") == 1
    holder.communicate("go on\n", timeout=60)
    with folder_lock(tmp_path, "serving"):
        pass


@pytest.mark.slow
def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait(timeout=60)
    assert (tmp_path / LOCK_NAME).exists()
    with folder_lock(tmp_path, "training"):
        pass


def test_within_one_process_too_only_one_has_it(tmp_path):
    with folder_lock(tmp_path / "new", "first"):
        with pytest.raises(ValueError, match=r"in use by this process on .* \(first, since "):
            with folder_lock(tmp_path / "new", "second"):
                pass
        with folder_lock(tmp_path / "other", "second"):
            pass
    with folder_lock(tmp_path / "new", "third"):
        pass


def test_an_error_inside_gives_the_lock_back(tmp_path):
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path, "first"):
        raise ZeroDivisionError
    with folder_lock(tmp_path, "second"):
        pass


def test_who_waits_gets_it_when_the_first_is_done(tmp_path, monkeypatch):
    done, order = threading.Event(), []

    def wait():
        with folder_lock(tmp_path, "second", wait=60):
            order.append("second")
        done.set()

    asked = threading.Event()
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: asked.set())
    with folder_lock(tmp_path, "first"):
        threading.Thread(target=wait, daemon=True).start()
        assert asked.wait(60)  # it has been refused once
        order.append("first")
    assert done.wait(60) and order == ["first", "second"]


def test_a_filesystem_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(descriptor, blocking):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    said = []
    with folder_lock(tmp_path, "training", say=said.append):
        pass
    assert len(said) == 1 and said[0].startswith(f"{tmp_path} cannot be locked (No locks available)")


def test_a_note_that_is_not_written_yet_names_nobody(tmp_path):
    with folder_lock(tmp_path, "first"):
        (tmp_path / LOCK_NAME).write_bytes(b"")
        with pytest.raises(ValueError, match="in use by another process"), folder_lock(tmp_path, "second"):
            pass


def test_a_lock_that_is_given_back_leaves_no_file(tmp_path):
    with folder_lock(tmp_path, "first"), folder_lock(tmp_path, "beside it", name=".other"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_NAME, ".other"]
    assert not any(tmp_path.iterdir())


COUNTER = """
import sys
from pathlib import Path
from shared.locks import folder_lock

count = Path(sys.argv[1]) / "count"
for _ in range(200):
    with folder_lock(count.parent, "counting", wait=120):
        count.write_text(str(int(count.read_text()) + 1))
"""


@pytest.mark.slow
def test_no_turn_is_lost_though_each_deletes_the_file(tmp_path):
    """Who waits holds a file that the one before deletes: it must not take that for the lock."""
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", COUNTER, str(tmp_path)]
    both = [subprocess.Popen(command), subprocess.Popen(command)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert (tmp_path / "count").read_text() == "400"


@pytest.mark.slow
def test_a_process_may_take_its_own_lock_again_and_no_other_may(tmp_path, holder):
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
        with process_lock(tmp_path, "training"):
            pass
    holder.communicate("go on\n", timeout=60)
    with process_lock(tmp_path, "training"):
        with process_lock(tmp_path, "its log"):
            pass
        with pytest.raises(ValueError, match="in use by this process"), folder_lock(tmp_path, "another"):
            pass
    with folder_lock(tmp_path, "another"):
        pass
