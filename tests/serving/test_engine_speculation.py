"""shared/serving/engine.py: a text that is alone is written several tokens in a step, and is the same as one
token after another.
"""

import random
from collections.abc import Sequence

import pytest
import torch

from shared import registry
from shared.sampling.penalties import Penalties
from shared.sampling.speculation import LookupProposer
from shared.serving.engine import Engine
from shared.serving.generation import Generation, Request
from shared.serving.grammar import Form
from tests.quantization.helpers import COMPILED
from tests.serving.helpers import client, complete
from tests.serving.test_engine import BLOCK, CONFIGS, VOCAB, alone, gpt, ids, run, stepped

pytestmark = COMPILED

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
NEW = 40


class EvenThenOdd(Form):
    """Even and odd ids take turns, so many times."""

    def __init__(self, length: int, written: int = 0):
        self.length = length
        self.written = written

    def copy(self) -> "EvenThenOdd":
        return EvenThenOdd(self.length, self.written)

    @property
    def complete(self) -> bool:
        return self.written == self.length

    def mask(self, logits):
        return logits.masked_fill(torch.arange(len(logits)) % 2 != self.written % 2, float("-inf"))

    def push(self, token: int) -> None:
        assert token % 2 == self.written % 2
        self.written += 1


class Guesses:
    """Proposes, in the place of what is looked up, how the text goes on; with errors, if there are to be."""

    def __init__(self, whole: Sequence[int], errors: random.Random | None = None):
        self.whole = list(whole)
        self.errors = errors

    def following(self, tokens: Sequence[int], most: int) -> list[int]:
        assert list(tokens) == self.whole[: len(tokens)]
        right = self.whole[len(tokens) : len(tokens) + most]
        if self.errors is not None:
            right = [t if self.errors.random() < 0.7 else self.errors.randrange(VOCAB) for t in right]
            right = right[: self.errors.randint(0, most)]
        return right


@pytest.fixture
def guesses(monkeypatch):
    """Replaces what is looked up."""

    def replace(*options) -> None:
        made = Guesses(*options)
        monkeypatch.setattr(LookupProposer, "following", lambda self, *text: made.following(*text))

    return replace


def reads_of(engine: Engine) -> list[list[int]]:
    """Filled with the number of tokens of each slot in each forward pass."""
    read, found = engine._reader.read, []

    def noted(new, every=False):
        found.append([len(tokens) for _, tokens in new])
        return read(new, every=every)

    engine._reader.read = noted
    return found


def written(
    request: Request, speculate: bool, name: str = "llama"
) -> tuple[Generation, list, list[list[int]]]:
    """A text that is alone, its tokens, and the reads that wrote it."""
    engine = stepped(gpt(CONFIGS[name]), chunk=len(request.prompt), speculate=speculate)
    reads = reads_of(engine)
    generation = engine.submit(request)
    run(engine)
    assert reads.pop(0) == [len(request.prompt)]
    assert engine.generated_tokens == generation.drawn
    return generation, list(generation), reads


REQUESTS = {
    "greedy": {"temperature": 0},
    "drawn": {},
    "drawn from few": {"top_k": 5, "top_p": 0.8, "temperature": 1.3},
    "greedy with penalties": {"temperature": 0, "penalties": Penalties(repetition=1.3, frequency=0.4)},
    "drawn with penalties": {"penalties": Penalties(presence=0.5, bias={7: 2.0})},
    "of a form": {"form": EvenThenOdd(NEW - 3)},
    "with log-probabilities": {"logprobs": 3},
    "with a stop sequence": {"stop": [9, [11, 30], [8]], "temperature": 0.9},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("options", REQUESTS.values(), ids=REQUESTS)
def test_whatever_is_proposed_the_text_is_bit_for_bit_what_it_is_without(options, name, seed, guesses):
    request = Request(PROMPT, NEW, seed=seed, **options)
    expected, tokens, each_alone = written(request, False, name)
    assert all(read == [1] for read in each_alone)
    whole = [*PROMPT, *(token.id for token in [*tokens, *expected.ending])]
    guesses(whole, random.Random(seed))
    found, same, reads = written(request, True, name)
    assert same == tokens and found.ending == expected.ending and found.drawn == expected.drawn
    assert found.finish_reason == expected.finish_reason
    assert len(tokens) < 8 or len(reads) < len(each_alone)
    assert found.generator.get_state().equal(expected.generator.get_state())


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_what_a_text_repeats_takes_fewer_passes_and_is_what_generate_writes(temperature):
    model = gpt()
    request = Request([1, 2, 3] * 5, 60, temperature=temperature, seed=5, top_k=2)
    engine = stepped(model)
    reads = reads_of(engine)
    generation = engine.submit(request)
    run(engine)
    assert ids(generation) == alone(model, request)
    assert 0 < engine.accepted_tokens <= engine.proposed_tokens
    # The prompt's passes give the first token.
    assert len(reads) - 2 == 60 - 1 - engine.accepted_tokens
    assert sum(map(sum, reads)) == 15 + 59 - engine.accepted_tokens + engine.proposed_tokens


@pytest.mark.parametrize("new", [1, 2, 3, NEW, BLOCK - 1])
def test_as_many_tokens_as_there_may_be_and_no_more(new, guesses):
    request = Request([7] * (BLOCK - new), new, temperature=0)
    whole = [*request.prompt, *alone(gpt(), request)]
    guesses([*whole, *range(20)])  # it would go on beyond the end
    found, tokens, reads = written(request, True)
    assert [token.id for token in tokens] == whole[len(request.prompt) :]
    assert found.finish_reason == "length" and found.drawn == new
    assert sum(map(sum, reads)) == new - 1  # nothing is read in vain


@pytest.mark.parametrize("raises", [False, True], ids=["cancels", "raises"])
@pytest.mark.parametrize("after", [2, 5, 6])
def test_a_client_that_leaves_in_the_middle_of_a_step_gets_no_more(after, raises, guesses):
    model = gpt()
    request = Request(PROMPT, NEW, seed=1)
    guesses([*PROMPT, *alone(model, request)])
    engine, got = stepped(model, slots=1), []

    def listen(token):
        got.append(token)
        if len(got) == after:
            if raises:
                raise OSError("gone")
            generation.cancel()

    generation = engine.submit(request, listen)
    run(engine)
    assert generation.drawn == after and got[after:] == [None]
    assert generation.finish_reason == "cancelled" and engine.busy == 0
    assert engine.generated_tokens == after
    again = engine.submit(request)  # in the same slot, with what it kept of the prompt
    run(engine)
    assert again.reused == 8 and ids(again) == alone(model, request)


def test_beside_another_text_nothing_is_proposed(guesses):
    model = gpt()
    long, short = Request(PROMPT, NEW, seed=1), Request([2, 3], 4, seed=2)
    guesses([*PROMPT, *alone(model, long)])
    engine = stepped(model, chunk=16)
    reads = reads_of(engine)
    first = engine.submit(long)
    engine.step()
    second = engine.submit(short)
    while second.finish_reason is None:
        engine.step()
    beside = list(reads)
    run(engine)
    assert beside == [[11], [3], [2], *[[1, 1]] * 3]
    assert [ids(first), ids(second)] == [alone(model, long), alone(model, short)]
    assert max(map(max, reads[len(beside) :])) > 2


@pytest.mark.parametrize("why", ["it is not wanted", "PyTorch reads"])
def test_nothing_is_proposed_where(why, monkeypatch, guesses):
    if why == "PyTorch reads":
        monkeypatch.setattr(registry, "READERS", [])
    request = Request(PROMPT, 9, seed=1)
    expected = alone(gpt(), request)
    guesses([*PROMPT, *expected])
    _, tokens, reads = written(request, why == "PyTorch reads")
    assert reads == [[1]] * 8 and [token.id for token in tokens] == expected


@pytest.mark.parametrize("reached", [True, False])
def test_logits_that_are_not_finite_count_where_a_token_is_drawn_from_them(reached, guesses):
    model = gpt()
    request = Request(PROMPT, NEW, temperature=0)
    text = alone(model, request)
    wrong = [*text[:1], (text[1] + 1) % VOCAB, *text[2:]]
    guesses([*PROMPT, *(text if reached else wrong)])
    engine = stepped(model, chunk=16)
    read = engine._reader.read

    def spoilt(new, every=False):
        logits = read(new, every=every)
        if len(new[0][1]) == 3:  # the last token, and two that are proposed
            logits[1:] = float("nan")
        return logits

    engine._reader.read = spoilt
    found = engine.submit(request)
    engine.step()
    assert found.finish_reason == ("error" if reached else None)
    assert found.drawn == 2
    engine._reader.read = read
    engine.close()


def test_the_server_shows_what_was_proposed_and_can_be_told_not_to():
    for speculate in (True, False):
        with client(speculate=speculate) as talk:
            complete(talk, prompt=[5, 6, 7] * 6, max_tokens=60, temperature=0, ignore_eos=True)
            metrics = dict(line.split() for line in talk.get("/metrics").text.splitlines() if line[0] != "#")
            assert (float(metrics["llm_proposed_tokens"]) > 0) == speculate
            assert float(metrics["llm_accepted_tokens"]) == talk.engine.accepted_tokens
