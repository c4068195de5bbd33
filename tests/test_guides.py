"""docs/guides: every example of a guide runs, in an empty folder, and prints what the guide says."""

import doctest
import re
from pathlib import Path

import pytest

from shared.runtime import ROOT

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
FENCE = re.compile(r"```(\w*)\s*$")


def python_of(text: str) -> str:
    """The blocks of Python in a Markdown text, each line where it stands; all else is empty lines."""
    kept = []
    language = None  # of the block that is open
    for line in text.splitlines():
        fence = FENCE.match(line)
        if fence:
            language = fence[1] if language is None else None
        kept.append(line if language == "python" and not fence else "")
    return "\n".join(kept) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_a_guides_examples_print_what_it_says(path: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = python_of(path.read_text(encoding="utf-8"))
    examples = doctest.DocTestParser().get_doctest(code, {}, path.name, str(path), 0)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=said.append)
    assert result.attempted and not result.failed, "".join(said)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_what_a_guide_does_not_run_is_python(path: Path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
        if ">>>" not in block:
            compile(block, path.name, "exec")


def test_an_example_that_prints_something_else_is_noticed():
    code = python_of("Text.\n\n```python\n>>> 1 + 1\n3\n```\n\n```sh\n>>> 1\n2\n```\n")
    examples = doctest.DocTestParser().get_doctest(code, {}, "x", "x", 0)
    assert [example.lineno for example in examples.examples] == [3]
    result = doctest.DocTestRunner().run(examples, out=lambda text: None)
    assert (result.failed, result.attempted) == (1, 1)
