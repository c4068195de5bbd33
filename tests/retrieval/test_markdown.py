"""shared/retrieval/markdown.py: what CommonMark shows of a text is read, whatever stands round it."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lxml import html
from markdown_it import MarkdownIt

from shared.retrieval.documents import load_documents, read_document
from shared.retrieval.markdown import DEEPEST, LONGEST, read_markdown


def read(folder, text):
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return read_document(path, folder)


def sections(folder, text):
    """Title, and headings with text."""
    found = read(folder, text)
    return found.title, [("/".join(section.headings), section.text) for section in found.sections]


FENCES = "````md\n```py\n# no heading\n```\n````"
CASES = {
    "a rule comes first": (
        "---\n\n# Rules\n\nNo swimming.\n\n---\n\n# Fares\n\n4 crowns.\n",
        ("Rules", [("", "No swimming."), ("Fares", "4 crowns.")]),
    ),
    "front matter ends in dots": (
        "---\ntitle: Fares\n...\n\n# Adults\n\n4 crowns.\n\n---\n\n# Children\n\nFree.\n",
        ("Fares", [("Adults", "4 crowns."), ("Children", "Free.")]),
    ),
    "front matter without a title": ("---\ndraft: true\n---\n# Fares\n\nFree.\n", ("Fares", [("", "Free.")])),
    "a title that is a number": ("---\ntitle: 1984\n---\nFree.\n", ("1984", [("", "Free.")])),
    "a title said twice": ("---\ntitle: Fares\n---\n\n# Fares\n\nFree.\n", ("Fares", [("", "Free.")])),
    "no YAML, no front matter": (
        "---\nCall: or write: to us.\n---\nFree.\n",
        ("page", [("Call: or write: to us.", "Free.")]),
    ),
    "prose is no mapping": ("---\nCall us.\n---\nFree.\n", ("page", [("Call us.", "Free.")])),
    "fences in fences": (
        f"# Docs\n\n{FENCES}\n\n## Next\n\nNoon.\n",
        ("Docs", [("", FENCES), ("Next", "Noon.")]),
    ),
    "code between words": (
        "# Setup\n\n```pip install boat``` installs it.\n\n## Usage\n\nRun it.\n",
        ("Setup", [("", "```pip install boat``` installs it."), ("Usage", "Run it.")]),
    ),
    "marks in code": (
        "Call `__init__`, `a[i](j)`, `` a`b ``, `<!--` and `-->`.",
        ("page", [("", "Call `__init__`, `a[i](j)`, `` a`b ``, `<!--` and `-->`.")]),
    ),
    "links": (
        "See [a *b*](https://x.org/(y)), ![a boat](z.png), [c][d] and <https://e.org>."
        "\n\n[d]: https://f.org\n",
        ("page", [("", "See a b, a boat, c and https://e.org.")]),
    ),
    "footnotes": ("Fares[^1]\n\n[^1]: Free.\n", ("page", [("", "Fares[^1]\n\n[^1]: Free.")])),
    "escapes": (r"2 \* 3 &lt; 7 &amp; \_x\_", ("page", [("", "2 * 3 < 7 & _x_")])),
    "comments": (
        "A <!-- b --> c\n\n<!-- d\n\n# e\n\n--> f\n\ng\n",
        ("page", [("", "A c\n\nf\n\ng")]),
    ),
    "a comment that never ends": (
        "a\n\n<!-- b\n\n# C\n\nd\n",
        ("page", [("", "a\n\n<!-- b"), ("C", "d")]),
    ),
    "a tag that never ends": ("a\n\n<script>\n\n# C\n\nd\n", ("page", [("", "a\n\n<script>"), ("C", "d")])),
    "lists and quotes": (
        "1. a\n   b\n2. - c\n\n         d = *1*\n\n> # e\n> f\n",
        ("page", [("", "1. a\nb\n2. - c\n\nd = *1*\n\ne\nf")]),
    ),
    "a table": (
        "| a | *b* |\n|---|---|\n| 1 | 2 | 3 |\n",
        ("page", [("", "| a | b |\n|---|---|\n| 1 | 2 | 3 |")]),
    ),
    "two lines as a heading": ("One\ntwo\n===\nthree\n", ("One two", [("", "three")])),
    "half a surrogate pair": ('---\ntitle: "a\\uD800b"\n---\nc\n', ("a?b", [("", "c")])),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("breaks", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_what_is_written_is_read(tmp_path, text, expected, breaks):
    assert sections(tmp_path, text.replace("\n", breaks)) == expected


FRAGMENTS = [
    *(
        "# ",
        "## ",
        "---\n",
        "***\n",
        "===\n",
        "...\n",
        "```",
        "```\n",
        "````\n",
        "~~~\n",
        "`",
        "``",
        "*",
        "**",
    ),
    *("_", "__", "[", "](x)", "![", "<!--", "<!-- ", "-->", "<b>", "<div>", "</div>", "<script>", "<?", "> "),
    *("- ", "12. ", "    ", "\t", "\\", "&amp;", "|", "\n", "\n", "\n\n", "\n\n", "\x0b"),
]


@given(st.lists(st.sampled_from([*FRAGMENTS, *["word"] * 20]), max_size=30))
@example(["---\n", "word", "\n", "---\n", "word"])
@example(["word", "\n\n", "<!-- ", "word", "\n\n", "word"])
@example(["===\n", "\x0b", "<!--", "-->", "# "])
def test_every_word_that_a_browser_shows_is_read_in_its_place(tmp_path_factory, fragments):
    """The oracle: markdown-it's own HTML, and lxml's reading of it."""
    text = "".join(f" w{i}x" if part == "word" else part for i, part in enumerate(fragments))
    page = html.document_fromstring(f"<body><p>.</p>{MarkdownIt('commonmark').render(text)}</body>")
    shown = "".join(page.xpath("//text()[not(ancestor::script)]"))
    path = tmp_path_factory.mktemp("any") / "page.md"
    path.write_text(text, encoding="utf-8")
    lines = [line if isinstance(line, str) else line.text for line in read_markdown(path)]
    read = iter(re.findall(r"w\d+x", "\n".join(lines)))
    assert all(word in read for word in re.findall(r"w\d+x", shown))


def test_what_is_nested_too_deep_is_left_out_by_name(tmp_path):
    (tmp_path / "deep.md").write_text(">" * 5000 + " a\n")
    (tmp_path / "good.md").write_text(">" * (DEEPEST - 3) + " a\n")
    documents, problems = load_documents(tmp_path, lambda line: None)
    assert [document.sections[0].text for document in documents] == ["a"]
    assert problems == {"deep.md": f"its quotes and lists are nested more than {DEEPEST} deep"}


def test_a_long_table_is_read_line_by_line(tmp_path):
    row = "| [a](b) | **c** |\n"
    found = read(tmp_path, row * (LONGEST // len(row) + 1))
    assert set(found.sections[0].text.split("\n")) == {"| a | c |"}
