"""What a document says of itself, and what it is called: front matter, <meta>, a PDF's information, and paths
below the folder.
"""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pypdf import PdfReader, PdfWriter

from shared.retrieval.documents import (
    Chunk,
    Document,
    Section,
    chunk_documents,
    load_documents,
    read_document,
    source_below,
)
from shared.retrieval.front_matter import LARGEST, split_front_matter
from shared.retrieval.index import Index
from tests.retrieval.helpers import TOKENIZER, Words
from tests.retrieval.test_documents import pdf

# ---- front matter

FRONT = """---
title: "Valves: the north pump house"
team: [pumps, night shift]
year: 2024
pressure: 2.5
draft: false
checked: 2024-05-01
author: {name: Ada, since: 1999}
empty:
---
# Valves: the north pump house

Open them slowly.
"""
METADATA = {
    "title": "Valves: the north pump house",
    "team": ["pumps", "night shift"],
    "year": 2024,
    "pressure": 2.5,
    "draft": False,
    "checked": "2024-05-01",
    "author.name": "Ada",
    "author.since": 1999,
}


def read(folder, text, name="valves.md"):
    """The document of a file with this text, and what was said of it."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = []
    return read_document(path, folder, said.append), said


@pytest.mark.parametrize(
    "data",
    [FRONT.encode(), FRONT.replace("\n", "\r\n").encode(), FRONT.encode("utf-8-sig"), FRONT.encode("utf-16")],
    ids=["as it is", "CRLF", "with a byte order mark", "UTF-16"],
)
def test_front_matter_is_what_a_document_says_of_itself(tmp_path, data):
    found, said = read(tmp_path, data)
    sections = (Section((), "Open them slowly."),)
    assert found == Document("valves.md", METADATA["title"], sections, METADATA) and not said
    types = {name: type(value) for name, value in found.metadata.items()}
    assert types == {name: type(value) for name, value in METADATA.items()}
    (chunk,) = chunk_documents([found], TOKENIZER)
    assert chunk.metadata == METADATA and chunk.fields == METADATA | {"source": "valves.md"}


WORDS = st.lists(st.text("abcDEF019:-#'\"é轮[]{}&*!|>%@`,.?", min_size=1), min_size=1).map(" ".join)
SCALARS = WORDS | st.booleans() | st.integers(-(10**15), 10**15) | st.floats(-1e20, 1e20, allow_nan=False)
NAMES = st.text("abcdefgh_", min_size=1, max_size=9)


@pytest.mark.slow
@given(st.dictionaries(NAMES, SCALARS | st.lists(WORDS), min_size=1))
def test_what_pyyaml_writes_is_read_back(fields):
    written = yaml.safe_dump(fields, allow_unicode=True)
    found = split_front_matter(f"---\n{written}---\nText.\n")
    assert found == ("", fields, "Text.\n", "")
    assert {name: type(value) for name, value in found.metadata.items()} == {
        name: type(value) for name, value in fields.items()
    }


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("NO", "NO"),
        ("yes", "yes"),
        ("TRUE", True),
        ("'true'", "true"),
        ("17:50", "17:50"),
        ("007", "007"),
        ("1.10", 1.1),
        ('"1.10"', "1.10"),
        ("0x1F", "0x1F"),
        ("1e999", "1e999"),
        ("1.0e999", "1.0e999"),
        ("9" * 5000, "9" * 5000),
        ("2024-05-01T10:00:00", "2024-05-01T10:00:00"),
        (">-\n  two\n  lines", "two lines"),
        ("[1, true, {a: b}, null]", ["1", "true", "{a: b}", "null"]),
        ("!!python/object/apply:os.system [ls]", ["ls"]),
        ("!!binary aGk=", "aGk="),
    ],
    ids=lambda value: str(value)[:12],
)
def test_values_are_what_was_meant(written, value):
    found = split_front_matter(f"---\nfield: {written}\n---\n").metadata["field"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("written", ["1984", "1.50", "NO", "2001-01-01"])
def test_a_title_is_what_was_written(tmp_path, written):
    found, _ = read(tmp_path, f"---\ntitle: {written}\n---\nText.\n")
    assert found.title == found.metadata["title"] == written


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("---\ntitle: Valves: new\n---\nText.\n", "line 2: mapping values are not allowed here"),
        ("---\nteam: [pumps\n---\nText.\n", "line 3: expected ',' or ']'"),
        ("---\nteam: a\nteam: b\n---\nText.\n", "the field 'team' is in it twice"),
        ("---\na: &x [1]\nb: *x\n---\nText.\n", "an alias (*name) is in it"),
        ("---\na: &x [*x]\n---\nText.\n", "an alias (*name) is in it"),
        ("---\n? [a, b]\n: c\n---\nText.\n", "a field's name must be a text"),
        ("---\na: " + "[" * 200 + "\n---\nText.\n", "it is nested more than 16 deep"),
        (f"---\na: {'b' * LARGEST}\n---\nText.\n", f"over {LARGEST} characters"),
        ("---\nteam: pumps\n\nText without an end.\n", "it has no last line of ---"),
        ('---\na: "\\q"\n---\nText.\n', "line 2: found unknown escape character 'q'"),
    ],
    ids=lambda text: text[4:24],
)
def test_front_matter_that_cannot_be_read_is_said_and_is_text(tmp_path, text, why):
    found, said = read(tmp_path, text)
    assert found.metadata == {} and "Text" in found.sections[-1].text
    assert len(said) == 1 and why in said[0]
    assert said[0].startswith("valves.md: its front matter is read as text, and says nothing of it: ")
    again = []
    load_documents(tmp_path, again.append)
    assert again == said


@pytest.mark.parametrize(
    "text",
    [
        "---\n\nA rule comes first.\n\n---\n\nText.\n",
        "---\nCall us.\n---\nText.\n",
        "---\n---\nText.\n",
        "---\n- a\n- b\n---\nText.\n",
        "\n---\nteam: pumps\n---\nText.\n",
        "----\nteam: pumps\n----\nText.\n",
        "Text.\n\n---\n\nMore.\n",
        "---",
    ],
)
def test_what_is_no_front_matter_is_text_without_a_word(tmp_path, text):
    found, said = read(tmp_path, text + "\n\nThe end.")
    assert found.metadata == {} and found.title == "valves" and not said
    assert found.sections[-1].text.endswith("The end.")


def test_metadata_can_be_written_as_json_and_shown(tmp_path):
    found, _ = read(tmp_path, '---\na: "\\ud800 \\a b"\nlist: ["\\udc00x"]\n---\nText.\n')
    json.dumps(found.metadata, ensure_ascii=False).encode("utf-8")
    assert found.metadata == {"a": "? b", "list": ["?x"]}


# ---- other kinds of files


def test_a_page_says_of_itself_what_its_meta_tags_say(tmp_path):
    page = f"""<html><head><title>Valves</title><meta charset="utf-8">
    <meta name="Author" content=" Ada  Lee "><meta name="keywords" content="pumps, valves;">
    <meta name="author" content="another"><meta name=viewport content="width=device-width">
    <meta property="og:title" content="x"><meta name="empty" content=""><meta content="nameless">
    <meta name="description" content="{"long " * 300}"></head><body><p>Open slowly.</p></body></html>"""
    found, said = read(tmp_path, page, "valves.html")
    assert found.metadata == {"author": "Ada Lee", "keywords": ["pumps", "valves"]} and not said
    assert (found.title, found.sections) == ("Valves", (Section((), "Open slowly."),))


def test_a_pdf_says_of_itself_what_its_information_says(tmp_path):
    path = pdf(tmp_path / "valves.pdf", ["Open slowly."])
    writer = PdfWriter(clone_from=PdfReader(path))
    writer.add_metadata({"/Title": "North  valves", "/Author": "Ada", "/Subject": ""})
    writer.add_metadata({"/Keywords": "pumps, valves"})
    writer.write(path)
    found = read_document(path, tmp_path)
    assert found.metadata == {"title": "North valves", "author": "Ada", "keywords": ["pumps", "valves"]}
    assert (found.title, found.sections) == ("North valves", (Section((), "Open slowly.", 1),))


# ---- sources


@pytest.fixture
def notes(tmp_path):
    """Two files of one name, in two folders."""
    for folder, words in (("north", "The north valve is red."), ("south/deep", "The south valve is blue.")):
        (tmp_path / "notes" / folder).mkdir(parents=True)
        (tmp_path / "notes" / folder / "valves.md").write_text(f"# Valves\n\n{words}\n", encoding="utf-8")
    return tmp_path / "notes"


BOTH = ["north/valves.md", "south/deep/valves.md"]


def test_two_files_of_one_name_are_two_documents_and_each_is_updated_by_itself(notes):
    index = Index(Words())
    index.add(chunk_documents(load_documents(notes).documents, TOKENIZER))
    assert index.sources == BOTH
    changed = notes / "south/deep/valves.md"
    changed.write_text("# Valves\n\nThe south valve is green.\n", encoding="utf-8")
    index.update(chunk_documents([read_document(changed, notes)], TOKENIZER))
    assert sorted(index.sources) == BOTH and len(index) == 2
    texts = {hit.chunk.source: hit.chunk.text for hit in index.search("valve")}
    assert texts == dict(zip(BOTH, ["The north valve is red.", "The south valve is green."]))
    index.delete(BOTH[:1])
    assert index.sources == BOTH[1:]


@pytest.mark.parametrize("written", ["south/deep/valves.md", "south/../south/deep/valves.md", "south"])
def test_a_part_of_a_folder_has_the_sources_of_the_whole(notes, monkeypatch, written):
    assert [d.source for d in load_documents(notes / written, root=notes).documents] == BOTH[1:]
    monkeypatch.chdir(notes.parent)
    assert [d.source for d in load_documents(f"notes/{written}", root="notes").documents] == BOTH[1:]
    assert [d.source for d in load_documents("notes", root="notes").documents] == BOTH


def test_problems_are_named_as_documents_are(notes):
    (notes / "south/scan.md").write_bytes(b"\0")
    said = []
    assert load_documents(notes / "south", said.append, root=notes).problems.keys() == {"south/scan.md"}
    assert said[0].startswith("left out: south/scan.md: ")


def test_a_lone_file_is_called_by_its_name(notes):
    assert [d.source for d in load_documents(notes / BOTH[0]).documents] == ["valves.md"]


def test_a_folder_may_be_written_through_a_link(notes):
    (notes.parent / "link").symlink_to(notes)
    assert source_below(notes.parent / "link" / BOTH[0], notes) == BOTH[0]
    assert source_below(notes / BOTH[0], notes.parent / "link") == BOTH[0]
    (notes / "again.md").symlink_to(BOTH[0])
    assert source_below(notes / "again.md", notes.parent / "link") == "again.md"


@pytest.mark.parametrize("read_it", [lambda p, root: load_documents(p, root=root), read_document])
def test_a_file_outside_of_the_folder_is_refused(notes, read_it):
    with pytest.raises(ValueError, match=r"(valves\.md|north) does not lie in .*south: give"):
        read_it(notes / BOTH[0], notes / "south")


def test_two_documents_of_one_source_are_refused(notes):
    lone = [document for each in BOTH for document in load_documents(notes / each).documents]
    with pytest.raises(ValueError, match=r"two documents have the source valves\.md: load"):
        chunk_documents(lone, TOKENIZER)


def test_documents_and_chunks_can_be_members_of_sets():
    chunk = Chunk("a.md", "A", (), "Text.", metadata={"team": ["pumps"]})
    assert len({chunk, chunk}) == 1 and len({Document("a.md", "A", (), {"x": [""]})}) == 1
