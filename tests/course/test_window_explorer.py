"""Week 2's explorer: what it computes of a window is what PyTorch computes, whatever stands in it."""

import base64
import re

import numpy as np
import pytest
import torch
from torch import nn

from shared.course.explorers import window_explorer
from shared.models.mlp import WindowMLP, WindowMLPConfig
from tests.course.test_explorers import CHARS, PHRASE, status, window, window_mlp

SHOWN = {"␣": " ", "⏎": "\n"}
IDS = CHARS.encode(PHRASE)


def predicted(model: WindowMLP, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].softmax(-1)


def with_other(place: int, token: int, end: int) -> list[int]:
    """The text up to `end`, with another token in a place of the window, which is 4 long."""
    ids = IDS[: end + 1]
    ids[end - 3 + place] = token
    return ids


def computed(seen, expression: str):
    """What the page's network makes: `network` is it, `data` what it was given."""
    return seen.frame.evaluate(
        f"""(() => {{
            const data = JSON.parse(document.getElementById("data").textContent);
            const network = new Network(data.matrices);
            return {expression};
        }})()"""
    )


@pytest.mark.slow
def test_the_network_is_pytorchs(visit):
    model = window_mlp()
    seen = visit(window())
    ids = torch.tensor([IDS])
    padded = [CHARS.vocab_size] * 3 + IDS
    windows = [padded[t : t + 4] for t in range(len(IDS))]
    with torch.no_grad():
        activations, probabilities = model.activations(ids)[0], model(ids)[0].softmax(-1)
    shown = computed(seen, f"{windows}.map((tokens) => Array.from(network.activations(tokens)))")
    assert torch.allclose(torch.tensor(shown), activations, atol=2e-4)
    shown = computed(seen, f"{windows}.map((tokens) => network.probabilities(network.activations(tokens)))")
    assert torch.allclose(torch.tensor(shown), probabilities, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 3])
def test_a_change_is_the_total_variation_of_two_predictions(visit, place):
    model = window_mlp()
    seen = visit(window())
    end = 9
    changes = computed(seen, f"network.changes({IDS[end - 3 : end + 1]}, {place})")
    before = predicted(model, IDS[: end + 1])
    for token, change in enumerate(changes):
        after = predicted(model, with_other(place, token, end))
        assert change == pytest.approx((before - after).abs().sum().item() / 2, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("place", [None, 2])
def test_likeness_is_the_cosine_of_centred_vectors(visit, place):
    model = window_mlp()
    seen = visit(window())
    vectors = model.token_embedding.weight.detach()
    if place is not None:
        vectors = vectors @ model.hidden.weight.detach()[:, 6 * place : 6 * place + 6].T
    mapped = list(range(CHARS.vocab_size))
    centred = vectors - vectors[mapped].mean(0)
    cosines = torch.cosine_similarity(centred[mapped], centred[4], dim=-1)
    space = "null" if place is None else str(place)
    found = computed(seen, f"neighbours(network.space({space}), data.mapped, 4)")
    assert [round(entry["cosine"], 3) for entry in found] == sorted(
        (round(entry["cosine"], 3) for entry in found), reverse=True
    )
    assert {entry["token"]: entry["cosine"] for entry in found} == {
        token: pytest.approx(cosines[token].item(), abs=1e-3) for token in mapped if token != 4
    }


@pytest.mark.slow
def test_typing_into_a_place_moves_the_prediction_and_it_can_be_put_back(visit):
    model = window_mlp()
    seen = visit(window())
    seen.frame.locator(".phrase .chip").nth(6).click()
    assert [chip.text_content() for chip in seen.frame.locator(".chip.within").all()] == list("␣hen")
    seen.frame.locator(".slot").nth(3).focus()
    seen.page.keyboard.press("ArrowLeft")
    before, words = predicted(model, IDS[:7]), status(seen)
    best = re.search(r"After ‹␣hen› the likeliest are (.) ", words).group(1)
    assert CHARS.encode(SHOWN.get(best, best)) == [int(before.argmax())]
    seen.page.keyboard.press("a")
    after = predicted(model, with_other(2, CHARS.encode("a")[0], 6))
    moved = (before - after).abs().sum().item() / 2
    words = status(seen)
    assert words.startswith("After ‹␣han›") and "With a in place of e" in words
    assert float(re.search(r"moved by ([\d.]+\d)", words).group(1)) == pytest.approx(moved, abs=0.006)
    for line in seen.frame.locator(".bars .row").all():
        if line.get_attribute("aria-label") is not None:
            continue
        token, share = line.locator(".token").text_content(), line.locator(".share").text_content()
        expected = 100 * after[CHARS.encode(SHOWN.get(token, token))[0]].item()
        assert float(share.strip("<> %")) == pytest.approx(expected, abs=0.51)
    seen.frame.get_by_role("button", name="Put it back").press("Enter")
    assert status(seen).startswith("After ‹␣hen›")


@pytest.mark.slow
def test_a_click_on_the_map_puts_that_character_into_the_place(visit):
    seen = visit(window())
    seen.frame.locator(".slot").nth(1).click()
    canvas = seen.frame.locator("canvas.map")
    box = canvas.bounding_box()
    found = set()
    for x in np.linspace(15, box["width"] - 15, 8):
        for y in np.linspace(15, box["height"] - 15, 6):
            canvas.click(position={"x": x, "y": y})
            found.add(seen.frame.locator(".slot").nth(1).text_content())
    assert len(found) > 1 and found <= {{" ": "␣", "\n": "⏎"}.get(c, c) for c in "".join(CHARS.chars)}


def test_the_map_is_the_two_directions_of_largest_variance():
    model = window_mlp()
    data = window_explorer(model, PHRASE, CHARS, characters="henta").data
    maps = np.frombuffer(base64.b64decode(data["maps"]), "<f4").reshape(5, 5, 2)
    vectors = model.token_embedding.weight.detach()[CHARS.encode("henta")].numpy().astype(float)
    values, directions = np.linalg.eigh(np.cov(vectors.T))
    points = (vectors - vectors.mean(0)) @ directions[:, np.argsort(values)[::-1][:2]]
    for axis in range(2):
        assert abs(np.corrcoef(points[:, axis], maps[0, :, axis])[0, 1]) == pytest.approx(1, abs=1e-5)
        assert maps[0, :, axis].min() == -1 and maps[0, :, axis].max() == 1


class _Relu(WindowMLP):
    def activations(self, idx):
        return super().activations(idx).relu()


def test_what_is_no_window_mlp_and_unknown_characters_are_refused():
    with pytest.raises(ValueError, match="Linear is no window MLP"):
        window_explorer(nn.Linear(2, 2), PHRASE, CHARS)
    with pytest.raises(ValueError, match="_Relu gives other logits than tanh"):
        window_explorer(_Relu(WindowMLPConfig(CHARS.vocab_size, init="naive")), PHRASE, CHARS)
    for characters, says in (("he", "at least three"), ("heX", "has no 'X'")):
        with pytest.raises(ValueError, match=says):
            window_explorer(window_mlp(), PHRASE, CHARS, characters=characters)
    with pytest.raises(ValueError, match="text is empty"):
        window_explorer(window_mlp(), "", CHARS)
