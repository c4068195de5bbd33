"""Shards are what a plain loop with tiktoken makes, however many processes, kills and resumes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.commandline import errors_for_people
from shared.data import shards
from shared.data.shards import build, open_shards
from shared.runtime import ROOT
from shared.tokenizers.bpe import END_OF_TEXT
from tests.data.helpers import KEPT, TOKENIZER, WANTED, expected, shards_in, written


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_cut_twice_at_any_moment_and_run_again_is_the_same_to_the_byte(config, tmp_path, monkeypatch):
    config = replace(config, shard_tokens=12_000)
    with monkeypatch.context() as patch:
        renames = at_rename(patch, 0)
        build(config, TOKENIZER)
    whole = written(config.out)
    assert len(renames) > len(shards_in(config.out)) > 2  # moments enough to be cut at
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
from shared.data import shards
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


@pytest.mark.slow
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


def test_a_process_is_handed_so_many_characters_and_no_more_is_read_for_them():
    read = []

    def documents():
        for row in range(1, 10**6):
            read.append(row)
            yield row, "x" * 9_999

    groups = shards._groups(documents())
    for number in range(1, 4):
        group = next(groups)
        assert shards.GROUP <= sum(len(text) + 1 for _, text in group) < shards.GROUP + 10_000
        assert group[-1][0] == len(read) == number * len(group)


def test_every_group_is_as_short_as_it_can_be():
    """Without its last document each would be too small, the second as the first."""
    lengths = [shards.GROUP - 2, 0, shards.GROUP - 2, 0, 7]
    groups = list(shards._groups(enumerate("x" * n for n in lengths)))
    assert [[row for row, _ in group] for group in groups] == [[0, 1], [2, 3], [4]]
