"""shared/retrieval/documents.py: what is read is what was written, in every kind of file; what cannot be read
is said; chunks leave nothing out.
"""

import json
import sys

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from shared.retrieval.documents import (
    KINDS,
    Document,
    Section,
    chunk_documents,
    clean_text,
    load_documents,
    read_document,
)
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer

HANDBOOK = ROOT / "weeks/11_rag/handbook"
MARKDOWN = """---
draft: true
---
# The *Ferry*

Two boats, [both green](boats.html).

## Fares

A ticket is **9 tallies**.\tChildren <!-- under 12 --> pay less.

### For residents

snake_case_stays, 2 * 3 * 4 too.

Summer
------

```
# not a heading
x  =  *1*
```
"""
HTML = """<html><head><title>Shop | Ferry</title><style>p {color: red}</style></head><body><nav>Home</nav>
<h1>The <i>Ferry</i></h1><p>Two boats,
<a href="boats.html">both green</a>.</p><div><h2>Fares</h2>A ticket is <b>9 tallies</b>. Children
<!-- under 12 --> pay less.
<h3>For  residents</h3><script>var x = "hidden"</script>
<p>snake_case_stays, 2 * 3 * 4 too.<h2>Summer</h2><pre># not a heading
x  =  *1*</pre></div></body></html>"""
SECTIONS = (
    Section((), "Two boats, both green."),
    Section(("Fares",), "A ticket is 9 tallies. Children pay less."),
    Section(("Fares", "For residents"), "snake_case_stays, 2 * 3 * 4 too."),
)
TOKENIZER = BPETokenizer.train(
    "the ferry leaves the harbour at noon; the later ferry leaves at night" * 3, 280
)


def pdf(path, texts, password=None, algorithm="RC4-128"):
    """A PDF with a page for each text; an empty one is a page without any."""
    writer = PdfWriter()
    font = DictionaryObject(
        {
            NameObject(k): NameObject(v)
            for k, v in (("/Type", "/Font"), ("/Subtype", "/Type1"), ("/BaseFont", "/Helvetica"))
        }
    )
    for text in texts:
        page = writer.add_blank_page(300, 300)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        if text:
            stream = DecodedStreamObject()
            lines = " T* ".join(f"({line}) Tj" for line in text.split("\n"))
            stream.set_data(f"BT /F1 12 Tf 14 TL 20 250 Td {lines} ET".encode())
            page[NameObject("/Contents")] = writer._add_object(stream)
    if password is not None:
        writer.encrypt(password, "owner's", algorithm=algorithm)
    writer.write(path)
    return path


@pytest.mark.parametrize("name, content", [("ferry.md", MARKDOWN), ("ferry.html", HTML)])
def test_markdown_and_html_give_the_same_sections(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = read_document(tmp_path / name, tmp_path)
    assert (found.source, found.title, found.sections[:3]) == (name, "The Ferry", SECTIONS)
    assert [section.headings for section in found.sections[3:]] == [("Summer",)]
    assert [line.strip("`") for line in found.sections[3].text.split("\n") if line.strip("`")] == [
        "# not a heading",
        "x = *1*",
    ]


def test_a_text_file_is_one_section_under_its_name(tmp_path):
    (tmp_path / "old-mill.txt").write_bytes(
        "\ufeff# Not a heading\r\n\r\n\r\n\r\nThe miller\u00ad's  cat.\x07 ".encode()
    )
    assert read_document(tmp_path / "old-mill.txt", tmp_path) == Document(
        "old-mill.txt", "old mill", (Section((), "# Not a heading\n\nThe miller's cat."),)
    )


def test_utf_16_is_read_by_its_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("Zürich".encode("utf-16"))
    assert read_document(tmp_path / "a.txt", tmp_path).sections == (Section((), "Zürich"),)


def test_a_pdf_is_read_page_by_page(tmp_path):
    found = read_document(
        pdf(tmp_path / "rules.pdf", ["Pets are wel-\ncome.", "", "Cats must stay."]), tmp_path
    )
    assert found == Document(
        "rules.pdf", "rules", (Section((), "Pets are welcome.", 1), Section((), "Cats must stay.", 3))
    )
    assert [chunk.cite for chunk in chunk_documents([found], TOKENIZER)] == [
        "rules.pdf, page 1",
        "rules.pdf, page 3",
    ]


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
def test_a_pdf_that_opens_without_a_password_is_read(tmp_path, algorithm):
    found = read_document(pdf(tmp_path / "rules.pdf", ["Pets are welcome."], "", algorithm), tmp_path)
    assert found.sections == (Section((), "Pets are welcome.", 1),)


def jbig2(path):
    """A PDF whose page can only be unpacked by a program that few have."""
    pdf(path, ["Hello"])
    data = path.read_bytes()
    path.write_bytes(data.replace(b"<<\n/Length", b"<<\n/Filter /JBIG2Decode\n/Length"))
    return path


def bad_files(folder):
    """What cannot be read, by name, with what must be said of it."""
    (folder / "deep").mkdir()
    (folder / "deep/binary.md").write_bytes(b"# A title\n\x00\x01\x02")
    (folder / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    (folder / "empty.md").write_text("# Only a title\n\n")
    (folder / "binary.html").write_bytes(b"<p>\0\0</p>")
    (folder / "letter.docx").write_bytes(b"PK")
    (folder / "cut.pdf").write_bytes(pdf(folder / "cut.pdf", ["Hello"]).read_bytes()[:150])
    (folder / "noise.pdf").write_bytes(bytes(range(256)))
    pdf(folder / "scan.pdf", ["", ""])
    pdf(folder / "locked.pdf", ["Hello"], "secret")
    pdf(folder / "locked-aes.pdf", ["Hello"], "secret", "AES-256")
    jbig2(folder / "unpacked.pdf")
    return {
        "deep/binary.md": "binary file",
        "latin.txt": "not UTF-8",
        "empty.md": "no text",
        "binary.html": "binary file",
        "letter.docx": "kind .docx",
        "cut.pdf": "damaged or no PDF",
        "noise.pdf": "damaged or no PDF",
        "scan.pdf": "OCR",
        "locked.pdf": "encrypted",
        "locked-aes.pdf": "encrypted",
        "unpacked.pdf": "jbig2dec",
    }


def test_a_bad_file_is_said_and_the_rest_goes_on(tmp_path):
    expected = bad_files(tmp_path)
    (tmp_path / "good.md").write_text("# Good\n\nText.")
    (tmp_path / ".hidden.md").write_text("# Hidden\n\nText.")
    said = []
    documents, problems = load_documents(tmp_path, said.append)
    assert [d.source for d in documents] == ["good.md"]
    assert problems.keys() == expected.keys()
    for source, words in expected.items():
        assert words in problems[source]
        assert not problems[source].endswith("Error)")  # what pypdf says, not how it calls it
        assert any(line == f"left out: {source}: {problems[source]}" for line in said)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RecursionError("too deep"), "it cannot be read (RecursionError: too deep)"),
        (
            AssertionError("we should not get here!"),
            "it cannot be read (AssertionError: we should not get here!)",
        ),
        (MemoryError(), "it cannot be read (MemoryError: )"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_whatever_a_reader_does_the_rest_is_read(tmp_path, monkeypatch, error, reason):
    def fail(path):
        raise error

    monkeypatch.setitem(KINDS, ".bad", fail)
    for name in ("a.txt", "b.bad", "c.txt"):
        (tmp_path / name).write_text("Text.")
    documents, problems = load_documents(tmp_path, lambda line: None)
    assert [document.source for document in documents] == ["a.txt", "c.txt"]
    assert problems == {"b.bad": reason}


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "shared.retrieval.markdown", raising=False)
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    (tmp_path / "a.md").write_text("Text.")
    with pytest.raises(ValueError, match=r'reading \.md: markdown_it is not installed: .*"llm-weeks\[rag\]"'):
        read_document(tmp_path / "a.md", tmp_path)


def test_a_folder_that_gives_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist: give a folder"):
        load_documents(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no files in it: put documents there \(\.md"):
        load_documents(tmp_path)
    bad_files(tmp_path)
    with pytest.raises(ValueError, match="no document that can be read: binary.html: it is a binary file"):
        load_documents(tmp_path, lambda line: None)


def test_the_handbook_is_read_whole():
    documents, problems = load_documents(HANDBOOK)
    assert len(documents) == 64 and not problems
    sections = {(d.source, *s.headings) for d in documents for s in d.sections}
    questions = [
        json.loads(line) for line in (ROOT / "weeks/11_rag/questions.jsonl").read_text().splitlines()
    ]
    assert {(q["document"], q["section"]) for q in questions if q["document"]} <= sections
    words = " ".join(
        " ".join([d.title, *(w for s in d.sections for w in (*s.headings[-1:], s.text))]) for d in documents
    ).split()
    written = (
        " ".join(path.read_text() for path in sorted(HANDBOOK.glob("*.md")))
        .replace("#", " ")
        .replace("*", "")
        .split()
    )
    assert sorted(words) == sorted(written)


# ---- chunks


@pytest.mark.slow
def test_chunks_know_where_they_stand():
    documents = load_documents(HANDBOOK).documents
    chunks = chunk_documents(documents, TOKENIZER, size=100, overlap=20, window=40)
    sections = {(d.source, s.headings): s.text for d in documents for s in d.sections}
    assert {(c.source, c.headings) for c in chunks} == sections.keys()
    assert len({c.id for c in chunks}) == len(chunks)
    for chunk in chunks:
        assert sections[chunk.source, chunk.headings][chunk.start :].startswith(chunk.text)
        assert chunk.passage == f"{' > '.join([chunk.title, *chunk.headings])}\n{chunk.text}"
        assert chunk.windows[0][0] == 0 and chunk.windows[-1][1] == len(chunk.text)
        assert all(text.startswith(chunk.title) for text in chunk.window_texts())


def test_windows_are_sentences():
    text = "Is it late? No: the 17:50 leaves.\n- one\n- two, e.g. three! " + "harbour " * 70
    chunk = chunk_documents(
        [Document("a.md", "A", (Section((), text.strip()),))], TOKENIZER, size=700, window=60
    )[0]
    words = [chunk.text[a:b] for a, b in chunk.windows]
    assert words[:7] == [
        "Is it late?",
        "No:",
        "the 17:50 leaves.",
        "- one",
        "- two, e.g.",
        "three!",
        words[6],
    ]
    assert len(words) > 7 and all(len(TOKENIZER.encode(word)) <= 60 for word in words)
    assert " ".join(words).split() == text.split()


def test_a_sentence_goes_on_over_a_wrapped_line_and_ends_before_an_item():
    wrapped = (
        "The ferry leaves the harbour of the town on the island at ten\nto six\n- that is the last one of the"
        " day, which few people have ever seen\n- one more"
    )
    chunk = chunk_documents(
        [Document("a.md", "A", (Section((), wrapped),))], TOKENIZER, size=700, window=200
    )[0]
    parts = wrapped.split("\n")
    assert [chunk.text[a:b] for a, b in chunk.windows] == ["\n".join(parts[:2]), *parts[2:]]


@pytest.mark.parametrize(
    "text, cleaned",
    [("a \t b", "a b"), ("a\r\nb\rc", "a\nb\nc"), (" a\n\n\n\n b ", "a\n\nb"), ("a\u00a0b\x00\u200b", "a b")],
)
def test_cleaning(text, cleaned):
    assert clean_text(text) == cleaned
