"""shared/data/corpus.py: what a batch may and may not contain, and that it depends on seed and step alone."""

import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.data.corpus import (
    Corpus,
    EpochSampler,
    TokenDataset,
    batches,
    fixed_windows,
    load_corpus,
    read_text,
    split_text,
)
from shared.runtime import write_atomically
from shared.tokenizers import BPETokenizer, CharTokenizer
from tests.helpers import synthetic_text


def sampler(
    tokens: int, block_size: int, batch_size: int, seed: int = 0, start_step: int = 0
) -> EpochSampler:
    return EpochSampler(TokenDataset(np.arange(tokens), block_size), batch_size, seed, start_step)


# ---- text to tokens


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 1000, 12345])
def test_the_split_is_nine_tenths_and_the_rest_and_loses_nothing(length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    train, val = split_text(text)
    assert train + val == text and len(train) == length * 9 // 10


def test_a_corpus_is_the_text_again(corpus, tmp_path):
    text = (tmp_path / "text.txt").read_text()
    train, val = split_text(text)
    assert re.fullmatch(r"text\.txt-[0-9a-f]{8}", corpus.name)
    assert corpus.tokenizer.decode(corpus.train.tolist()) == train
    assert corpus.tokenizer.decode(corpus.val.tolist()) == val


def test_tokens_are_memory_mapped_uint16_and_read_only(corpus):
    for part in (corpus.train, corpus.val):
        assert isinstance(part, np.memmap) and part.dtype == np.uint16
        with pytest.raises(ValueError, match="read-only"):
            part[0] = 1


def test_a_second_call_only_maps_the_tokens(corpus, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("written again")

    monkeypatch.setattr("shared.data.corpus.write_with_sum", refuse)
    again = load_corpus(str(tmp_path / "text.txt"))
    assert np.array_equal(again.train, corpus.train)


def every_file(change):
    """Changes each of the files by themselves: their content to what `change` makes of it."""

    def damage(files):
        for file in files:
            file.write_bytes(change(file.read_bytes()))

    return damage


def exchange(files):
    first, second = (file.read_bytes() for file in files)
    files[0].write_bytes(second)
    files[1].write_bytes(first)


@pytest.mark.parametrize(
    "damage",
    [
        every_file(lambda content: content[: len(content) // 2]),
        every_file(lambda content: content[:-1]),
        every_file(lambda content: content[:7]),
        every_file(lambda content: b""),
        every_file(lambda content: bytes(len(content))),
        every_file(lambda content: b"\xff" * len(content)),
        every_file(lambda content: content[:-2] + b"\x30\x75"),  # one id, 30000
        every_file(lambda content: content[:-2] + bytes([content[-2] ^ 1, content[-1]])),
        every_file(lambda content: content + content[-2:]),
        exchange,
    ],
    ids=["half", "a byte less", "7 bytes", "empty", "zeros", "ones", "an id", "a bit", "longer", "exchanged"],
)
def test_tokens_that_were_damaged_on_disk_are_made_again_aloud(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "cache"))
    text = synthetic_text(300)
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    load_corpus(str(tmp_path / "t.txt"))
    files = sorted((tmp_path / "cache").rglob("*.bin"))
    assert len(files) == 2
    damage(files)
    said = []
    again = load_corpus(str(tmp_path / "t.txt"), say=said.append)
    parts = [again.tokenizer.decode(part.tolist()) for part in (again.train, again.val)]
    assert tuple(parts) == split_text(text)
    assert sorted(said) == [f"{file} is cut or damaged: these tokens are made again" for file in files]
    load_corpus(str(tmp_path / "t.txt"), say=said.append)
    assert len(said) == 2  # and are whole from then on


def test_another_tokenizer_gets_tokens_of_its_own(corpus, tmp_path):
    backwards = CharTokenizer(corpus.tokenizer.chars[::-1])
    other = load_corpus(str(tmp_path / "text.txt"), tokenizer=backwards)
    assert np.array_equal(other.train, corpus.tokenizer.vocab_size - 1 - corpus.train)


def test_token_bytes_count_utf8_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "cache"))
    text = "aä€😀" * 30
    write_atomically(tmp_path / "t.txt", text)
    corpus = load_corpus(str(tmp_path / "t.txt"))
    assert corpus.token_bytes.tolist() == [1, 2, 3, 4]
    assert corpus.token_bytes[
        torch.from_numpy(np.concatenate([corpus.train, corpus.val]).astype(np.int64))
    ].sum() == len(text.encode())


def test_a_mark_between_documents_is_no_text():
    tokenizer = BPETokenizer([(b"a", b"b")], special_tokens=["<|endoftext|>"])
    corpus = Corpus("marks", tokenizer, np.zeros(3, np.uint16), np.zeros(3, np.uint16))
    ids = tokenizer.encode("<|endoftext|>abba<|endoftext|>é", allowed_special="all")
    assert corpus.token_bytes[torch.tensor(ids)].sum() == len("abbaé".encode())


def test_a_text_too_short_for_the_block_size_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "cache"))
    (tmp_path / "t.txt").write_text("abcdefghij" * 10)
    assert len(load_corpus(str(tmp_path / "t.txt"), block_size=9).val) == 10
    with pytest.raises(
        ValueError, match="block_size=10 is too long for a split of 10 tokens: choose at most 9"
    ):
        load_corpus(str(tmp_path / "t.txt"), block_size=10)
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(ValueError, match="too long for a split of 0 tokens"):
        load_corpus(str(tmp_path / "t.txt"))


@pytest.mark.parametrize("content", [b"", b" \n\t "])
def test_an_empty_text_is_refused(tmp_path, content):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match="t.txt is empty"):
        read_text(str(tmp_path / "t.txt"))


def test_a_file_that_is_not_utf8_is_refused_with_the_place(tmp_path):
    (tmp_path / "t.txt").write_bytes("née".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text: byte 0xe9 at offset 1"):
        read_text(str(tmp_path / "t.txt"))


# ---- several files, folders, texts


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        write_atomically(folder / name, text)


def test_a_folder_is_read_whole_sorted_and_without_what_is_no_text(tmp_path):
    write_texts(
        tmp_path / "books",
        {
            "b.txt": "second\n",
            "a/z.md": "first",
            "c.TXT": "third",
            "d.jsonl": "{}",
            ".hidden.txt": "no",
            ".git/e.txt": "no",
        },
    )
    name, text = read_text(tmp_path / "books")
    assert text == "first\nsecond\nthird"
    assert re.fullmatch(r"books-[0-9a-f]{8}", name)
    (tmp_path / "books" / "b.txt").write_text("other\n")
    assert read_text(str(tmp_path / "books"))[0] != name


def test_several_files_are_read_in_their_order(tmp_path):
    write_texts(tmp_path, {"a.txt": "one", "b.txt": "two\n", "more/c.md": "three"})
    name, text = read_text([tmp_path / "b.txt", str(tmp_path / "a.txt"), tmp_path / "more"])
    assert text == "two\none\nthree" and re.fullmatch(r"b\.txt\+2-[0-9a-f]{8}", name)


def test_held_out_files_of_ones_own_are_what_is_measured_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "cache"))
    write_texts(tmp_path, {"train.txt": "abcd" * 20, "val.txt": "dcbae" * 4})
    corpus = load_corpus(tmp_path / "train.txt", val=tmp_path / "val.txt")
    assert corpus.tokenizer.decode(corpus.train.tolist()) == "abcd" * 20
    assert corpus.tokenizer.decode(corpus.val.tolist()) == "dcbae" * 4  # whose e is in the vocabulary


def test_texts_in_memory_are_what_the_same_files_are(corpus, tmp_path):
    text = (tmp_path / "text.txt").read_text()
    lines = text.splitlines(keepends=True)
    for texts in (text, lines, iter(lines)):
        other = Corpus.from_texts(texts, name="text.txt")
        assert other.name == corpus.name and other.fingerprints == corpus.fingerprints
    train, val = split_text(text)
    whole = Corpus.from_texts(train, [val], tokenizer=corpus.tokenizer)
    assert whole.fingerprints == corpus.fingerprints


def test_what_gives_no_text_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: a folder without a file that ends in \.txt or \.md"):
        read_text(tmp_path / "empty")
    with pytest.raises(ValueError, match="the list is empty"):
        read_text([])
    with pytest.raises(ValueError, match="texts is empty"):
        Corpus.from_texts([])
    with pytest.raises(ValueError, match="texts is empty"):
        Corpus.from_texts("some text", "")
    write_texts(tmp_path / "mixed", {"a.txt": "fine"})
    (tmp_path / "mixed" / "b.txt").write_bytes("née".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 text: byte 0xe9 at offset 1"):
        read_text(tmp_path / "mixed")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match="neither a file, a folder, nor one of tinyshakespeare, shakespeare",
    ):
        read_text("middlemarch")


@pytest.mark.parametrize(("last", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_ids_take_two_bytes_where_they_fit_and_four_where_not(last, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "cache"))
    characters = "".join(chr(0x10000 + i) for i in range(last + 1))
    (tmp_path / "t.txt").write_text(characters[-1] * 20, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "t.txt"), tokenizer=CharTokenizer(characters), block_size=1)
    assert set(corpus.train.tolist()) == set(corpus.val.tolist()) == {last} and corpus.train.dtype == dtype


# ---- windows


def test_targets_are_the_inputs_shifted_by_one():
    tokens = np.random.default_rng(0).integers(0, 100, 50).astype(np.uint16)
    dataset = TokenDataset(tokens, 7)
    assert len(dataset) == 43
    for i in range(len(dataset)):
        x, y = dataset[i]
        assert x.dtype == y.dtype == torch.int64
        assert x.tolist() == tokens[i : i + 7].tolist() and y.tolist() == tokens[i + 1 : i + 8].tolist()


def test_a_block_as_long_as_the_split_is_refused_and_one_less_is_not():
    with pytest.raises(
        ValueError, match="block_size=10 is too long for a split of 10 tokens: choose at most 9"
    ):
        TokenDataset(np.arange(10), 10)
    assert len(TokenDataset(np.arange(10), 9)) == 1
    with pytest.raises(ValueError, match="too long for a split of 0 tokens"):
        fixed_windows(np.zeros(0, dtype=np.uint16), 4)


# ---- batches


@pytest.mark.parametrize(
    ("tokens", "block_size", "batch_size"), [(1000, 8, 4), (1001, 7, 5), (257, 16, 1), (100, 3, 31)]
)
def test_an_epoch_takes_windows_side_by_side_each_once_in_a_new_order(tokens, block_size, batch_size):
    source = sampler(tokens, block_size, batch_size)
    stream = iter(source)
    epochs = []
    for _ in range(3):
        starts = np.concatenate(list(islice(stream, source.batches_per_epoch)))
        assert len(set(starts % block_size)) == 1 and len(set(starts)) == len(
            starts
        )  # so no two windows overlap
        assert starts.min() >= 0 and starts.max() + block_size < tokens
        fit = (tokens - 1 - starts[0] % block_size) // block_size
        assert (
            fit - batch_size - 1 < len(starts) <= fit
        )  # less than a batch, and the one that not every phase has, is left out
        assert (np.diff(starts) < 0).any() or len(starts) < 3
        epochs.append(starts)
    phases = [starts[0] % block_size for starts in epochs]
    orders = {tuple((starts - phase) // block_size) for starts, phase in zip(epochs, phases)}
    assert len(orders) == 3 or len(epochs[0]) < 3  # another order, not only another phase
    assert len(set(phases)) > 1


def test_over_the_epochs_every_phase_and_every_window_comes_up():
    stream = iter(sampler(60, 4, 2, seed=1))
    seen = {start for batch in islice(stream, 2000) for start in batch}
    assert seen == set(range(56))


@pytest.mark.parametrize("start_step", [1, 5, 24, 25, 26, 100])
@pytest.mark.parametrize("tokens", [813, 30])  # 25 batches an epoch, and too few tokens for a single one
def test_starting_at_a_step_equals_skipping_to_it(tokens, start_step):
    from_there = list(islice(iter(sampler(tokens, 8, 4, start_step=start_step)), 30))
    assert from_there == list(islice(iter(sampler(tokens, 8, 4)), start_step, start_step + 30))


def test_batches_depend_on_the_seed():
    first = list(islice(iter(sampler(813, 8, 4, seed=1)), 10))
    assert first == list(islice(iter(sampler(813, 8, 4, seed=1)), 10))
    assert first != list(islice(iter(sampler(813, 8, 4, seed=2)), 10))


@pytest.mark.parametrize("tokens", [9, 10, 30])
def test_tiny_data_is_drawn_at_random_and_stays_inside(tokens):
    source = sampler(tokens, 8, 4)
    drawn = np.array(list(islice(iter(source), 200)))
    assert source.batches_per_epoch == 0 and drawn.shape == (200, 4)
    assert set(drawn.flat) == set(range(tokens - 8))


def test_batches_hold_the_windows_that_the_sampler_chose():
    tokens = np.random.default_rng(0).integers(0, 50, 500).astype(np.uint16)
    starts = list(islice(iter(EpochSampler(TokenDataset(tokens, 6), 3, seed=4, start_step=7)), 20))
    for chosen, (x, y) in zip(starts, batches(tokens, 6, 3, seed=4, start_step=7)):
        assert x.tolist() == [tokens[s : s + 6].tolist() for s in chosen]
        assert y.tolist() == [tokens[s + 1 : s + 7].tolist() for s in chosen]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_parts_of_all_ranks_are_the_whole_batches(world_size):
    tokens = np.random.default_rng(0).integers(0, 50, 300).astype(np.uint16)
    parts = [
        batches(tokens, 6, 6, seed=4, start_step=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for whole, *shares in islice(zip(batches(tokens, 6, 6, seed=4, start_step=5), *parts), 20):
        for i in range(2):
            assert torch.equal(torch.stack([share[i] for share in shares], dim=1).flatten(0, 1), whole[i])


@pytest.mark.parametrize(
    ("rank", "world_size", "words"),
    [(2, 2, "rank=2"), (-1, 2, "rank=-1"), (0, 4, "batch_size=6 cannot be shared by 4")],
)
def test_a_rank_that_is_none_and_a_batch_that_cannot_be_shared_are_refused(rank, world_size, words):
    with pytest.raises(ValueError, match=words):
        batches(np.arange(100), 6, 6, seed=4, rank=rank, world_size=world_size)


def test_batches_leave_torchs_random_state_alone():
    """A resumed run makes its batches anew after restoring the random state: that must not move it."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(batches(np.arange(100), 6, 3, seed=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        sampler(100, 8, 0)


# ---- the windows a split is measured on


@pytest.mark.parametrize("tokens", [10, 11, 97, 100, 101])
def test_all_fixed_windows_together_are_the_split(tokens):
    x, y = fixed_windows(np.arange(tokens), 5)
    assert x.flatten().tolist() == list(range((tokens - 1) // 5 * 5))
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("limit", [1, 2, 7, 19, 20, 500])
def test_fewer_fixed_windows_are_spread_evenly_from_first_to_last(limit):
    x, _ = fixed_windows(np.arange(101), 5, limit)
    at = (x[:, 0] // 5).tolist()
    assert len(set(at)) == len(at) == min(limit, 20) and at[0] == 0
    if limit > 1:
        gaps = np.diff(at)
        assert at[-1] == 19 and gaps.max() - gaps.min() <= 1
