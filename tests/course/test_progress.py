"""The progress page says what the logs say, and links what is there."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shared.course import progress, workspace
from shared.runtime import ROOT, RunLog, write_json


@pytest.fixture
def learner(output):
    """A learner who has run week 1 and week 10, the latter at smoke, and whose model writes HTML."""
    for topic, preset, run, artifact in (
        ("01_bigram", "laptop", "network", {"sample": "<script>alert('&')</script>"}),
        ("10_ppo_dpo", "smoke", "dpo", {"samples": [["ROMEO:", " away!"]]}),
    ):
        logs = output / "logs" / topic / "mine" / preset / "tinyshakespeare"
        with RunLog(logs / run) as log:
            log.artifact(**artifact)
            log.finish()
        write_json(
            logs / "week.json",
            {
                "preset": preset,
                "data": "tinyshakespeare",
                "seconds": 12.3,
                "metrics": {"bits_per_byte": 3.25, "loss": 2.0},
            },
        )
    return output


class Page(HTMLParser):
    """What a browser would fetch, link to and show; every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.links, self.ids, self.words, self.open, self.tags = [], [], set(), [], [], set()
        self.feed(text)
        self.words = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.sources += [attrs["src"]] if "src" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_learners_page_has_their_figures_beside_the_courses(learner):
    path = progress.write_page()
    page = Page(path.read_text(encoding="utf-8"))
    assert path == learner / "reports" / "index.html" and page.open == []
    weeks = workspace.weeks()
    assert f"2 of {len(weeks)} weeks run" in page.words
    reference = json.loads(
        (ROOT / "logs" / "01_bigram" / "reference" / "tinyshakespeare" / "week.json").read_text()
    )["metrics"]
    assert f"bits per byte 3.25 {reference['bits_per_byte']:.4g}" in page.words
    assert "yes (smoke)" in page.words and page.words.count("Not run yet") == len(weeks) - 2
    assert "<script>alert('&')</script>" in page.words and "script" not in page.tags  # shown, not run
    assert "ROMEO: away!" in page.words


def test_what_the_page_links_is_there(learner):
    page = Page(progress.write_page().read_text(encoding="utf-8"))
    assert len(page.sources) > 30 and all(
        (learner / "reports" / source).resolve().is_file() for source in page.sources
    )
    assert {link.removeprefix("#") for link in page.links} == set(workspace.weeks()) <= page.ids


def test_figures_are_those_of_the_same_data(output):
    """A learner who has only the plays is compared with the course's run on the plays."""
    logs = output / "logs" / "04_mini_gpt" / "mine" / "laptop" / "shakespeare"
    write_json(
        logs / "week.json",
        {"preset": "laptop", "data": "shakespeare", "seconds": 1, "metrics": {"bits_per_byte": 2.5}},
    )
    week = next(r for r in progress.collect() if r.topic == "04_mini_gpt")
    course_run = json.loads(
        (ROOT / "logs" / "04_mini_gpt" / "reference" / "shakespeare" / "week.json").read_text()
    )
    assert week.course.data == "shakespeare" and week.course.metrics == course_run["metrics"]


def test_the_courses_page_is_what_its_logs_say(output):
    text = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    assert progress.markdown_page(progress.collect(mine=False)) == text, "run python -m shared.course.report"
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(images) > 30 and all((ROOT / "reports" / image).is_file() for image in images)
    links = [link for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)\)", text)]
    assert links and all((ROOT / "reports" / Path(link)).resolve().is_file() for link in links)
