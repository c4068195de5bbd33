"""shared/sampling/speculation.py: the texts of plain generation, and exactly its distribution.

Oracles: plain `generate`; every way that chance can go, counted out; a plain search for what stood before.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shared.quantization.decoder  # noqa: F401 (reads with a GPT on a CPU)
from shared import registry
from shared.adapters.prompts import add_prompt
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.gpt import GPT, GPTConfig
from shared.quantization.cache import Int8Cache
from shared.registry import LanguageModel
from shared.sampling import Draft, Lookup, generate, generate_batch
from shared.sampling.generate import Row, Sampling
from shared.sampling.speculation import Speculation, chance_to_keep, redrawn_from
from shared.tokenizers import CharTokenizer
from tests.quantization.helpers import COMPILED
from tests.sampling.test_completion import BLOCK, BPE, LLAMA, PROMPTS, VARIANTS, counting, gpt

# ---- the rule


def distributions() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of a target and a draft."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 50, generator=draw)
    first, second = logits.softmax(-1)
    few = first.masked_fill(first < first.median(), 0)
    other = second.masked_fill(second < second.median(), 0)
    sure = torch.eye(50)
    return {
        "two": (first, second),
        "the same": (first, first),
        "a target of few tokens": (few / few.sum(), second),
        "a draft of few tokens": (first, other / other.sum()),
        "both of few tokens": (few / few.sum(), other / other.sum()),
        "nothing in common": (sure[3], sure[4]),
        "a draft that is sure": (first, sure[7]),
        "a target that is sure": (sure[7], first),
    }


@pytest.mark.parametrize(("target", "draft"), distributions().values(), ids=distributions())
def test_what_is_kept_and_what_replaces_it_are_together_distributed_as_the_target(target, draft):
    kept = chance_to_keep(target, draft)
    refused = 1 - (draft.double() * kept).sum()
    got = draft.double() * kept + refused * redrawn_from(target, draft)
    torch.testing.assert_close(got, target.double(), rtol=0, atol=1e-6)
    # No rule could keep more: Leviathan et al. (2023), theorem 3.5.
    assert (draft.double() * kept).sum().item() == pytest.approx(torch.minimum(target, draft).sum().item())


class Chance:
    """Goes every way that `torch.multinomial` and `torch.bernoulli` can go, one after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch, "multinomial", self._multinomial)
        monkeypatch.setattr(torch, "bernoulli", self._bernoulli)

    def distribution(self, run: Callable[[], tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """How likely each result of `run` is."""
        likely: dict[tuple[int, ...], float] = defaultdict(float)
        ways: list[list[int]] = [[]]
        while ways:
            self._way, self._taken, self._others = ways.pop(), [], ways
            self._probability = 1.0
            result = run()
            likely[result] += self._probability
        return likely

    def _choose(self, probabilities: list[float]) -> int:
        place = len(self._taken)
        if place == len(self._way):
            possible = [i for i, p in enumerate(probabilities) if p > 0]
            self._others += [[*self._taken, i] for i in possible[1:]]
            self._way.append(possible[0])
        self._taken.append(self._way[place])
        self._probability *= probabilities[self._way[place]] / sum(probabilities)
        return self._way[place]

    def _multinomial(self, probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
        assert count == 1
        chosen = self._choose(probabilities.double().flatten().tolist())
        return torch.full((*probabilities.shape[:-1], 1), chosen)

    def _bernoulli(self, p: Tensor, generator: torch.Generator) -> Tensor:
        return torch.tensor(float(self._choose([1 - p.item(), p.item()])))


class TwoBack(LanguageModel):
    """Logits from the last token and the one before it."""

    def __init__(self, seed: int, vocab_size: int = 3):
        super().__init__()
        self.config = BigramConfig(vocab_size)
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(2 * torch.randn(vocab_size, vocab_size, vocab_size, generator=draw))

    def forward(self, idx: Tensor) -> Tensor:
        before = torch.cat([idx[:, :1], idx[:, :-1]], 1)
        return self.table[before, idx]


SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_k": 2},
    {"top_p": 0.7},
    {"repetition_penalty": 1.7},
    {"temperature": 1.4, "top_k": 2, "top_p": 0.9, "repetition_penalty": 1.3},
]
SPECULATIONS = {
    "draft": lambda: Draft(TwoBack(1), k=2),
    "own draft": lambda: Draft(TwoBack(0), k=2),
    "lookup": lambda: Lookup(k=2, longest=2, shortest=1),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", SPECULATIONS.values(), ids=SPECULATIONS)
def test_every_text_is_exactly_as_likely_as_without(make, settings, monkeypatch):
    """All ways that chance can go are counted out, through all of the code that writes."""
    model, prompt, new = TwoBack(0), [0, 1, 2, 0], 4

    def write(speculate: Speculation | None) -> tuple[int, ...]:
        return tuple(generate(model, prompt, new, **settings, speculate=speculate))

    expected = {}
    for text in product(range(3), repeat=new):
        row, likely = Row(prompt, Sampling(**settings)), 1.0
        for token in text:
            logits = model(torch.tensor([row.tokens]))[0, -1].detach()
            likely *= row.distribution(logits)[token].item()
            row.tokens.append(token)
        expected[text] = likely
    chance = Chance(monkeypatch)
    plain = chance.distribution(lambda: write(None))
    got = chance.distribution(lambda: write(make()))
    for text, likely in expected.items():
        assert plain.get(text, 0) == pytest.approx(likely, abs=1e-6)
        assert got.get(text, 0) == pytest.approx(likely, abs=1e-6), text
    assert math.fsum(got.values()) == pytest.approx(1) and set(got) <= set(expected)


# ---- the same texts

READING = {
    "decoder.c": pytest.param("decoder.c", marks=COMPILED),
    "PyTorch": "PyTorch",
    "without a cache": "without a cache",
}


@pytest.fixture(params=READING.values(), ids=READING)
def reading(request, monkeypatch) -> dict[str, bool]:
    """Options of `generate` for each way to read."""
    if request.param == "PyTorch":
        monkeypatch.setattr(registry, "READERS", [])
    return {"use_cache": False} if request.param == "without a cache" else {}


def short_lookup() -> Lookup:
    return Lookup(k=5, longest=3, shortest=1)


def small_draft() -> GPT:
    draft = gpt(**{**LLAMA, "n_embd": 16, "n_layer": 1, "block_size": BLOCK // 2})
    return draft


@pytest.mark.parametrize("new", [10, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_texts_are_those_without_speculation(variant, new, reading):
    """Also where texts outgrow block_size, the draft's before the model's."""
    model = gpt(**VARIANTS[variant])
    plain = generate_batch(model, PROMPTS[:3], new, temperature=0, **reading)
    for speculate in (short_lookup(), Draft(model, k=3), Draft(small_draft(), k=3)):
        written = generate_batch(model, PROMPTS[:3], new, temperature=0, speculate=speculate, **reading)
        assert [one.ids for one in written] == [one.ids for one in plain]
        for one, other in zip(written, plain):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert speculate.tokens == sum(len(one.ids) for one in plain)
        if isinstance(speculate, Lookup) and new == 70:
            assert speculate.tokens_per_step > 1.2


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_with_lookup_a_seed_gives_the_same_text_as_without(settings, reading):
    model = gpt(**LLAMA)
    options = dict(settings, seed=3, **reading)
    lookup = short_lookup()
    rows = generate_batch(model, PROMPTS, 40, **options, speculate=lookup)
    assert [row.ids for row in rows] == [row.ids for row in generate_batch(model, PROMPTS, 40, **options)]
    assert lookup.proposed > 0


def test_with_a_draft_a_seed_gives_the_same_text_again(reading):
    model = gpt(**LLAMA)
    first, again = (
        model.generate(PROMPTS, 30, seed=3, speculate=Draft(small_draft()), **reading) for _ in range(2)
    )
    assert first == again


@pytest.mark.parametrize("change", ["int8 cache", "soft prompt", "soft prompt and a window"])
def test_other_caches_forget_what_was_read_in_vain(change):
    model = gpt(**LLAMA, window=6 if "window" in change else None)
    if change == "int8 cache":
        model.cache_type = Int8Cache
    else:
        model = add_prompt(model, 3)
    lookup = short_lookup()
    written = model.generate(PROMPTS, 60, temperature=0, speculate=lookup)
    assert written == model.generate(PROMPTS, 60, temperature=0)
    assert lookup.steps < lookup.tokens < lookup.steps + lookup.proposed, "some was right and some was not"


@torch.inference_mode()
@pytest.mark.parametrize("kind", [None, Int8Cache])
def test_a_cache_that_has_forgotten_is_as_if_it_had_not_read(kind):
    model, idx = gpt(**LLAMA), torch.arange(20)[None]
    model.cache_type = kind or model.cache_type
    cache, other = model.new_cache(), model.new_cache()
    model(idx[:, :10], cache)
    model(idx[:, 5:9], cache)
    cache.forget(4)
    model(idx[:, :10], other)
    assert cache.length == 10
    assert torch.equal(model(idx[:, 10:], cache), model(idx[:, 10:], other))
    with pytest.raises(ValueError, match="the cache holds 20 tokens: 21 cannot be forgotten"):
        cache.forget(21)


@pytest.mark.parametrize("stop", ["e", ["the", " a"], BPE.decode([100])])
def test_streams_and_stop_texts_are_those_without_speculation(stop, reading):
    model = gpt(**LLAMA)
    for seed in range(4):
        options = dict(stop=stop, seed=seed, **reading)
        plain = model.generate("the ", 40, **options)
        assert model.generate("the ", 40, **options, speculate=short_lookup()) == plain
        assert "".join(model.stream("the ", 40, **options, speculate=short_lookup())) == plain


def test_an_end_token_among_accepted_tokens_ends_the_text():
    end = BPE.special_tokens["<|endoftext|>"]
    model = BigramModel(BigramConfig(BPE.vocab_size))
    with torch.no_grad():
        for token, following in ((97, 98), (98, 99), (99, end), (end, 97)):
            model.table.weight[token, following] = 100
    prompt, lookup = [97, 98, 99, end, 97], Lookup()
    (written,) = generate_batch(model, [prompt], 30, temperature=0, tokenizer=BPE, speculate=lookup)
    assert written == generate_batch(model, [prompt], 30, temperature=0, tokenizer=BPE)[0]
    assert (written.text, written.ids, written.finish_reason) == ("bc", (98, 99, end), "stop")
    assert (lookup.steps, lookup.tokens) == (2, 3)


# ---- how many steps


def counted(model: LanguageModel) -> list[int]:
    """Filled with the number of tokens of each forward pass."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].size(1)))
    return sizes


@pytest.mark.parametrize(("new", "steps"), [(0, 0), (1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (19, 5), (20, 6)])
def test_a_draft_that_is_always_right_gives_k_more_tokens_a_step(new, steps):
    """The first step reads the prompt and gives one token, the next 3, the others 5, no more than wanted."""
    model = gpt(**LLAMA)
    speculate = Draft(gpt(**LLAMA), k=4)
    sizes = counted(model)
    assert len(list(generate(model, [1, 2, 3], new, temperature=0, speculate=speculate))) == new
    assert len(sizes) == steps == speculate.steps and speculate.tokens == new
    assert sum(sizes) <= 3 + new and sizes[:1] == [3][:new]
    if new:
        assert speculate.tokens_per_step == new / steps


def test_where_nothing_came_up_before_each_token_takes_a_step():
    model, tokenizer = counting()
    lookup = Lookup(shortest=1)
    assert model.config.vocab_size == 10
    assert list(generate(model, [0], 9, temperature=0, speculate=lookup)) == list(range(1, 10))
    assert (lookup.steps, lookup.tokens, lookup.proposed, lookup.tokens_per_step) == (9, 9, 0, 1)
    # From here on all of it did.
    assert len(list(generate(model, [0], 100, temperature=0, speculate=lookup))) == 100
    assert lookup.tokens == 109 and lookup.steps == 9 + 10 + 2 + math.ceil((100 - 10 - 3 - 5) / 9)


def test_both_models_are_left_in_the_mode_they_were_in():
    model, draft = gpt(**LLAMA).train(), small_draft().train()
    stream = generate(model, [1, 2], 20, seed=0, speculate=Draft(draft))
    [next(stream) for _ in range(3)]
    assert not model.training and not draft.training
    stream.close()
    assert model.training and draft.training


# ---- what is looked up


def found_by_search(text: list[int], most: int, longest: int, shortest: int) -> list[int]:
    """What follows the first place that the last tokens stood at, but for the end itself."""
    for size in range(longest, shortest - 1, -1):
        for end in range(size, len(text)):
            if text[end - size : end] == text[-size:]:
                copied = list(text)
                while len(copied) < len(text) + most:
                    copied.append(copied[end + len(copied) - len(text)])
                return copied[len(text) :]
    return []


def growing(text: list[int]) -> Iterator[Row]:
    row = Row(text[:1], Sampling())
    yield row
    for token in text[1:]:
        row.tokens.append(token)
        yield row


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 3))
def test_the_proposal_is_what_followed_the_first_of_the_longest_matches(text, most, shortest):
    proposer = Lookup(longest=3, shortest=shortest).proposer(0, True)
    for row in growing(text):
        proposal = proposer.propose(row, most)
        assert list(proposal.tokens) == found_by_search(row.tokens, most, 3, shortest)
        assert proposal.drawn_from is None


def test_a_loop_is_proposed_on_and_on():
    proposal = Lookup().proposer(0, True).propose(Row([7, 1, 2, 1, 2], Sampling()), 5)
    assert list(proposal.tokens) == [1, 2, 1, 2, 1]


# ---- what cannot be


class Shelf:
    """A cache that cannot forget."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lookup(k=0), "k=0 is out of range: at least 1 token"),
        (lambda: Lookup(shortest=0), "shortest=0 and longest=3: must be at least 1"),
        (lambda: Lookup(longest=2, shortest=3), "shortest=3 and longest=2: .* the longest no shorter"),
        (lambda: Draft(gpt(), k=-1), "k=-1 is out of range"),
        (lambda: Lookup().tokens_per_step, "nothing was written with this speculation yet"),
        (lambda: gpt().generate("a", speculate=Lookup), "speculate=.*: must be a Lookup\\(\\), a Draft"),
        (lambda: gpt().stream("a", speculate=True), "speculate=True: must be"),
        (lambda: generate(gpt(), [1], speculate=3), "speculate=3: must be"),
        (lambda: gpt().generate("a", speculate=Draft(TwoBack(0))), "the draft has a vocabulary of 3 tokens"),
    ],
)
def test_what_is_asked_for_wrongly_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_draft_with_other_tokens_is_refused():
    model, draft = (GPT(GPTConfig(4, block_size=8, n_layer=1, n_head=1, n_embd=8)) for _ in range(2))
    model.tokenizer, draft.tokenizer = CharTokenizer("abcd"), CharTokenizer("bcde")
    with pytest.raises(ValueError, match="the draft's tokens stand for other texts"):
        model.generate("a", speculate=Draft(draft))
    draft.tokenizer = CharTokenizer("abcd")
    assert model.generate("a", 3, temperature=0, speculate=Draft(draft)) == model.generate(
        "a", 3, temperature=0
    )


def test_a_cache_that_cannot_forget_is_refused():
    model = BigramModel(BigramConfig(5))
    model.new_cache = lambda batch_size, max_length: Shelf()
    with pytest.raises(ValueError, match="a Shelf has no method `forget`.* or with use_cache=False"):
        list(generate(model, [1], 5, speculate=Lookup()))
    assert len(list(generate(model, [1], 5, speculate=Lookup(), use_cache=False))) == 5
