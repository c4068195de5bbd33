"""docs/comparison: the same jobs with other libraries, run on tiny models, and counted."""

import contextlib
import io
import re
import runpy
import sys

import pytest
import uvicorn

from shared.runtime import ROOT

FOLDER = ROOT / "docs" / "comparison"
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("*_*.py"))}
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")


def lines_of(name: str) -> int:
    """Lines of code, without those that take tiny models in the place of real ones."""
    lines = [line.strip() for line in SCRIPTS[name].read_text(encoding="utf-8").splitlines()]
    return sum(bool(line) and not line.startswith(("#", "from tiny")) for line in lines)


def test_the_table_counts_the_scripts_lines():
    found = {name: int(number) for number, name in re.findall(r"\[(\d+)\]\(comparison/(\w+)\.py\)", PAGE)}
    assert found == {name: lines_of(name) for name in SCRIPTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the scripts find: a text, conversations, documents, tiny models."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.syspath_prepend(str(FOLDER))
        import tiny

        tiny.prepare()
        yield folder
    sys.modules.pop("tiny")


@pytest.fixture
def printed(folder, monkeypatch):
    """Runs a script, and returns what it prints."""
    monkeypatch.setenv("LLM_WEEKS_DATA", str(folder / "data"))
    monkeypatch.setattr(uvicorn, "run", lambda app: print(app.title))

    def run(name: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_path(str(SCRIPTS[name]))
        return said.getvalue()

    return run


@pytest.mark.slow
def test_scores_and_texts_are_those_of_transformers(printed):
    def words(text: str) -> list[str]:
        return re.findall(r"-\d+\.\d+|'.*?'", text)

    assert words(printed("score_shared")) == words(printed("score_transformers")) != []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.startswith("score_")])
def test_a_script_runs(printed, name):
    assert printed(name)
