"""What cannot become shards is named in one line."""

import json
import os
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.commandline import errors_for_people
from shared.data import shards
from shared.data.shards import build, open_shards
from shared.data.sources import describe_source, stream_documents
from shared.tokenizers import BPETokenizer, CharTokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from tests.data.helpers import DOCUMENTS, OTHER, TOKENIZER, WANTED, as_jsonl, shards_in


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"val_tokens": 3000}, "settings: val_tokens"),
        ({"tokens": 9000}, "settings: tokens"),
        ({"form": "wikitext"}, "settings: form"),
        ("a shorter file", "source: files"),
        ("another tokenizer", "tokenizer: fingerprint"),
    ],
)
def test_a_folder_begun_otherwise_is_not_gone_on_with(built, change, named):
    if change == "a shorter file":
        os.truncate(built.source, 1000)
    with pytest.raises(
        ValueError,
        match=f"begun with another source, tokenizer or settings .*{named}.*: choose another --out",
    ):
        build(
            built if isinstance(change, str) else replace(built, **change),
            OTHER if change == "another tokenizer" else TOKENIZER,
        )
    assert shards_in(built.out) == WANTED


@pytest.mark.parametrize(("kind", "row"), [("jsonl", '{"text": "%s"}\n'), ("txt", "%s\n")])
def test_text_that_is_not_utf8_is_named_with_file_and_offset(config, tmp_path, kind, row):
    good, path = (row % "Good enough to be kept, I should say").encode(), tmp_path / "source" / f"b.{kind}"
    path.parent.mkdir()
    (path.parent / f"a.{kind}").write_bytes(good)
    path.write_bytes(good * 3 + good.replace(b"Good", b"n\xe9") + good)
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"{path} is not UTF-8 text: byte 0xe9 at offset {3 * len(good) + good.index(b'Good') + 1}"
        ),
    ):
        build(replace(config, source=str(path.parent), val_tokens=1), TOKENIZER)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("not.parquet", b"PAR1 it is not PAR1"),
        ("latin.parquet", pa.array([b"abc", b"n\xe9e"]).view(pa.string())),
    ],
)
def test_what_datasets_cannot_read_is_one_line(config, tmp_path, name, content):
    path = tmp_path / name
    (
        path.write_bytes(content)
        if isinstance(content, bytes)
        else pq.write_table(pa.table({"text": content}), path)
    )
    with pytest.raises(ValueError, match=re.escape(f"--source {path} cannot be read (")) as error:
        build(replace(config, source=str(path)), TOKENIZER)
    assert "\n" not in str(error.value) and ("byte 0xe9" in str(error.value)) == (name == "latin.parquet")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "is no JSON (Expecting value"),
        ("[" * 100_000, "is no JSON (maximum recursion depth exceeded"),
        ('["a"]', "is no object with the field 'text': mend or delete it"),
        ('{"txt": "a"}', "has no field 'text' but 'txt': choose another --column, or delete the line"),
        ('{"text": 7}', "'text' is 7, which is not a text: choose another --column, or delete the line"),
        ('{"text": true}', "'text' is True, which is not a text"),
        ('{"text": ["a", "b"]}', "'text' is ['a', 'b'], which is not a text"),
        ('{"text": {"a": "b"}}', "'text' is {'a': 'b'}, which is not a text"),
        (r'{"text": "a \ud800 b"}', "'text' has half a surrogate pair, which is no character"),
    ],
)
def test_an_odd_row_is_named_by_its_line(config, tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\ufeff{as_jsonl(['one', 'two'])}\n{line}\n{as_jsonl(['three'])}", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 4") + ":? " + re.escape(message)):
        build(replace(config, source=str(path)), TOKENIZER)


def test_rows_beside_an_odd_one_are_read_as_they_are(tmp_path):
    """Where another field differs from row to row in its type, which `datasets` would write as JSON."""
    texts = ['He said "go".\nThen a second line, café.', "", "C:\\new \u2028 end"]
    rows = [{"text": texts[0], "id": 1}, {"id": [2], "text": None}, {"text": texts[2], "id": {"a": "b"}}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = describe_source(str(path))
    assert [text for _, text in stream_documents(str(path), known, "text", False, skip=0)] == texts


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "neither a file, nor a folder, nor one of fineweb-edu, openwebtext, wikitext-103"),
        (["a.csv"], "found: none"),
        (
            ["a.txt", "b.jsonl"],
            "give files that are not empty, of one kind of .jsonl, .parquet, .txt; found: a.txt, b.jsonl",
        ),
    ],
)
def test_a_source_that_is_none_is_refused_and_the_folder_can_be_begun_with_another(
    config, tmp_path, names, message
):
    with pytest.raises(ValueError, match="line 1: 'id' is 0, which is not a text: choose another --column"):
        build(replace(config, column="id"), TOKENIZER)
    for name in names or ():
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / "empty.parquet").touch()
        (tmp_path / "source" / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        build(replace(config, source=str(tmp_path / "source")), TOKENIZER)
    build(config, TOKENIZER)
    assert shards_in(config.out) == WANTED


@pytest.mark.parametrize(
    "val_tokens", [10, 10**6]
)  # one document is the whole validation split; not even that is filled
def test_a_source_with_nothing_left_to_train_on_is_refused(config, tmp_path, val_tokens):
    (tmp_path / "few.jsonl").write_text(as_jsonl(["Only this one is long enough to be kept.", "tiny"]))
    few = replace(config, source=str(tmp_path / "few.jsonl"), val_tokens=val_tokens)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"is too short: after val_tokens={few.val_tokens} nothing is left to train on"
        ):
            build(few, TOKENIZER)
    with pytest.raises(ValueError, match="not finished"):
        open_shards(few.out)


def test_a_tokenizer_must_have_end_of_text(config):
    for tokenizer in (CharTokenizer("abc"), BPETokenizer.train("abc", 256)):
        with pytest.raises(
            ValueError, match=re.escape(f"{type(tokenizer).__name__}) has no special token {END_OF_TEXT}")
        ):
            build(config, tokenizer)
    assert not Path(config.out).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("last", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_ids_take_two_bytes_where_they_fit_and_four_where_not(built, tmp_path, last, dtype):
    config = replace(built, out=str(tmp_path / "wide"))
    pairs = [(bytes([i // 256]), bytes([i % 256])) for i in range(last - 256)]
    tokenizer = BPETokenizer(pairs, special_tokens=(END_OF_TEXT,))
    build(config, tokenizer)
    one, other = open_shards(config.out).val, open_shards(built.out).val
    assert one[0] == last and one[:].dtype == dtype
    assert TOKENIZER.decode(other[:].tolist()).startswith(tokenizer.decode(one[:300].tolist()))
    before = (Path(config.out) / "val_00000.bin").read_bytes()
    assert build(config, tokenizer)["complete"]
    assert (Path(config.out) / "val_00000.bin").read_bytes() == before


def test_a_run_that_lost_the_hub_goes_on_with_the_commit_it_was_begun_with(config, tmp_path, monkeypatch):
    pq.write_table(
        pa.table({"text": DOCUMENTS, "url": ["x"] * len(DOCUMENTS)}),
        tmp_path / "hub.parquet",
        row_group_size=50,
    )
    load, read, asked, commit = datasets.load_dataset, datasets.IterableDataset.iter, [], "c0ffee"

    def load_dataset(kind, data_files, **options):
        asked.append(data_files)
        return load(kind, data_files=str(tmp_path / "hub.parquet"), **options)

    def lost(self, size):
        yield from islice(read(self, 100), 2)
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def info(api, name, **options):
        sha = commit if options["revision"] == "main" else "?"
        return huggingface_hub.hf_api.DatasetInfo(id=name, sha=sha, tags=[])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(shards, "GROUP", 2000)
    config = replace(config, source="fineweb-edu")
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            ValueError,
            match=r"fineweb-edu cannot be read \(no connection; ConnectionError: gone\): run again",
        ),
    ):
        patch.setattr(datasets.IterableDataset, "iter", lost)
        build(config, TOKENIZER)
    assert 1 < len(shards_in(config.out)) < len(WANTED)
    commit = "decade"  # the data set has changed since
    index = build(config, TOKENIZER)
    assert (
        shards_in(config.out) == WANTED
        and asked == ["hf://datasets/HuggingFaceFW/fineweb-edu@c0ffee/sample/10BT/*.parquet"] * 2
    )
    assert index["source"]["revision"] == "c0ffee" and open_shards(config.out).name == "fineweb-edu"


def test_without_a_network_or_without_datasets_one_line_says_what_to_do(
    config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stopped, errors_for_people():
        build(replace(config, source="wikitext-103"), TOKENIZER)
    said = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and said.count("\n") == 1
        and said.startswith("error: --source wikitext-103 cannot be read (")
    )
    assert (
        said.endswith("give a local file or folder (.jsonl, .parquet, .txt): --source PATH\n")
        and not Path(config.out).exists()
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r'datasets is not installed: pip install "llm-weeks\[data\]"'):
        build(replace(config, source=str(tmp_path / "a.parquet")), TOKENIZER)
