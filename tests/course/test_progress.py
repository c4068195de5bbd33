"""The progress page says what the logs say, and links what is there."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shared.course import progress, progress_page, runs
from shared.runtime import ROOT, RunLog, write_json


@pytest.fixture
def learner(output):
    """A learner who has run week 1 and week 10, the latter at smoke, and whose model writes HTML."""
    for topic, preset, run, artifact in (
        ("01_bigram", "laptop", "network", {"sample": "<script>alert('&')</script>"}),
        ("10_ppo_dpo", "smoke", "countdown-grpo-1", {"samples": [["ROMEO:", " away!"]]}),
    ):
        logs = output / "logs" / topic / "mine" / preset / "tinyshakespeare"
        with RunLog(logs / run) as log:
            log.artifact(**artifact)
            log.finish()
        metrics = {"bits_per_byte": 3.25, "loss": 2.0}
        week = {"preset": preset, "data": "tinyshakespeare", "seconds": 12.3, "metrics": metrics}
        write_json(logs / "week.json", week)
    return output


class Page(HTMLParser):
    """What a browser would fetch, link to and show; every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.sources = []
        self.links = []
        self.ids = set()
        self.tags = set()
        self.open = []
        self.texts = []
        self.feed(text)
        self.words = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if "src" in attrs:
            self.sources.append(attrs["src"])
        if "href" in attrs:
            self.links.append(attrs["href"])
        if "id" in attrs:
            self.ids.add(attrs["id"])
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def reference_metrics(topic, data):
    path = ROOT / "logs" / topic / "reference" / data / "week.json"
    return json.loads(path.read_text())["metrics"]


def test_the_learners_page_has_their_figures_beside_the_courses(learner):
    path = progress_page.write_page()
    page = Page(path.read_text(encoding="utf-8"))
    assert path == learner / "reports" / "index.html" and page.open == []
    weeks = runs.weeks()
    assert f"2 of {len(weeks)} weeks run" in page.words
    reference = reference_metrics("01_bigram", "tinyshakespeare")
    assert f"bits per byte 3.25 {reference['bits_per_byte']:.4g}" in page.words
    assert "yes (smoke)" in page.words and page.words.count("Not run yet") == len(weeks) - 2
    assert "<script>alert('&')</script>" in page.words and "script" not in page.tags  # shown, not run
    assert "ROMEO: away!" in page.words


def test_what_is_solved_is_the_learners(learner, monkeypatch):
    monkeypatch.setattr(progress, "solved_exercises", lambda folder: ["a", "b"])
    assert [week.solved for week in progress.collect()] == [2] * len(runs.weeks())
    assert [week.solved for week in progress.collect(mine=False)] == [0] * len(runs.weeks())


def test_what_the_page_links_is_there(learner):
    page = Page(progress_page.write_page().read_text(encoding="utf-8"))
    assert len(page.sources) > 30
    for source in page.sources:
        assert (learner / "reports" / source).resolve().is_file()
    assert {link.removeprefix("#") for link in page.links} == set(runs.weeks()) <= page.ids


def test_figures_are_those_of_the_same_data(output):
    """A learner who has only the plays is compared with the course's run on the plays."""
    logs = output / "logs" / "04_mini_gpt" / "mine" / "laptop" / "shakespeare"
    results = {"preset": "laptop", "data": "shakespeare", "seconds": 1, "metrics": {"bits_per_byte": 2.5}}
    write_json(logs / "week.json", results)
    week = next(r for r in progress.collect() if r.topic == "04_mini_gpt")
    assert week.course.data == "shakespeare"
    assert week.course.metrics == reference_metrics("04_mini_gpt", "shakespeare")


def test_the_courses_page_is_what_its_logs_say(output):
    text = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    assert progress_page.markdown_page(progress.collect(mine=False)) == text, (
        "run python -m shared.course.report"
    )
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(images) > 30 and all((ROOT / "reports" / image).is_file() for image in images)
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)\)", text)
    assert links and all((ROOT / "reports" / Path(link)).resolve().is_file() for link in links)
