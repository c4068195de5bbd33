"""shared/data/sources.py: every form of source is read whole."""

import glob
import unicodedata
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data.sources import clean, describe_source, stream_documents
from shared.tokenizers.bpe import END_OF_TEXT
from tests.data.helpers import DOCUMENTS, KEPT, as_jsonl

WIKI = [
    "",
    " = First one = \n",
    "",
    " It weighs 0 @.@ 7 – 2 @.@ 2 kg ( 1 @.@ 5 lb ) , or 1 @,@ 000 g . \n",
    "",
    " = = Part @-@ time = = \n",
    "",
    ' " I don \'t " , he said ; it \'s " red ( now ) " . \n',
    " = a line after text \n",
    "",
    " = Second = \n",
    "",
    ' x = y and ... a " quote left open \n',
    " = Third = \n",
    "",
    " = Y = \n",
    "",
    " The last one of them , long enough too . \n",
]
ARTICLES = [
    (
        "= First one =\n\nIt weighs 0.7 – 2.2 kg (1.5 lb), or 1,000 g.\n\n== Part-time ==\n\n"
        '"I don\'t", he said; it\'s "red (now)".\n= a line after text'
    ),
    '= Second =\n\nx = y and ... a " quote left open\n= Third =',
    "= Y =\n\nThe last one of them, long enough too.",
]


def write_source(folder: Path, form: str) -> list[str]:
    """A folder of that form; the documents that are to be read from it, in their order."""
    folder.mkdir()
    if form == "jsonl":
        for name, part in (
            ("b", DOCUMENTS[200:]),
            ("a", DOCUMENTS[:100]),
            ("none", []),
            ("b.1", DOCUMENTS[100:200]),
        ):
            (folder / f"{name}.jsonl").write_text(as_jsonl(part), encoding="utf-8")
    elif form == "parquet":
        texts = [t for text in DOCUMENTS for t in (None, text)]
        pq.write_table(
            pa.table({"id": range(len(texts)), "text": texts}), folder / "a.parquet", row_group_size=17
        )
    elif form == "txt":
        (folder / "README.md").write_text("not a document")
        (folder / "a.txt").write_bytes(f"\n{END_OF_TEXT}\n".join(DOCUMENTS[:200]).encode())
        for i, text in enumerate(DOCUMENTS[200:]):
            (folder / f"b{i:05d}.txt").write_bytes(text.encode())
    elif form == "wiki parquet":
        pq.write_table(pa.table({"text": WIKI}), folder / "a.parquet")
    else:
        (folder / "a.txt").write_bytes("".join(row or " \n" for row in WIKI).encode())
    return ARTICLES if form.startswith("wiki") else KEPT


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "parquet", "txt", "wiki parquet", "wiki txt"])
def test_every_form_of_source_is_read_whole_and_from_the_end_of_any_document_on(tmp_path, form):
    source, wiki = tmp_path / "source [1]", form.startswith("wiki")  # signs that file patterns are made of
    wanted = write_source(source, form)
    known = describe_source(str(source))
    whole = list(stream_documents(str(source), known, "text", wiki, skip=0))
    assert [text for _, document in whole if len(text := clean(document, wiki)) >= 32] == wanted
    if form in ("jsonl", "parquet"):  # as `datasets` reads them when it does not stream
        files = [glob.escape(str(source / name)) for name in known["files"]]
        theirs = datasets.load_dataset(
            known["kind"], data_files={"train": files}, split="train", cache_dir=str(tmp_path / "cache")
        )
        assert [text for _, text in whole] == [text or "" for text in theirs["text"]]
    for at in (0, 1, 2, len(whole) // 2, len(whole) - 1):
        rest = stream_documents(str(source), known, "text", wiki, skip=whole[at][0])
        assert [d for d in rest if d[1]] == [d for d in whole[at + 1 :] if d[1]]


@given(
    st.text(
        st.characters(codec="utf-8") | st.sampled_from("\r\n\t \x00\x0b\x85\u00a0\ufeffe\u0301"), max_size=60
    )
)
def test_cleaning_does_what_it_says_once_and_for_all(text):
    once = clean(text)
    assert once == clean(once) == once.strip() == unicodedata.normalize("NFC", once) and "\n\n\n" not in once
    assert all(line == line.rstrip() for line in once.split("\n"))
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" or c == "\ufeff" for c in once)

    def kept(s):
        characters = unicodedata.normalize("NFD", s)
        return [
            c for c in characters if not c.isspace() and unicodedata.category(c) != "Cc" and c != "\ufeff"
        ]

    assert sorted(kept(once)) == sorted(kept(text))


@pytest.mark.parametrize("count", range(1, 9))
def test_at_most_one_empty_line_is_kept_in_a_row(count):
    for end in ("\n", "\r\n", " \n", "\t\r"):
        assert clean("a" + end * count + "b") == "a" + "\n" * min(count, 2) + "b"
