"""docs/: every link leads somewhere, every term and every paper stands where it is said to, every measured
figure comes from a log.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from shared.course.runs import TOPICS
from shared.runtime import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
POSTS = sorted((DOCS / "posts").glob("*.md"))
ENTRY = re.compile(r"\*\*(.+?)\*\*: (.+) \(\[week (\d+)\]\((\S+)\)\)")
MARKED = re.compile(r"<!-- = (\S+) \S+ \S+ -->[^<]+<!-- end -->")
COMMENT = re.compile(r"<!--.*?-->", re.S)


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    own = [link for link in links(path) if "://" not in link]
    assert [link for link in own if not (path.parent / link.partition("#")[0]).exists()] == []


# ---- the glossary


@cache
def parts(path: Path) -> tuple[str, ...]:
    """What a file explains: a notebook's pieces of prose, or a module's text in one piece; in lower case."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return (text.lower(),)
    return tuple(
        "".join(cell["source"]).lower()
        for cell in json.loads(text)["cells"]
        if cell["cell_type"] == "markdown"
    )


def stems(term: str) -> list[str]:
    """The words of a term without their endings, and without what stands in brackets.

    >>> stems("Rank-stabilised LoRA (rsLoRA)")
    ['rank', 'stabilis', 'lora']
    """
    words = re.findall(r"[^\W_]+", re.sub(r"\(.*?\)", "", term.lower()))
    return [re.sub(r"(ation|ing|ed|es|e|s|y)$", "", word) if len(word) > 4 else word for word in words]


def explains(path: Path, term: str) -> bool:
    """Whether one piece of the file has every word of the term."""
    return any(
        all(re.search(rf"(?<![^\W_]){re.escape(stem)}", part) for stem in stems(term)) for part in parts(path)
    )


def entries() -> list[tuple[str, str, int, Path]]:
    """Term, meaning, week, and the file that explains it."""
    lines = [
        line
        for line in (DOCS / "glossary.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("**")
    ]
    found = [ENTRY.fullmatch(line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found) if not match]
    return [(m[1], m[2], int(m[3]), (DOCS / m[4]).resolve()) for m in found]


ENTRIES = entries()


def test_the_glossary_is_in_order_and_names_nothing_twice():
    terms = [term.lower() for term, *_ in ENTRIES]
    assert terms == sorted(set(terms)) != []


@pytest.mark.parametrize("term, meaning, week, path", ENTRIES, ids=[term for term, *_ in ENTRIES])
def test_a_term_is_explained_where_the_glossary_says(term, meaning, week, path):
    if path.suffix == ".ipynb":
        assert path.parent.name == TOPICS[week - 1]
    else:
        assert (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").startswith(
            f"Week {week}."
        )
    assert explains(path, term)
    assert meaning.endswith(".") and 1 <= len(re.findall(r"[.?!](?:\s|$)", meaning)) <= 3


def test_a_term_that_is_not_there_is_noticed():
    notebook = ROOT / "weeks" / TOPICS[0] / "notebook.ipynb"
    assert explains(notebook, "bigrams") and explains(notebook, "Bits per byte")
    assert not explains(notebook, "GPTQ") and not explains(notebook, "bigram quantization")


# ---- the papers


def sections() -> dict[int, list[str]]:
    """The entries of each week."""
    found: dict[int, list[str]] = {}
    for chunk in re.split(r"^## ", (DOCS / "papers.md").read_text(encoding="utf-8"), flags=re.M)[1:]:
        heading, *lines = chunk.splitlines()
        found[int(re.match(r"Week (\d+):", heading)[1])] = [line for line in lines if line.startswith("- ")]
    return found


def test_each_week_has_its_papers():
    assert list(sections()) == list(range(1, len(TOPICS) + 1))


@pytest.mark.parametrize("week", range(1, len(TOPICS) + 1))
def test_a_paper_says_who_when_and_where_the_course_uses_it(week):
    lines = sections()[week]
    assert len(lines) >= 2
    for line in lines:
        assert re.match(r"- [^(]+ \((19|20)\d\d\), \*.+?\*", line), line  # authors (year), *title*
        used = [(DOCS / target).resolve() for target in re.findall(r"\]\((\.\./\S+?)\)", line)]
        assert used and all(path.is_file() and path.suffix in (".py", ".ipynb") for path in used), line


def test_what_a_module_cites_is_listed():
    lines = (DOCS / "papers.md").read_text(encoding="utf-8").splitlines()
    cited = set()
    for path in (ROOT / "shared").rglob("*.py"):
        text = " ".join(path.read_text(encoding="utf-8").split())
        cited |= {
            (*found, path.name) for found in re.findall(r"([\w']+) et al\.[^;]*?\b((?:19|20)\d\d)\b", text)
        }
    assert len(cited) > 50
    assert [
        c
        for c in sorted(cited)
        if not any(line.startswith("- ") and c[0] in line and f"({c[1]})" in line for line in lines)
    ] == []


def test_no_paper_is_listed_twice_and_identifiers_look_like_arxivs():
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    titles = re.findall(r"^- [^(]+ \(\d{4}\), \*(.+?)\*", text, flags=re.M)
    assert len(titles) == len(set(titles)) == len(re.findall(r"^- ", text, flags=re.M))
    numbers = re.findall(r"arXiv:(\S+?)[.,;)]*(?=\s|$)", text)
    assert numbers and len(numbers) == len(set(numbers))
    assert all(
        re.fullmatch(r"\d{4}\.\d{4,5}", n) and 7 <= int(n[:2]) <= 26 and 1 <= int(n[2:4]) <= 12
        for n in numbers
    )


# ---- the posts


def test_posts_belong_to_finished_weeks():
    stems = [path.stem for path in POSTS]
    assert set(TOPICS[:10]) <= set(stems)
    assert all((ROOT / "weeks" / stem / "log.md").exists() for stem in stems)


@pytest.mark.parametrize("path", POSTS, ids=lambda p: p.stem)
def test_a_post_is_short_and_has_one_plot_of_its_week(path):
    text = path.read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]+\]\((\S+)\)", text)
    assert len(pictures) == 1 and pictures[0].startswith(f"../../reports/{path.stem}/")
    words = re.sub(r"!\[[^\]]*\]\(\S+\)", "", COMMENT.sub("", text)).split()
    assert 180 <= len(words) <= 300
    assert text.startswith("# ") and len(re.findall(r"^#", text, flags=re.M)) == 1


@pytest.mark.parametrize("path", POSTS, ids=lambda p: p.stem)
def test_a_posts_figures_come_from_logs(path):
    """What looks measured is marked; tests/weeks/test_prose.py holds marked figures against the logs."""
    text = path.read_text(encoding="utf-8")
    marks = MARKED.findall(text)
    assert len(marks) >= 3 and any(run.startswith(path.stem) for run in marks)
    assert re.findall(r"\d[.,]\d|\d ?%", MARKED.sub("", text)) == []
