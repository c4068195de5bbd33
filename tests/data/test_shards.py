"""shared/data/shards.py and shared/data/sources.py: the shards are what a plain loop with tiktoken makes,
however many processes, kills and resumes.
"""

import glob
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tracemalloc
import unicodedata
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.commandline import errors_for_people, parse_args
from shared.data import shards
from shared.data.corpus import batches, fixed_windows
from shared.data.shards import ShardConfig, ShardedTokens, build, main, open_shards, token_count
from shared.data.sources import clean, describe_source, stream_documents
from shared.evaluation import evaluate
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer, CharTokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from shared.training import TrainConfig, Trainer

DRAW = random.Random(5)
WORDS = [
    "the",
    "lobster",
    "Zürich",
    "naïve",
    "数学",
    "😀",
    "cafe\u0301",
    END_OF_TEXT,
    "3.14",
    "a\x00b",
    "x\tY",
    "end \r\n",
    "\n\n\n\n",
]
LONG = [" ".join(DRAW.choices(WORDS, k=DRAW.choice([1, 5, 20, 60, 300]))) for _ in range(300)]
DOCUMENTS = ["", "tiny", *LONG, "", "last but long enough to be kept, surely"]
KEPT = [text for document in DOCUMENTS if len(text := clean(document)) >= 32]
TOKENIZER = BPETokenizer.train(DOCUMENTS, 340, special_tokens=(END_OF_TEXT,))
OTHER = BPETokenizer.train(DOCUMENTS, 340, special_tokens=(END_OF_TEXT, "<|x|>"))


def expected(
    val_tokens: int, shard_tokens: int, tokens: float = float("inf"), tokenizer: BPETokenizer = TOKENIZER
) -> dict[str, bytes]:
    """The files, by a single loop over the clean documents, with tiktoken's merging and our ranks."""
    ranks = {token: i for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()}
    oracle = tiktoken.Encoding(
        "ours", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens
    )
    parts, wanted, trained = [[]], val_tokens, 0
    for text in KEPT:
        if len(parts[-1]) >= wanted:
            trained += len(parts[-1]) if len(parts) > 1 else 0
            wanted = min(shard_tokens, tokens - trained)
            parts.append([])
        if wanted <= 0:
            break
        parts[-1] += [oracle.eot_token, *oracle.encode_ordinary(text)]
    names = ["val_00000.bin", *(f"train_{i:05d}.bin" for i in range(len(parts)))]
    return {name: np.array(part, "<u2").tobytes() for name, part in zip(names, parts) if part}


WANTED = expected(2000, 5000)


def written(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shards_in(folder: str | Path) -> dict[str, bytes]:
    return {name: content for name, content in written(folder).items() if name.endswith(".bin")}


def as_jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


@pytest.fixture
def config(tmp_path) -> ShardConfig:
    (tmp_path / "documents.jsonl").write_text(as_jsonl(DOCUMENTS), encoding="utf-8")
    return ShardConfig(
        str(tmp_path / "documents.jsonl"),
        str(tmp_path / "out"),
        val_tokens=2000,
        shard_tokens=5000,
        workers=1,
    )


@pytest.fixture
def built(config) -> ShardConfig:
    build(config, TOKENIZER)
    return config


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
    kept = lambda s: [
        c
        for c in unicodedata.normalize("NFD", s)
        if not c.isspace() and unicodedata.category(c) != "Cc" and c != "\ufeff"
    ]
    assert sorted(kept(once)) == sorted(kept(text))


def test_the_shards_are_what_a_loop_with_tiktoken_makes_and_the_index_counts_them(config, monkeypatch):
    index = build(config, TOKENIZER)
    assert len(WANTED) > 5 and shards_in(config.out) == WANTED
    assert json.loads((Path(config.out) / "shards.json").read_text()) == index
    assert sum(s["documents"] for s in index["shards"]) == len(KEPT)
    assert sum(s["text_bytes"] for s in index["shards"]) == sum(len(text.encode()) for text in KEPT)
    for shard in index["shards"]:
        ids, end = np.frombuffer(WANTED[shard["file"]], "<u2"), TOKENIZER.special_tokens[END_OF_TEXT]
        assert shard["tokens"] == len(ids) and shard["documents"] == (ids == end).sum() and ids[0] == end
        assert sum(len(TOKENIZER.vocab[i]) for i in ids.tolist()) == shard["text_bytes"] + shard[
            "documents"
        ] * len(END_OF_TEXT)
        assert shard["sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
    assert index["tokenizer"] == {
        "kind": "BPETokenizer",
        "fingerprint": TOKENIZER.fingerprint,
        "vocab_size": 340,
    }
    assert index["source"] == {
        "name": "documents.jsonl",
        "kind": "json",
        "files": {".": Path(config.source).stat().st_size},
    }
    monkeypatch.setattr(shards, "stream_documents", None)  # what is finished is not read again
    assert build(config, TOKENIZER) == index


@pytest.mark.parametrize("tokens", [1, 5000, 12_345])
def test_tokens_is_where_the_training_split_ends_with_a_whole_document(config, tokens):
    build(replace(config, tokens=tokens), TOKENIZER)
    assert shards_in(config.out) == expected(2000, 5000, tokens) != WANTED


def test_the_default_tokenizer_is_gpt2s(config):
    build(config)
    tokenizer = open_shards(config.out).tokenizer
    assert (tokenizer.vocab_size, tokenizer.special_tokens) == (50257, {END_OF_TEXT: 50256})
    assert shards_in(config.out) == expected(2000, 5000, tokenizer=tokenizer)


class Killed(BaseException):
    """Ends a run where no `except Exception` sees it."""


def at_rename(monkeypatch, number: int) -> list[tuple]:
    """Ends the run before its rename of that number; 0 only lists them."""
    rename, renames = os.replace, []

    def cut(*args):
        renames.append(args)
        if len(renames) == number:
            raise Killed
        rename(*args)

    monkeypatch.setattr(os, "replace", cut)
    return renames


def test_a_run_cut_twice_at_any_moment_and_run_again_is_the_same_to_the_byte(config, tmp_path, monkeypatch):
    config = replace(config, shard_tokens=12_000)
    with monkeypatch.context() as patch:
        renames = at_rename(patch, 0)
        build(config, TOKENIZER)
    whole = written(config.out)
    assert (
        len(renames) == 3 + 2 * len(shards_in(config.out)) >= 11
    )  # tokenizer and index, a shard and the index, the index at the end
    for number in range(1, len(renames) + 1):
        again = replace(config, out=str(tmp_path / str(number)))
        for cut in (number, 2):
            with monkeypatch.context() as patch, pytest.raises(Killed) if cut == number else suppress(Killed):
                at_rename(patch, cut)
                build(again, TOKENIZER)
        build(again, TOKENIZER)
        assert written(again.out) == whole


KILLED = """
import os, signal, sys
from shared import shards
from shared.commandline import parse_args
rename, count = os.replace, []
def kill(*args):
    count.append(args)
    if len(count) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*args)
os.replace, shards.GROUP = kill, 2000
shards.main(parse_args(shards.ShardConfig, sys.argv[1:]))
"""


def test_sigkill_takes_the_processes_along_and_several_go_on_to_the_same_end(config, tmp_path, monkeypatch):
    build(config, TOKENIZER)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    again = replace(config, out=str(tmp_path / "again"), workers=2)
    flags = [
        "--source",
        again.source,
        "--out",
        again.out,
        "--val-tokens",
        "2K",
        "--shard-tokens",
        "5K",
        "--workers",
        "2",
    ]
    command = [sys.executable, "-c", KILLED, *flags, "--tokenizer", tmp_path / "tokenizer.json"]
    # The processes have the same pipes: this returns when the last of them is gone.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    left = written(again.out)
    assert done.returncode == -signal.SIGKILL and b"Traceback" not in done.stderr
    assert (
        len([name for name in left if name.endswith(".tmp")]) == 1
    )  # the index that was about to name the second shard
    assert len(json.loads(left["shards.json"])["shards"]) == 1 and "train_00000.bin" in left
    (tmp_path / "again" / "train_00000.bin").write_bytes(b"the index does not name it, so it does not count")
    monkeypatch.setattr(shards, "GROUP", 2000)  # many groups, so that processes overtake each other
    build(again, TOKENIZER)
    assert written(again.out) == written(config.out)


def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on_when_there_is_room(
    config, monkeypatch, capsys
):
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 7:
            raise OSError(28, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped, errors_for_people():
        patch.setattr(os, "fsync", full)
        build(config, TOKENIZER)
    assert stopped.value.code == 3 and "the disk is full" in capsys.readouterr().err
    assert sorted(written(config.out)) == [
        "shards.json",
        "tokenizer.json",
        "train_00000.bin",
        "val_00000.bin",
    ]
    build(config, TOKENIZER)
    assert shards_in(config.out) == WANTED


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
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("surrogate.jsonl", b'{"text": "a \\ud800 b"}\n'),
        ("other.jsonl", b'{"txt": "a"}\n'),
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
    with pytest.raises(ValueError, match="row 1 is 0, which is not a text: choose another --column"):
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


def test_a_tokenizer_must_have_end_of_text_and_fit_in_uint16(config):
    for tokenizer in (CharTokenizer("abc"), BPETokenizer.train("abc", 256)):
        with pytest.raises(
            ValueError, match=re.escape(f"{type(tokenizer).__name__}) has no special token {END_OF_TEXT}")
        ):
            build(config, tokenizer)
    pairs = [(bytes([i // 256]), bytes([i % 256])) for i in range(2**16 - 256)]
    with pytest.raises(
        ValueError,
        match=r"vocabulary of 65,537 tokens does not fit in uint16: at most 65,536 do \(ids 0 to 65,535\)",
    ):
        build(config, BPETokenizer(pairs, special_tokens=(END_OF_TEXT,)))
    assert not Path(config.out).exists()
    build(config, BPETokenizer(pairs[1:], special_tokens=(END_OF_TEXT,)))
    assert open_shards(config.out).val[0] == 65535


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
    info = lambda api, name, **options: huggingface_hub.hf_api.DatasetInfo(
        id=name, sha=commit if options["revision"] == "main" else "?", tags=[]
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(shards, "GROUP", 2000)
    config = replace(config, source="fineweb-edu")
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"fineweb-edu cannot be read \(ConnectionError: gone\): run again"),
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


def test_without_a_network_or_without_datasets_one_line_says_what_to_do(config, monkeypatch, capsys):
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
    with pytest.raises(ValueError, match="needs the package datasets: pip install datasets"):
        build(config, TOKENIZER)


@given(st.data())
def test_sharded_tokens_are_indexed_as_one_array_is(data):
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    whole = np.arange(sum(sizes), dtype=np.uint16)
    tokens = ShardedTokens(np.split(whole, np.cumsum(sizes)[:-1]))
    some = slice(
        *data.draw(st.tuples(*[st.none() | st.integers(-20, 20)] * 2, st.sampled_from([None, 1, 2, -1, -3])))
    )
    assert len(tokens) == len(whole) and list(tokens) == list(whole)
    assert tokens[some].tolist() == whole[some].tolist() and tokens[some].dtype == np.uint16
    if len(whole):
        at = st.integers(-len(whole), len(whole) - 1)
        rows = np.array(data.draw(st.lists(st.tuples(at, at, at), max_size=4)), dtype=np.int64).reshape(-1, 3)
        assert (
            np.array_equal(tokens[rows], whole[rows])
            and tokens[rows].dtype == np.uint16
            and tokens[-1] == whole[-1]
        )
    for outside in (len(whole), -len(whole) - 1, [0, len(whole)]):
        with pytest.raises(IndexError, match=f"there are {len(whole)} tokens"):
            tokens[outside]
    for index in (whole[:1] > 2, 1.0, "a"):
        with pytest.raises(IndexError, match="whole numbers"):
            tokens[index]


@pytest.mark.parametrize("block_size", [7, 6000])  # the second is longer than a shard
def test_windows_batches_and_evaluation_are_those_of_one_array(built, block_size):
    corpus = open_shards(built.out, TOKENIZER, verify=True)
    assert TOKENIZER.decode([*corpus.val[:].tolist(), *corpus.train[:].tolist()]) == "".join(
        END_OF_TEXT + text for text in KEPT
    )
    whole = np.concatenate(
        [
            np.frombuffer(content, "<u2")
            for name, content in sorted(WANTED.items())
            if name.startswith("train")
        ]
    )
    for one, other in zip(fixed_windows(corpus.train, block_size), fixed_windows(whole, block_size)):
        assert torch.equal(one, other)
    for rank in range(2):
        ours = batches(corpus.train, block_size, 4, seed=3, start_step=5, rank=rank, world_size=2)
        for (x, y), (x_one, y_one) in islice(
            zip(ours, batches(whole, block_size, 4, seed=3, start_step=5)), 30
        ):
            assert torch.equal(x, x_one[rank::2]) and torch.equal(y, y_one[rank::2])
    bigram = torch.nn.Embedding(340, 340)
    assert evaluate(bigram, corpus.train, block_size, corpus.token_bytes) == evaluate(
        bigram, whole, block_size, corpus.token_bytes
    )


def test_a_training_run_on_shards_that_was_cut_goes_on_as_one_on_an_array_in_one_go(
    built, tmp_path, monkeypatch
):
    corpus = open_shards(built.out)
    config = TrainConfig(
        steps=12, batch_size=8, block_size=16, lr=1e-2, log_every=1, eval_every=6, checkpoint_every=5
    )

    def trainer(data, checkpoints=None):
        torch.manual_seed(0)
        return Trainer(
            GPT(GPTConfig(vocab_size=340, block_size=16, n_layer=1, n_head=2, n_embd=16)),
            data,
            config,
            checkpoints=checkpoints,
        )

    whole = trainer(replace(corpus, train=corpus.train[:], val=corpus.val[:]))
    whole.fit()
    with monkeypatch.context() as patch, pytest.raises(AttributeError, match="_evaluate"):
        patch.delattr(Trainer, "_evaluate")  # dies at step 6, a step after its checkpoint
        trainer(corpus, tmp_path / "run").fit()
    resumed = trainer(corpus, tmp_path / "run")
    resumed.fit(resume=True)
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in t.history if row["step"] > 5]
        for t in (resumed, whole)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 9


def test_a_large_shard_is_mapped_and_not_read(built):
    index, path = (
        json.loads((Path(built.out) / "shards.json").read_text()),
        Path(built.out) / "train_00000.bin",
    )
    os.truncate(path, 1 << 26)
    index["shards"][1]["tokens"] = 1 << 25
    (Path(built.out) / "shards.json").write_text(json.dumps(index))
    tracemalloc.start()
    x, _ = next(batches(open_shards(built.out).train, 1024, 4, seed=0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.shape == (4, 1024) and peak < 1 << 24
    with pytest.raises(ValueError, match="read-only"):
        open_shards(built.out).train.parts[0][0] = 1


def test_shards_of_another_tokenizer_are_refused(built):
    with pytest.raises(
        ValueError, match=r"made with another tokenizer \(BPETokenizer, 340 tokens\) than the one in use"
    ):
        open_shards(built.out, OTHER)
    OTHER.save(Path(built.out) / "tokenizer.json")
    with pytest.raises(ValueError, match="made with another tokenizer .* than the one in .*tokenizer.json"):
        open_shards(built.out)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train_00001.bin", lambda old: bytes([old[0] ^ 1]) + old[1:]),
        ("train_00001.bin", lambda old: old[:-2]),
        ("train_00001.bin", None),
        ("shards.json", lambda old: old.replace(b'"train_00000.bin"', b'"../documents.jsonl"')),
        ("shards.json", lambda old: b'{"format": 1}'),
        ("shards.json", lambda old: old.replace(b'"format": 1', b'"format": 2')),
        ("shards.json", lambda old: old[:-3]),
        ("shards.json", None),
    ],
)
def test_a_damaged_folder_is_refused_and_left_as_it_is(built, name, damage):
    path = Path(built.out) / name
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    left = written(built.out)
    for act in (lambda: open_shards(built.out, verify=True), lambda: build(built, TOKENIZER)):
        with pytest.raises(
            ValueError,
            match=(
                r"train_00001.bin is missing, cut or damaged|no shards in .*: shards.json is|.bin files but"
                r" no shards.json"
            ),
        ):
            act()
    assert written(built.out) == left


def test_settings_that_will_not_do_are_refused():
    with pytest.raises(
        ValueError,
        match=(
            "tokens=0: must be at least 1; workers=-1: must be at least 1; form='books': must be documents or"
            " wiki"
        ),
    ):
        ShardConfig("a", "b", tokens=0, workers=-1, form="books")
    for text in ("many", "10X", "-5", "1M2", "", "1e6", "_"):
        with pytest.raises(ValueError, match="is not a number of tokens: write 250000, 250K, 10M or 1.5B"):
            token_count(text)


def test_it_shows_tokens_per_second_and_says_what_is_there(config, tmp_path, monkeypatch, capsys):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    flags = [
        "--source",
        config.source,
        "--out",
        config.out,
        "--val-tokens",
        "2K",
        "--shard-tokens",
        "0.005M",
        "--workers",
        "1",
    ]
    main(parse_args(ShardConfig, [*flags, "--tokenizer", str(tmp_path / "tokenizer.json")]))
    said, total = capsys.readouterr(), sum(map(len, WANTED.values())) // 2
    assert shards_in(config.out) == WANTED
    assert re.search(rf"documents.jsonl: {total / 1000:.1f}k tokens \[.* tokens/s\]", said.err)
    assert (
        f"train: {total - len(WANTED['val_00000.bin']) // 2:,} tokens of " in said.out
        and f"open_shards({config.out!r})" in said.out
    )
