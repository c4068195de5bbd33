"""docs/guides: each page is an engineer's job, and does what it says, without a network."""

import doctest
import re

import pytest

from shared.runtime import ROOT

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_does_what_it_says(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "data"))
    text = re.sub(r"^```.*", "", guide.read_text(encoding="utf-8"), flags=re.MULTILINE)
    page = doctest.DocTestParser().get_doctest(text, {}, guide.name, str(guide), 0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_ONLY_FIRST_FAILURE
    runner = doctest.DocTestRunner(optionflags=flags)
    assert runner.run(page).failed == 0 < len(page.examples)
