"""shared/sampling/penalties.py against transformers, and against OpenAI's formula written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from shared.sampling.penalties import Penalties

V = 12
IDS = st.lists(st.integers(0, V - 1), max_size=20)


def logits(seed: int) -> torch.Tensor:
    return 4 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), IDS, IDS, st.floats(0.1, 5))
def test_repetition_as_in_transformers(seed, prompt, written, penalty):
    scores = logits(seed)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)
    ids = torch.tensor([prompt + written], dtype=torch.int64)
    want = theirs(ids, scores[None].clone())[0] if prompt + written else scores
    torch.testing.assert_close(Penalties(repetition=penalty).apply(scores, prompt, written), want)


@given(st.integers(0, 1000), IDS, IDS, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_by_openais_formula(seed, prompt, written, presence, frequency):
    scores = logits(seed)
    got = Penalties(presence=presence, frequency=frequency).apply(scores, prompt, written)
    for token in range(V):
        count = written.count(token)
        want = scores[token] - count * frequency - (count > 0) * presence
        torch.testing.assert_close(got[token], want)


def test_bias_as_in_transformers():
    bias = {3: 2.5, 7: -100.0}
    theirs = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    scores = logits(0)
    want = theirs(torch.zeros(1, 1, dtype=torch.int64), scores[None].clone())[0]
    torch.testing.assert_close(Penalties(bias=bias).apply(scores, [1], [2]), want)


def test_the_defaults_change_nothing_and_nothing_is_changed_in_place():
    scores = logits(1)
    given_ones = scores.clone()
    assert Penalties().change_nothing
    assert torch.equal(Penalties().apply(scores, [1, 2], [3]), scores)
    strong = Penalties(repetition=2, presence=1, frequency=1, bias={0: 5})
    assert not strong.change_nothing and not torch.equal(strong.apply(scores, [1], [0]), given_ones)
    assert torch.equal(scores, given_ones)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"repetition": 0}, "repetition_penalty=0 is out of range"),
        ({"repetition": float("nan")}, "repetition_penalty=nan"),
        ({"presence": 2.1}, "presence_penalty=2.1"),
        ({"frequency": -3}, "frequency_penalty=-3"),
        ({"bias": {4: 101}}, "logit_bias=101 of token 4"),
        ({"bias": dict.fromkeys(range(1001), 0)}, "logit_bias=1001 tokens"),
    ],
)
def test_out_of_range(fields, said):
    with pytest.raises(ValueError, match=said):
        Penalties(**fields)
