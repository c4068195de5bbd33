"""shared/retrieval/rag.py: what is put before the model fits and is whole; answers are streamed, end, cite,
and are withheld when they should be.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import load_smollm2
from shared.retrieval.documents import Chunk, chunk_documents, load_documents
from shared.retrieval.embedders import Embedder
from shared.retrieval.rag import ABSTENTION, RAG, REFUSAL, Reader, compose
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer

FARES = Chunk(
    "fares.md",
    "The ferry",
    ("Fares",),
    "A ticket for the ferry costs 9 tallies, and children under 12 pay 4 tallies.",
)
BOATS = Chunk("boats.md", "Boats", (), "Both boats are green.", page=2)
TOKENIZER = BPETokenizer.train(
    [FARES.passage, BOATS.passage, "Question: Answer: What does it cost?\n"], 290, special_tokens=("<|end|>",)
)
END = TOKENIZER.special_tokens["<|end|>"]


class Scripted(nn.Module):
    """Says `script` after "Answer:", whatever stands before it, token by token."""

    def __init__(self, script, block_size=300):
        super().__init__()
        self.config = SimpleNamespace(block_size=block_size)
        self.ids = TOKENIZER.encode(script) if isinstance(script, str) else script
        self.frame = TOKENIZER.encode("Answer:")
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = 0

    def forward(self, idx):
        self.calls += 1
        ids = idx[0].tolist()
        begin = next(at for at in range(len(ids), 0, -1) if ids[at - len(self.frame) : at] == self.frame)
        logits = torch.zeros(1, len(ids), TOKENIZER.vocab_size)
        for at in range(begin, len(ids) + 1):
            written = at - begin
            logits[0, at - 1, self.ids[written] if written < len(self.ids) else END] = 10
        return logits


# ---- the prompt


def test_a_prompt_is_the_passages_and_the_question():
    prompt = compose(" What does\nit cost? ", [FARES, BOATS], TOKENIZER, 300)
    assert (
        TOKENIZER.decode(prompt.ids)
        == f"The ferry > Fares\n{FARES.text}\n\nBoats\nBoth boats are green.\n\nQuestion: What does it"
        " cost?\nAnswer:"
    )
    assert prompt.chunks == (FARES, BOATS)


def test_a_documents_special_tokens_are_plain_text():
    assert END not in compose("Is it?", [replace(BOATS, text="Green.<|end|>Red.")], TOKENIZER, 300).ids


LONG = [
    Chunk(
        f"{n}.md",
        f"Title {n}",
        ("Part",),
        " ".join(f"ferry{n}{i}é😀" for i in range(n * 7)),
        windows=((0, 1),),
    )
    for n in range(1, 4)
]


@given(st.lists(st.sampled_from([FARES, BOATS, *LONG]), max_size=4), st.integers(25, 400))
def test_a_prompt_fits_its_budget_and_leaves_out_only_what_does_not(chunks, budget):
    prompt = compose("What?", chunks, TOKENIZER, budget)
    assert len(prompt.ids) <= budget
    text = TOKENIZER.decode(prompt.ids)
    assert text == "".join(f"{c.passage}\n\n" for c in prompt.chunks) + "Question: What?\nAnswer:"
    whole = [c == given for c, given in zip(prompt.chunks, chunks)]
    assert all(whole[:-1])  # only the last one may be cut
    assert all(given.text.startswith(c.text) and c.text for c, given in zip(prompt.chunks, chunks))
    if len(prompt.chunks) < len(chunks) and all(whole):  # not even a word more fitted
        following = chunks[len(whole)]
        word = replace(following, text=following.text.split()[0])
        more = TOKENIZER.encode(
            "".join(f"{c.passage}\n\n" for c in (*prompt.chunks, word)) + "Question: What?\nAnswer:"
        )
        assert len(more) > budget


def test_a_budget_that_is_just_enough_cuts_nothing():
    for chunks in ([], [BOATS], [FARES, BOATS]):
        whole = compose("What?", chunks, TOKENIZER, 10_000)
        assert whole.chunks == tuple(chunks)
        assert compose("What?", chunks, TOKENIZER, len(whole.ids)) == whole
        if chunks:
            cut = compose("What?", chunks, TOKENIZER, len(whole.ids) - 1)
            assert cut.chunks[-1].text == BOATS.text.rsplit(" ", 1)[0]
        else:
            with pytest.raises(ValueError, match="tokens with its frame"):
                compose("What?", chunks, TOKENIZER, len(whole.ids) - 1)


def test_a_passage_without_spaces_is_cut_and_not_left_out():
    ferry = Chunk("ferry.md", "渡轮", (), "末班渡轮晚上九点离开码头。" * 20)
    budget = len(compose("What?", [replace(ferry, text=ferry.text[:100])], TOKENIZER, 10_000).ids)
    assert compose("What?", [ferry], TOKENIZER, budget).chunks[0].text == ferry.text[:100]


@pytest.mark.parametrize(
    "question, words",
    [(" \n", "there is no question"), ("why " * 100, "tokens with its frame, but only 60 fit")],
)
def test_a_question_that_cannot_be_asked_is_refused(question, words):
    with pytest.raises(ValueError, match=words):
        compose(question, [FARES], TOKENIZER, 60)


# ---- answers


@pytest.mark.parametrize(
    "script, text",
    [
        (" 9 tallies\nQuestion: more?", "9 tallies"),
        ([*TOKENIZER.encode(" 9 tallies"), END, *TOKENIZER.encode(" more")], "9 tallies"),
        (
            " the tallies and the tallies and the tallies and the",
            "the tallies and the tallies",
        ),  # cut at max_new_tokens
        ("\nnothing", ABSTENTION),
        ([END], ABSTENTION),
        ("   ", ABSTENTION),
        (" é😀", "é😀"),
    ],
)
def test_an_answer_is_one_line(script, text):
    limit = len(TOKENIZER.encode(" the tallies and the tallies"))
    reply = Reader(Scripted(script), TOKENIZER, max_new_tokens=limit).read(
        "What does it cost?", [FARES, BOATS]
    )
    assert reply.text == text and reply.text == "".join(reply)
    assert reply.abstained == (text == ABSTENTION)
    assert reply.sources == ([] if reply.abstained else ["fares.md, Fares", "boats.md, page 2"])


def test_an_answer_is_streamed():
    model = Scripted(" 9 tallies for the ferry")
    reply = Reader(model, TOKENIZER).read("What?", [FARES])
    assert model.calls == 0
    pieces = iter(reply)
    first = next(pieces)
    assert first and "9 tallies for the ferry".startswith(first) and model.calls <= 3
    assert first + "".join(pieces) == "9 tallies for the ferry" == reply.text


def test_an_answer_that_repeats_its_passage_takes_fewer_steps():
    calls = []
    for speculate in (False, True):
        model = Scripted(f" {FARES.text}")
        reader = Reader(model, TOKENIZER, max_new_tokens=100, speculate=speculate)
        assert reader.read("What?", [FARES]).text == FARES.text
        calls.append(model.calls)
    assert calls[1] < calls[0] / 2


def test_without_passages_there_are_no_sources():
    reply = Reader(Scripted(" 7"), TOKENIZER).read("What?")
    assert (reply.text, reply.sources, reply.chunks) == ("7", [], ())


def test_the_gain_is_the_difference_of_two_log_probabilities():
    torch.manual_seed(1)
    model = GPT(GPTConfig.preset("nano", vocab_size=TOKENIZER.vocab_size, block_size=200, n_layer=1)).eval()
    reader, answer = Reader(model, TOKENIZER), TOKENIZER.encode(" 9 tallies")
    prompt = compose("What?", [FARES], TOKENIZER, 160)

    def mean_log_probability(ids):
        total = 0.0
        for at, token in enumerate(answer):
            total += model(torch.tensor([ids + answer[:at]]))[0, -1].log_softmax(-1)[token].item()
        return total / len(answer)

    expected = mean_log_probability(prompt.ids) - mean_log_probability(
        TOKENIZER.encode("Question: What?\nAnswer:")
    )
    assert reader.gain("What?", prompt, answer) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("below, text", [(True, "9 tallies"), (False, ABSTENTION)])
def test_an_answer_that_the_passages_do_not_support_is_withheld(below, text):
    model = Scripted(" 9 tallies\n")
    gain = Reader(model, TOKENIZER).gain(
        "What?", compose("What?", [FARES], TOKENIZER, 200), TOKENIZER.encode(" 9 tallies")
    )
    reply = Reader(model, TOKENIZER, min_gain=gain + (-0.01 if below else 0.01)).read("What?", [FARES])
    assert reply.text == text and bool(reply.sources) == below
    assert (
        Reader(model, TOKENIZER, min_gain=99).read("What?").text == "9 tallies"
    )  # without passages there is nothing to gain


@pytest.mark.parametrize("tokens", [0, 300])
def test_an_answer_needs_room(tokens):
    with pytest.raises(
        ValueError, match=f"max_new_tokens={tokens}: must be at least 1, and below the model's block_size=300"
    ):
        Reader(Scripted("x"), TOKENIZER, max_new_tokens=tokens)


# ---- together


class Same(Embedder):
    """An embedder for which all texts are alike."""

    def embed(self, texts):
        return np.ones((len(texts), 2), np.float32)


class Found:
    """An index that finds these."""

    embedder = Same()

    def unknown_names(self, question):
        return []

    def __init__(self, *hits):
        self.hits = [SimpleNamespace(chunk=chunk, score=score) for chunk, score in hits]

    def search(self, question, k, by, where=None):
        self.asked = question, k, by
        return self.hits[:k]


def test_a_question_is_answered_from_what_is_found():
    index = Found((FARES, 0.8), (BOATS, 0.3))
    reader = Reader(Scripted(" 9 tallies\n"), TOKENIZER)
    reply = RAG(index, reader, k=1, by="hybrid").ask("What does it cost?")
    assert (reply.text, reply.sources, reply.chunks) == ("9 tallies", ["fares.md, Fares"], (FARES,))
    assert index.asked == ("What does it cost?", 1, "hybrid")
    for rag in (RAG(index, reader, least_score=0.81), RAG(Found(), reader)):
        reply = rag.ask("What does it cost?")
        assert (reply.text, reply.abstained, reply.sources) == (REFUSAL, True, [])
    reply = RAG(index, reader, k=2, least_score=0.8).ask("What?")
    assert reply.chunks == (FARES, BOATS) and reply.sources == ["fares.md, Fares"]
    assert [source.score for source in reply.evidence] == [0.8]


@pytest.mark.slow
def test_a_real_model_answers_from_the_passage_and_follows_it_when_it_changes():
    model, tokenizer = load_smollm2()
    reader = Reader(model, tokenizer, max_new_tokens=16)
    chunks = chunk_documents(load_documents(ROOT / "weeks/11_rag/handbook").documents, tokenizer)
    swaps = [json.loads(line) for line in (ROOT / "weeks/11_rag/swaps.jsonl").read_text().splitlines()]
    swap = next(
        s for s in swaps if s["document"] == "museum.md"
    )  # one that this model reads right; how many it does, the week measures
    chunk = next(c for c in chunks if c.source == swap["document"] and swap["old"] in c.text)
    old, new = swap["old_answer"], swap["new_answer"]
    changed = replace(chunk, text=chunk.text.replace(swap["old"], swap["new"]))

    def read(*chunks):
        return reader.read(swap["question"], chunks).text

    assert old not in read() and new not in read()
    assert old in read(chunk) and new not in read(chunk)
    assert new in read(changed) and old not in read(changed)
