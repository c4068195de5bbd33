"""shared/retrieval/html.py: visible text in its order, headings and all, whatever is not closed."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import html

from shared.retrieval.documents import load_documents, read_document
from shared.retrieval.html import DEEPEST, read_html


def sections(folder, page):
    """Title, and headings with text."""
    path = folder / "page.html"
    path.write_bytes(page if isinstance(page, bytes) else page.encode())
    found = read_document(path, path.parent)
    return found.title, [("/".join(section.headings), section.text) for section in found.sections]


CASES = {
    "a declaration of nothing": ("<p>a</p><![foo[ x ]]><p>b</p>", ("page", [("", "a\n\nb")])),
    "cells and rows": ("<table><tr><td>a<td>b<tr><td>c", ("page", [("", "a b\n\nc")])),
    "a heading that is not closed": ("<h1>A<div>b</div><h2>C<p>d", ("A", [("", "b"), ("C", "d")])),
    "blocks in a heading": ("<h1><div>A</div></h1><p>b", ("A", [("", "b")])),
    "a head that is not closed": ("<head><title>A</title><p>b", ("A", [("", "b")])),
    "a title under a hidden heading": (
        "<title>A</title><nav><h1>Home</h1></nav><p>b",
        ("A", [("", "b")]),
    ),
    "what is not shown": (
        "<p>a<script>b</script><style>c</style><svg><title>d</title></svg><!-- e --><template>f</template>",
        ("page", [("", "a")]),
    ),
    "spaces and code": ("<p>a \n b<pre>c\n  d</pre>e", ("page", [("", "a b\n\nc\nd\ne")])),
    "UTF-8 without a word of it": ("<p>Zürich", ("page", [("", "Zürich")])),
    "UTF-16": ("<p>Zürich".encode("utf-16"), ("page", [("", "Zürich")])),
    "Latin-1": (
        "<p>Zürich ist schön, sagt der Müller".encode("latin-1"),
        ("page", [("", "Zürich ist schön, sagt der Müller")]),
    ),
    "Russian": ('<meta charset="windows-1251"><p>паром'.encode("cp1251"), ("page", [("", "паром")])),
    "Japanese in seven bits": (
        '<meta charset="iso-2022-jp"><p>渡し船'.encode("iso-2022-jp"),
        ("page", [("", "渡し船")]),
    ),
    "far away from its first bytes": (
        b"<!DOCTYPE html>" + b"<p>boat</p>" * 9000 + "<p>Zürich".encode("latin-1"),
        ("page", [("", "\n\n".join(["boat"] * 9000 + ["Zürich"]))]),
    ),
}


@pytest.mark.parametrize(("page", "expected"), CASES.values(), ids=CASES.keys())
def test_what_is_shown_is_read(tmp_path, page, expected):
    assert sections(tmp_path, page) == expected


TAGS = "p div table tr td ul li b i h1 h2 pre br a form section dl dt dd font nav script".split()
FRAGMENTS = (
    [f"<{tag}>" for tag in TAGS] + [f"</{tag}>" for tag in TAGS] + ["<![x[", "]]>", "<!-- x -->", "&", "<"]
)


@given(st.lists(st.sampled_from([*FRAGMENTS, *["word"] * 20]), max_size=30))
def test_every_word_of_the_tree_is_read_in_its_place(tmp_path_factory, fragments):
    """The oracle: the tree that lxml makes of the page."""
    text = "<p>.</p>" + "".join(f" w{i}x" if part == "word" else part for i, part in enumerate(fragments))
    page = html.document_fromstring(text)
    for hidden in page.xpath("//comment() | //script | //nav | //processing-instruction()"):
        hidden.drop_tree()
    path = tmp_path_factory.mktemp("any") / "page.html"
    path.write_text(text, encoding="utf-8")
    lines = [line if isinstance(line, str) else line.text for line in read_html(path)]
    assert re.findall(r"w\d+x", "\n".join(lines)) == re.findall(r"w\d+x", page.text_content())


def test_what_is_nested_too_deep_is_left_out_by_name(tmp_path):
    (tmp_path / "deep.html").write_text("<div>" * 100_000 + "a")
    (tmp_path / "good.html").write_text("<div>" * (DEEPEST - 10) + "a")
    documents, problems = load_documents(tmp_path, lambda line: None)
    assert [document.sections[0].text for document in documents] == ["a"]
    assert problems == {"deep.html": f"its tags are nested more than {DEEPEST} deep"}
