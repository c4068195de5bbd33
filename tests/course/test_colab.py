"""Opening the notebooks in Colab. Oracles: nbformat's schema, git, and the notebook as it was."""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from shared.course.colab import BADGE, SETUP_ID, main, open_in_colab
from shared.course.runs import TOPICS
from shared.runtime import ROOT

LINUX = pytest.mark.skipif(
    os.name != "posix",
    reason="Colab runs on Linux: its paths and file:// addresses are written that way here",
)
ADDRESS = "https://github.com/someone/llm-course"


@pytest.fixture
def notebook(tmp_path):
    """A copy of week 3's notebook, as it would be if it had never been opened in Colab."""
    path = tmp_path / "03_attention" / "notebook.ipynb"
    path.parent.mkdir()
    shutil.copy(ROOT / "weeks/03_attention/notebook.ipynb", path)
    return path


def cells(path):
    return [dict(cell) for cell in nbformat.read(path, 4).cells]


def test_badge_and_cell_are_all_that_changes(notebook):
    open_in_colab(notebook, ADDRESS)
    first = cells(notebook)
    nbformat.validate(nbformat.read(notebook, 4))
    assert first[0]["source"].splitlines()[0].startswith("# Week 3")
    target = "someone/llm-course/blob/main/weeks/03_attention/notebook.ipynb"
    assert f"{BADGE}(https://colab.research.google.com/github/{target})" in first[0]["source"]
    assert first[1]["id"] == SETUP_ID and ADDRESS in first[1]["source"]
    original = cells(ROOT / "weeks/03_attention/notebook.ipynb")
    assert first[2:] == [cell for cell in original if cell["id"] != SETUP_ID][1:]
    before = notebook.read_bytes()
    open_in_colab(notebook, ADDRESS + ".git")
    assert notebook.read_bytes() == before  # nothing is written twice
    open_in_colab(notebook, "https://github.com/another/name/")
    moved = notebook.read_text(encoding="utf-8")
    assert "someone" not in moved and moved.count("colab-badge.svg") == 1
    assert len(cells(notebook)) == len(first)


NOT_A_REPOSITORY = ("someone/llm-course", "https://github.com/someone", "https://example.org/a/b")


@pytest.mark.parametrize("address", [*NOT_A_REPOSITORY, 'https://github.com/a/b"; print("c'])
def test_other_addresses_are_refused(notebook, address):
    before = notebook.read_bytes()
    with pytest.raises(ValueError, match=r"give https://github\.com/OWNER/NAME"):
        open_in_colab(notebook, address)
    assert notebook.read_bytes() == before


PIP = "import sys; open('pip.txt', 'a').write(' '.join(sys.argv[1:]) + '\\n')"


def run_cell(notebook, tmp_path, inside, pip=PIP):
    """Runs the set-up cell, and returns where `shared` would be imported from.

    Files in `tmp_path` stand in for Colab, its disk, GitHub and pip.
    """
    code = cells(notebook)[1]["source"].replace("/content/", f"{tmp_path}/content/")
    if inside:
        code = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')\n" + code
    (tmp_path / "pip").mkdir(exist_ok=True)
    (tmp_path / "pip" / "__init__.py").write_text("")
    (tmp_path / "pip" / "__main__.py").write_text(pip)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    env |= {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/origin.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
    }
    code += "\nimport importlib.util; print(importlib.util.find_spec('shared').origin)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@LINUX
def test_the_cell_fetches_and_installs_the_course_once(notebook, tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path / "origin"), *arguments]
        subprocess.run(command, check=True, capture_output=True)

    (tmp_path / "origin" / "shared").mkdir(parents=True)
    (tmp_path / "origin" / "shared" / "__init__.py").write_text("")
    git("init", "--quiet")
    git("add", ".")
    git(*"-c user.name=a -c user.email=a@b.c commit --quiet --message course".split())
    open_in_colab(notebook, ADDRESS)
    course = tmp_path / "content" / "llm-course"
    with pytest.raises(subprocess.CalledProcessError):
        run_cell(notebook, tmp_path, inside=True, pip="raise SystemExit('no network')")
    # What failed is done the next time.
    for _ in range(2):
        assert run_cell(notebook, tmp_path, inside=True) == str(course / "shared" / "__init__.py")
    assert (tmp_path / "pip.txt").read_text().splitlines() == [
        f"install --quiet -e {course}[rag,serve,export] tiktoken bitsandbytes"
    ]


@LINUX
def test_outside_colab_the_cell_does_nothing(notebook, tmp_path):
    open_in_colab(notebook, ADDRESS)
    before = sorted(tmp_path.rglob("*"))
    assert str(tmp_path) not in run_cell(notebook, tmp_path, inside=False)
    assert sorted(set(tmp_path.rglob("*")) - set(before)) == [
        tmp_path / "pip",
        tmp_path / "pip" / "__init__.py",
        tmp_path / "pip" / "__main__.py",
    ]


@pytest.mark.slow
def test_every_notebook_has_a_badge_of_the_same_repository_or_none_has(monkeypatch, tmp_path, capsys):
    badges = set()
    set_up = []
    for topic in TOPICS:
        every = cells(ROOT / "weeks" / topic / "notebook.ipynb")
        lines = [line for line in every[0]["source"].splitlines() if line.startswith(BADGE)]
        badges |= {line.partition("/blob/")[0] for line in lines}
        set_up += [topic for cell in every if cell["id"] == SETUP_ID]
    assert (len(badges), len(set_up)) in [(0, 0), (1, len(TOPICS))]
    monkeypatch.setattr("shared.course.colab.ROOT", tmp_path)
    for topic in TOPICS:
        (tmp_path / "weeks" / topic).mkdir(parents=True)
        shutil.copy(ROOT / "weeks" / topic / "notebook.ipynb", tmp_path / "weeks" / topic)
    main(ADDRESS)
    assert capsys.readouterr().out == f"12 notebooks open in Colab from {ADDRESS}\n"
    for topic in TOPICS:
        head = cells(tmp_path / "weeks" / topic / "notebook.ipynb")[0]["source"]
        assert f"/blob/main/weeks/{topic}/notebook.ipynb)" in head
