"""shared/processes.py: several processes give what one gives, and end when they should."""

import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from shared.processes import in_groups, in_processes
from shared.runtime import ROOT

NUMBERS = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(40)]
added = 0


def add(number: int) -> None:
    global added
    added = number


def sums(group: list[int]) -> list[tuple[int, bool]]:
    return [(number + added, multiprocessing_child()) for number in group]


def multiprocessing_child() -> bool:
    return "spawn_main" in " ".join(sys.orig_argv)


def refuse_70(group: list[int]) -> list[int]:
    if 70 in group:
        raise ValueError("70 is too many")
    return group


def die(group: list[int]) -> list[int]:
    os._exit(1)


def test_groups_are_as_short_as_they_can_be():
    groups = list(in_groups([5, 1, 4, 2, 9, 3], int, 6))
    assert groups == [[5, 1], [4, 2], [9], [3]]
    assert list(in_groups([], int, 6)) == []


@pytest.mark.slow
def test_results_come_in_order_from_processes_that_were_set_up():
    groups = iter(NUMBERS)
    results = list(in_processes(sums, groups, 2, (add, 1000)))
    assert results == [(number + 1000, True) for group in NUMBERS for number in group]
    assert added == 0  # in this process


def test_one_process_is_this_one(monkeypatch):
    monkeypatch.setitem(globals(), "added", 0)
    results = list(in_processes(sums, NUMBERS, 1, (add, 7)))
    assert results == [(number + 7, False) for group in NUMBERS for number in group]


@pytest.mark.slow
def test_an_error_comes_after_the_results_before_it():
    results = []
    with pytest.raises(ValueError, match="70 is too many"):
        for result in in_processes(refuse_70, NUMBERS, 2):
            results.append(result)
    assert results == list(range(69))


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="one of 2 processes has died.*run again with fewer"):
        list(in_processes(die, NUMBERS, 2))


@pytest.mark.slow
def test_only_so_many_groups_are_read_ahead_and_who_stops_early_ends_the_processes():
    read = []
    endless = ([i] for i in count() if read.append(i) is None)
    results = in_processes(sums, endless, 2)
    assert next(results) == (0, True) and len(read) == 9
    results.close()
    assert len(read) == 9


INTERRUPTED = """
import os, signal
from itertools import count
from shared.tokenizers import BPETokenizer, base

def texts():
    for i in count():
        if i == 30:  # by now the first results are here
            os.killpg(os.getpgid(0), signal.SIGINT)
        yield "a text of no end "

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    base.GROUP = 1
    BPETokenizer([]).encode_batch(texts(), processes=2)
"""
UNGUARDED = """
from shared.tokenizers import BPETokenizer

BPETokenizer([]).encode_batch(["a", "b"], processes=2)
"""


def run_script(folder: Path, script: str) -> subprocess.CompletedProcess:
    """Returns when the last of the script's processes is gone, since they have the same pipes."""
    path = folder / "script.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, path], env=environment, capture_output=True, timeout=120, start_new_session=True
    )


@pytest.mark.slow
def test_ctrl_c_ends_all_of_them(tmp_path):
    done = run_script(tmp_path, INTERRUPTED)
    assert done.returncode == -signal.SIGINT and b"KeyboardInterrupt" in done.stderr


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_what_it_lacks(tmp_path):
    done = run_script(tmp_path, UNGUARDED)
    assert done.returncode == 1 and b"call this under `if __name__ == '__main__':`" in done.stderr
