"""Reading takes work in proportion to a document's length, whatever stands in it."""

import subprocess
import sys

import pytest

from shared.retrieval.documents import read_document
from shared.runtime import ROOT

REPEATED = {
    "paragraphs.html": "<p>The ferry leaves at nine.</p>\n",
    "rows.html": "<tr><td>nine<td>noon",
    "inline.html": "<b>nine</b> or <i>noon</i> ",
    "comments.html": "nine <!-- ",
    "paragraphs.md": "The ferry leaves at nine.\n\n",
    "marked.md": "The *ferry* leaves at [nine](b.md).\n\n",
    "sections.md": "## Nine\n\nThe `ferry` leaves.\n\n",
    "rows.md": "| nine | noon |\n",
    "items.md": "- nine\n",
    "comments.md": "nine <!-- ",
    "comment-lines.md": "<!--\n",
    "comment-paragraphs.md": "nine\n\n<!-- noon\n\n",
    "text.txt": "The ferry leaves at nine.\n\n",
}


def steps_of(path):
    """How many lines of Python are run to read a file."""
    steps = 0

    def count(frame, event, argument):
        nonlocal steps
        steps += 1
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        read_document(path, path.parent)
    finally:
        sys.settrace(before)
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("name", REPEATED)
def test_twice_the_text_takes_twice_the_steps(tmp_path, name):
    path = tmp_path / name
    steps = []
    for times in (10, 250, 500, 1000):  # the first one loads the libraries
        path.write_text("start\n\n" + "<table>" * (name == "rows.html") + REPEATED[name] * times)
        steps.append(steps_of(path))
    assert steps[2] <= 2.1 * steps[1] and steps[3] <= 2.1 * steps[2]


LIMITED = """
import resource, sys
from pathlib import Path
from shared.retrieval.documents import read_document
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, flush=True)
    read_document(path, path.parent)
"""


@pytest.mark.slow
def test_a_megabyte_of_each_is_read(tmp_path):
    """What one call of a library does cannot be counted, so the processor's time is bounded: far above what
    is needed (some seconds for all), and far below what the square of the length would take (many minutes).
    """
    for name, repeated in REPEATED.items():
        if name not in ("items.md", "marked.md", "sections.md"):  # linear, but slow
            (tmp_path / name).write_text("start\n\n" + repeated * (1_000_000 // len(repeated)))
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == sorted(path.name for path in tmp_path.iterdir())
    assert done.returncode == 0, done.stderr
