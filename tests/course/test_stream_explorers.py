"""Week 4's explorers: what a place in the stream says is what a model that ends there says, and tokens are
drawn from the distribution that `shared.sampling` draws from.
"""

import copy
import re

import pytest
import torch

from shared.course.explorers import lens_explorer, sampling_explorer
from shared.models.gpt import GPT, GPTConfig
from shared.sampling.generate import distribution
from tests.course.test_explorers import CHARS, PHRASE, small_gpt, status
from tests.helpers import shake

SIZES = dict(vocab_size=CHARS.vocab_size, block_size=32, n_layer=2, n_head=4, n_embd=96)
GPTS = {
    "GPT-2": GPTConfig(**SIZES),
    "norms behind": GPTConfig(norm_place="after", norm="rmsnorm", position="rope", **SIZES),
    "soft cap": GPTConfig(norm_place="both", norm="rmsnorm", logit_softcap=2.0, tie_weights=False, **SIZES),
}


def gpt(name: str) -> GPT:
    torch.manual_seed(2)
    return shake(GPT(GPTS[name]))


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([CHARS.encode(text)])


@torch.no_grad()
def said_by_models_that_end(model: GPT) -> list[torch.Tensor]:
    """[time, vocab_size] for each place: of models that have fewer blocks, and whose last may have an MLP
    that adds nothing.
    """
    said = []
    for blocks in range(len(model.blocks) + 1):
        for without_mlp in (True, False) if blocks else (False,):
            short = copy.deepcopy(model)
            short.blocks = short.blocks[:blocks]
            if without_mlp:
                last = short.blocks[-1]
                down = last.mlp.down_proj
                down.weight.zero_()
                if down.bias is not None:
                    down.bias.zero_()
            said.append(short(ids_of(PHRASE))[0].softmax(-1))
    return said


@pytest.mark.parametrize("name", GPTS)
def test_each_place_says_what_a_model_says_that_ends_there(name):
    model = gpt(name)
    data = lens_explorer(model, PHRASE, CHARS).data
    said = said_by_models_that_end(model)
    assert data["places"] == ["embedding", "attention 1", "MLP 1", "attention 2", "MLP 2"]
    assert data["tokens"] == list(PHRASE)
    for t, column in enumerate(data["columns"]):
        tokens = [CHARS.encode(data["vocabulary"][i])[0] for i in column["tokens"]]
        assert len(set(tokens)) == len(tokens)
        for place, shown in enumerate(column["p"]):
            expected = said[place][t]
            assert torch.allclose(torch.tensor(shown), expected[tokens], atol=1e-5)
            assert set(expected.topk(5).indices.tolist()) <= set(tokens)
        following = PHRASE[t + 1 : t + 2]
        assert (data["vocabulary"][column["next"]] if following else "") == following
        assert following or column["next"] is None


def test_the_lengths_are_those_of_the_stream():
    model = gpt("GPT-2")
    data = lens_explorer(model, PHRASE, CHARS).data
    with torch.no_grad():
        ids = ids_of(PHRASE)
        embedded = model.token_embedding(ids) + model.position_embedding.weight[: ids.size(1)]
        first = model.blocks[0]
        behind = embedded + first.attn(first.attn_norm(embedded))
    assert torch.allclose(torch.tensor(data["lengths"][0]), embedded[0].norm(dim=-1), rtol=1e-3)
    assert torch.allclose(torch.tensor(data["lengths"][1]), behind[0].norm(dim=-1), rtol=1e-3)
    assert torch.allclose(torch.tensor(data["added"][0]), (behind - embedded)[0].norm(dim=-1), rtol=1e-3)


@pytest.mark.slow
def test_a_row_says_its_loss_and_frames_what_comes(visit):
    model = gpt("GPT-2")
    seen = visit(lens_explorer(model, PHRASE, CHARS))
    said = said_by_models_that_end(model)
    targets = ids_of(PHRASE)[0, 1:]
    losses = [torch.nn.functional.nll_loss(p[:-1].log(), targets).item() for p in said]
    shown = [float(name.text_content()) for name in seen.frame.locator(".lens .name small").all()[1:-1]]
    assert shown == pytest.approx(losses, abs=0.006)
    right = [(p[:-1].argmax(-1) == targets).tolist() + [False] for p in said]
    framed = seen.frame.evaluate(
        "[...document.querySelectorAll('.said')].map((cell) => cell.classList.contains('right'))"
    )
    assert framed == sum(right, [])


@pytest.mark.slow
def test_keys_walk_the_stream_and_a_token_is_followed_through_it(visit):
    model = gpt("GPT-2")
    seen = visit(lens_explorer(model, PHRASE, CHARS))
    said = said_by_models_that_end(model)
    seen.frame.locator(".said").nth(2 * len(PHRASE) + 5).click()
    for key in ("ArrowRight", "ArrowDown"):
        seen.page.keyboard.press(key)
    best = said[3][6].argmax().item()
    words = status(seen)
    assert words.startswith("Behind attention 2, having read up to ‹n› (position 7), it would say")
    share, name = (
        100 * said[3][6][best].item(),
        {" ": "␣", "\n": "⏎"}.get(CHARS.decode([best]), CHARS.decode([best])),
    )
    assert float(re.search(rf"say ‹{re.escape(name)}› ([\d.]+) %", words).group(1)) == pytest.approx(
        share, abs=0.51
    )
    seen.frame.locator(".says button").nth(2).focus()
    seen.page.keyboard.press("Enter")
    third = said[3][6].argsort(descending=True)[2].item()
    shares = [cell.text_content() for cell in seen.frame.locator(".way td:nth-child(2)").all()]
    for shown, p in zip(shares, said, strict=True):
        assert float(shown.removesuffix(" %").lstrip("<> ")) == pytest.approx(
            100 * p[6][third].item(), abs=0.51
        )


def test_what_has_no_stream_is_refused():
    with pytest.raises(ValueError, match="Linear has no residual stream"):
        lens_explorer(torch.nn.Linear(2, 2), PHRASE, CHARS)
    for explorer in (lens_explorer, sampling_explorer):
        with pytest.raises(ValueError, match="text is empty"):
            explorer(small_gpt(), "", CHARS)
    broken = small_gpt()
    broken.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        sampling_explorer(broken, PHRASE, CHARS)


@pytest.mark.parametrize("make", [lens_explorer, sampling_explorer])
def test_a_model_that_trains_goes_on_training_and_keeps_no_hooks(make):
    model = gpt("GPT-2").train()
    make(model, PHRASE, CHARS)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


SETTINGS = [
    (1.0, None, None),
    (0.3, 5, None),
    (2.5, None, 0.9),
    (1.5, 7, 0.6),
    (0.1, 1, 0.05),
    (1.0, None, 0.05),
]


@pytest.mark.slow
def test_tokens_are_drawn_from_the_distribution_of_the_course(visit):
    model = small_gpt()
    with torch.no_grad():
        logits = model(ids_of(PHRASE))[0]
    logits[3, 4] = logits[3].max()  # equal ones: top-k keeps both, or neither
    logits[3, 7] = logits[3].max()
    model.forward = lambda idx: logits[None]
    seen = visit(sampling_explorer(model, PHRASE, CHARS))
    for temperature, top_k, top_p in SETTINGS:
        expected = distribution(logits, temperature, top_k, top_p)
        shown = seen.frame.evaluate(
            """([temperature, topK, topP]) => {
                const data = JSON.parse(document.getElementById("data").textContent);
                const [all, size] = [numbersOf(data.logits), data.vocabulary.length];
                return data.tokens.map((_, i) => {
                    const logits = all.subarray(i * size, (i + 1) * size);
                    const { order, drawn } = distributionOf(logits, temperature, topK, topP);
                    const p = new Array(size).fill(0);
                    drawn.forEach((share, rank) => { p[order[rank]] = share; });
                    return p;
                });
            }""",
            [temperature, top_k, top_p],
        )
        assert torch.allclose(torch.tensor(shown, dtype=torch.float32), expected, atol=2e-6)


@pytest.mark.slow
def test_the_dials_cut_and_say_how_much_and_the_draws_fall_on_what_is_left(visit):
    model = small_gpt()
    with torch.no_grad():
        logits = model(ids_of(PHRASE))[0]
    seen = visit(sampling_explorer(model, PHRASE, CHARS))
    size = CHARS.vocab_size
    assert f"{size} of {size} tokens can be drawn; nothing is cut" in status(seen)
    seen.frame.locator("#top-k").fill("3")  # the fourth step: 4
    seen.frame.locator("#top-p").fill("0.7")
    seen.frame.locator("#temperature").fill("0.5")
    seen.frame.get_by_role("option").nth(4).focus()
    expected = distribution(logits, 10**0.5, 4, 0.7)
    kept = (expected > 0).sum(-1)
    assert [chip.text_content()[-1] for chip in seen.frame.get_by_role("option").all()] == list(
        map(str, kept.tolist())
    )
    cut = 100 * (logits[4] / 10**0.5).softmax(-1)[expected[4] == 0].sum().item()
    words = status(seen)
    assert words.startswith("After ‹h› (position 5)")
    left, percent = re.search(
        rf"(\d+) of {size} tokens can be drawn; \d+ are cut, with ([\d.]+) %", words
    ).groups()
    assert int(left) == kept[4] and float(percent) == pytest.approx(cut, abs=0.51)
    seen.frame.get_by_role("button", name="Draw 100").press("Enter")
    times = [row.text_content() for row in seen.frame.locator(".bars .share.soft").all()]
    counts = [int(text.split()[0]) if text else 0 for text in times]
    assert sum(counts) == 100 and not any(counts[kept[4] :])
    assert seen.frame.locator(".bars .gone").count() == len(counts) - kept[4]
