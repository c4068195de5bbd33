"""Shards are read as one array would be."""

import json
import os
import re
import sys
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.commandline import parse_args
from shared.data.corpus import batches, fixed_windows
from shared.data.shards import ShardConfig, ShardedTokens, build, main, open_shards, token_count
from shared.evaluation import evaluate
from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers.bpe import END_OF_TEXT
from shared.training import Callback, TrainConfig, Trainer
from tests.data.helpers import KEPT, OTHER, TOKENIZER, WANTED, shards_in, written


@pytest.mark.slow
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


def test_shards_are_known_by_their_sums_and_not_read(built, tmp_path, monkeypatch):
    corpus = open_shards(built.out, TOKENIZER)
    fewer = replace(built, out=str(tmp_path / "fewer"), tokens=6000)
    build(fewer, TOKENIZER)
    monkeypatch.setattr(ShardedTokens, "__getitem__", None)
    one, other = corpus.fingerprints, open_shards(fewer.out, TOKENIZER).fingerprints
    assert one == open_shards(built.out, TOKENIZER).fingerprints
    assert one["held-out data"] == other["held-out data"] != one["training data"]
    assert one["training data"] != other["training data"]


@pytest.mark.slow
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


class DiesAtItsEvaluation(Callback):
    def on_evaluation(self, trainer):
        raise RuntimeError(f"step {trainer.step}")


def test_a_training_run_on_shards_that_was_cut_goes_on_as_one_on_an_array_in_one_go(built, tmp_path):
    corpus = open_shards(built.out)
    config = TrainConfig(
        steps=12, batch_size=8, block_size=16, lr=1e-2, log_every=1, eval_every=6, checkpoint_every=5
    )

    def trainer(data, checkpoints=None, callbacks=()):
        torch.manual_seed(0)
        return Trainer(
            GPT(GPTConfig(vocab_size=340, block_size=16, n_layer=1, n_head=2, n_embd=16)),
            data,
            config,
            checkpoints=checkpoints,
            callbacks=callbacks,
        )

    whole = trainer(replace(corpus, train=corpus.train[:], val=corpus.val[:]))
    whole.fit()
    with pytest.raises(RuntimeError, match="step 6"):  # a step after its checkpoint
        trainer(corpus, tmp_path / "run", [DiesAtItsEvaluation()]).fit()
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
