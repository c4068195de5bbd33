"""The learner's copies of the lessons, and the page that JupyterLab opens on."""

import json
import shutil
import subprocess

import pytest

from shared.course import notebooks
from shared.course.exercise import week as week_module
from shared.runtime import ROOT

TOPIC = "01_bigram"
ANSWER = "def count_pairs(tokens, vocab_size):\n    return 'mine'"


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of one week, in a folder of its own, and nothing solved."""
    folder = tmp_path / "weeks" / TOPIC
    folder.mkdir(parents=True)
    for name in ("notebook.ipynb", "exercises.py"):
        shutil.copy(ROOT / "weeks" / TOPIC / name, folder)
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(tmp_path / "answers"))
    monkeypatch.setenv("LLM_WEEKS_OUTPUT", str(tmp_path))
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "TOPICS", (TOPIC,))
    monkeypatch.setattr(week_module, "ROOT", tmp_path)
    return folder


def solve(name, source):
    shelf = week_module.Week(1).shelf
    shelf.folder.mkdir(parents=True, exist_ok=True)
    shelf.file(name).write_text(source, encoding="utf-8")
    (shelf.folder / f"{name}.json").write_text('{"solved": "2026-01-01"}', encoding="utf-8")


def sources(path):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def test_a_copy_is_the_lesson_and_is_not_made_twice(course):
    copy = notebooks.copy_lesson(TOPIC)
    assert sources(copy) == sources(course / "notebook.ipynb")
    copy.write_text(copy.read_text(encoding="utf-8").replace("Week 1", "My week 1"), encoding="utf-8")
    before = copy.read_bytes()
    assert notebooks.copy_lesson(TOPIC) == copy and copy.read_bytes() == before


def test_a_new_copy_has_the_answers_and_the_old_one_is_kept(course, capsys):
    copy = notebooks.copy_lesson(TOPIC)
    copy.write_text(copy.read_text(encoding="utf-8").replace("Week 1", "My week 1"), encoding="utf-8")
    before = copy.read_bytes()
    solve("count_pairs", ANSWER)
    stub = week_module.Week(1).exercises["count_pairs"].stub.strip()
    notebooks.copy_lesson(TOPIC, anew=True)
    assert ANSWER in sources(copy) and stub not in sources(copy)
    others = [path for path in course.glob("my_notebook_until_*.ipynb") if path.read_bytes() == before]
    assert len(others) == 1 and others[0].name in capsys.readouterr().out


def test_a_changed_lesson_is_noticed(course):
    notebooks.copy_lesson(TOPIC)
    assert not notebooks.is_outdated(TOPIC)
    lesson = course / "notebook.ipynb"
    lesson.write_text(lesson.read_text(encoding="utf-8").replace("Week 1", "Week one"), encoding="utf-8")
    assert notebooks.is_outdated(TOPIC) and "FRESH=1" in notebooks.start_page()


def test_the_start_page_says_what_is_solved_and_leads_on(course):
    assert f"**Go on with [the bigram]({TOPIC}/my_notebook.ipynb).**" in notebooks.start_page()
    solve("count_pairs", ANSWER)
    assert f"| 1 of {len(week_module.Week(1).exercises)} |" in notebooks.start_page()


def test_git_tracks_neither_the_copies_nor_the_page():
    paths = [
        "weeks/start.md",
        "weeks/03_attention/my_notebook.ipynb",
        f"weeks/{TOPIC}/my_notebook_until_x.ipynb",
    ]
    ignored = subprocess.run(
        ["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ignored.stdout.split() == paths


def test_every_lesson_has_a_title():
    for topic in notebooks.TOPICS:
        assert notebooks.lesson_title(topic) and ":" not in notebooks.lesson_title(topic)


def test_names_are_read_without_running_what_they_name():
    for number in week_module.week_numbers():
        week = week_module.Week(number)
        assert week_module.exercise_names(week.folder) == list(week.exercises)


@pytest.fixture
def started(course, monkeypatch):
    """What was started, with its options; each ends with the status `started.status`."""

    class Started(list):
        status = 0

        def run(self, command, **options):
            self.append((command, options))
            return subprocess.CompletedProcess(command, self.status)

    calls = Started()
    monkeypatch.setattr(subprocess, "run", calls.run)
    return calls


@pytest.mark.parametrize("browser", [True, False])
def test_jupyterlab_opens_on_the_start_page(course, started, browser):
    notebooks.notebooks(notebooks.Notebooks(browser=browser))
    ((command, options),) = started
    assert command[1:4] == ["-m", "jupyter", "lab"] and options["cwd"] == course.parents[1]
    assert "--LabApp.default_url=/lab/tree/weeks/start.md" in command
    assert ("--no-browser" in command) == (not browser)
    assert (course / "my_notebook.ipynb").exists() and (course.parent / "start.md").exists()


def test_as_root_the_cure_is_named(started, monkeypatch):
    monkeypatch.setattr(notebooks, "is_root", lambda: True)
    started.status = 1
    with pytest.raises(ValueError, match="-m shared.course notebooks --allow-root --no-browser$"):
        notebooks.notebooks(notebooks.Notebooks())


@pytest.mark.parametrize("root", [True, False])
def test_a_failure_that_jupyterlab_explains_ends_with_its_status(started, monkeypatch, root):
    monkeypatch.setattr(notebooks, "is_root", lambda: root)
    started.status = 3
    with pytest.raises(SystemExit, match="^3$"):
        notebooks.notebooks(notebooks.Notebooks(allow_root=root))
    assert ("--allow-root" in started[0][0]) == root
