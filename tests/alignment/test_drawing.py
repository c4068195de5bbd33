"""Drawing answers to prompts of different lengths: each row is what it would be alone."""

import pytest
import torch
from torch import Tensor

from shared.alignment import loops
from shared.alignment.logprobs import token_logprobs
from shared.alignment.loops import NO_TOKEN, draw_answers, pad_prompts
from shared.models.gpt import GPT, GPTConfig
from tests.alignment.helpers import random_ids

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [3], [5, 8, 9, 7]]
NEW, END = 7, 0


class WithoutCache(torch.nn.Module):
    """The same model, which reads everything again at each token."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)


@pytest.fixture(params=["rope", "learned"])
def model(request):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16, position=request.param)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that a wrong position shows
    return model


def draw_by_luck(monkeypatch: pytest.MonkeyPatch, luck: Tensor, first: int) -> None:
    """Each row's token at a place is drawn by its own number in `luck` [rows, places], from place `first`."""
    places = iter(range(first, luck.size(1)))

    def sample(logits: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        assert temperature == 1
        shares = logits.softmax(-1).cumsum(-1)
        return torch.searchsorted(shares, luck[:, next(places), None].contiguous()).squeeze(-1).clamp(max=10)

    monkeypatch.setattr(loops, "sample", sample)


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("cached", [True, False])
def test_rows_of_a_padded_batch_are_those_drawn_alone(model, end, cached, monkeypatch):
    """With the same luck: the same answers, log-probabilities and logits."""
    policy = model if cached else WithoutCache(model)
    luck = torch.rand(4, 6 + NEW, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draw_by_luck(monkeypatch, luck, first=1)
    ids, mask = draw_answers(policy, pad_prompts(PROMPTS), NEW, end)
    assert ids.shape == mask.shape == (4, 6 + NEW)
    together = model(ids)
    logp = token_logprobs(together, ids)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        draw_by_luck(monkeypatch, luck[row : row + 1], first=len(prompt))
        own_ids, own_mask = draw_answers(policy, torch.tensor([prompt]), NEW, end)
        width = own_ids.size(1)
        assert torch.equal(ids[row, :width], own_ids[0]) and torch.equal(mask[row, :width], own_mask[0])
        assert not mask[row, width:].any() and (ids[row, width:] == (end or 0)).all()
        assert ids[row, : len(prompt)].tolist() == prompt
        alone = model(own_ids)
        torch.testing.assert_close(together[row, :width], alone[0], rtol=1e-10, atol=1e-10)
        own_logp = token_logprobs(alone, own_ids)[0]
        torch.testing.assert_close(logp[row, : width - 1], own_logp, rtol=1e-10, atol=1e-10)
        lengths.add(int(own_mask.sum()))
    assert len(lengths) == (1 if end is None else len(lengths)) and max(lengths) <= NEW


def test_an_answer_ends_with_its_end_and_drawing_stops_when_all_have(model):
    torch.manual_seed(0)
    calls = []

    def sure(ids: Tensor) -> Tensor:
        """Says the end token, with certainty, once it has read five tokens."""
        calls.append(ids.size(1))
        logits = torch.full((*ids.shape, 11), -torch.inf)
        logits[:, :4, 7] = 0
        logits[:, 4:, END] = 0
        return logits

    ids, mask = draw_answers(sure, pad_prompts(PROMPTS), NEW, END)
    assert [ids[row, mask[row]].tolist() for row in range(4)] == [[7, 7, 0], [0], [7, 7, 7, 7, 0], [7, 0]]
    assert calls == [1, 2, 3, 4, 5, 6]
    assert (ids[0, 6:] == END).all()


def test_prompts_of_one_length_need_no_padding():
    assert pad_prompts([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    assert pad_prompts(PROMPTS)[2].tolist() == [3, *[NO_TOKEN] * 5]
    for wrong in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            pad_prompts(wrong)


def test_a_seed_gives_the_same_answers_again(model):
    prompts = random_ids(11, 3, 4)
    drawn = [draw_answers(model, prompts, NEW, END, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[2][0])
