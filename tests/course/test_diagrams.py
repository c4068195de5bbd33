"""The pictures of the data flow: as their module draws them, readable by all, and their numbers right."""

import re
from collections import Counter
from itertools import combinations
from xml.etree import ElementTree

import pytest
import torch

from shared.course import diagrams
from shared.course.drawing import KINDS, SMALLEST, STYLE, Box, Picture
from shared.models.attention import attention_weights, causal_mask
from shared.tokenizers import BPETokenizer

ALL = pytest.mark.parametrize("draw", diagrams.PICTURES, ids=lambda draw: draw.__name__)
SVG = "{http://www.w3.org/2000/svg}"


@ALL
def test_the_files_are_what_the_module_draws(draw):
    path = diagrams.FOLDER / f"{draw.__name__}.svg"
    assert path.read_text(encoding="utf-8") == draw().svg(), "run python -m shared.course.diagrams"


@ALL
def test_a_picture_is_read_aloud_and_its_words_are_large_enough(draw):
    root = ElementTree.fromstring(draw().svg())
    named = {element.get("id"): element.text for element in root if element.get("id")}
    assert root.get("role") == "img" and root.get("aria-labelledby").split() == ["title", "desc"]
    assert 10 < len(named["title"]) < 80 and len(named["desc"]) > 100
    sizes = [int(element.get("font-size")) for element in root.iter(f"{SVG}text")]
    assert len(sizes) > 5 and min(sizes) >= SMALLEST == 12


def overlap(a: Box, b: Box) -> bool:
    apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
    return not apart


def inside(a: Box, b: Box) -> bool:
    return b.x <= a.x and a.x + a.width <= b.x + b.width and b.y <= a.y and a.y + a.height <= b.y + b.height


@ALL
def test_nothing_lies_on_anything_else(draw):
    picture = draw()
    assert [pair for pair in combinations(picture.boxes, 2) if overlap(*pair)] == []
    assert [pair for pair in combinations(picture.words, 2) if overlap(*pair)] == []
    crossing = [
        (words, box)
        for words in picture.words
        for box in picture.boxes
        if overlap(words, box) and not inside(words, box)
    ]
    assert crossing == []


def colours(style: str) -> dict[str, dict[str, str]]:
    """The fill and the stroke of each class."""
    found = {}
    for name, rules in re.findall(r"\.([\w-]+)\{([^}]*)\}", style):
        found[name] = {**found.get(name, {}), **dict(re.findall(r"(fill|stroke):(#\w{6})", rules))}
    return found


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_words_and_edges_stand_out_in_both_modes(mode):
    """WCAG 2: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    light, dark = STYLE.split("@media (prefers-color-scheme:dark)")
    looks = colours(light if mode == "light" else dark)
    paper = looks["paper"]["fill"]
    for kind in KINDS:
        assert contrast(looks["ink"]["fill"], looks[kind]["fill"]) > 7
        assert contrast(looks[kind]["stroke"], paper) > 3, kind
    assert contrast(looks["soft"]["fill"], paper) > 4.5 and contrast(looks["line"]["stroke"], paper) > 4.5


def test_words_that_do_not_fit_are_refused():
    picture = Picture(200, 100, "T", "A picture.")
    with pytest.raises(AssertionError, match="too wide for its box"):
        picture.box(Box(10, 50, 40, 30), "far too long for it")
    with pytest.raises(AssertionError, match="leaves the picture"):
        picture.write(190, 60, "over the edge", anchor="start")
    with pytest.raises(AssertionError, match="tiny"):
        picture.write(100, 60, "tiny", size=11)


# ---- the numbers


def test_softmax_is_that_of_pytorch():
    logits = [1.2, -1.6, 1.0, 0.7, 0.1]
    expected = torch.tensor(logits, dtype=torch.float64).softmax(0)
    assert torch.allclose(torch.tensor(diagrams.softmax(logits), dtype=torch.float64), expected)
    shown = re.findall(r">(0\.\d\d)<", diagrams.bigram().svg())
    assert shown == [f"{p:.2f}" for p in expected.tolist()] and sum(map(float, shown)) == pytest.approx(1)


def test_the_weights_of_attention_are_those_of_the_course():
    q, k = torch.tensor(diagrams.QUERIES), torch.tensor(diagrams.KEYS)
    expected = attention_weights(q, k, causal_mask(4))
    made = torch.tensor(diagrams.causal_softmax(diagrams.attention_scores()))
    assert torch.allclose(made, expected, atol=1e-6)
    scores = diagrams.attention_scores()
    assert torch.allclose(torch.tensor(scores), q @ k.T / 2**0.5, atol=1e-6)
    by_hand = torch.tensor(diagrams.causal_softmax([[round(score, 1) for score in row] for row in scores]))
    assert torch.equal(by_hand.mul(100).round(), made.mul(100).round())  # from the digits that are printed


def test_the_merges_are_those_that_the_tokenizer_learns_and_makes():
    text = diagrams.TEXT.replace("␣", " ")
    tokenizer = BPETokenizer.train(text, 256 + len(diagrams.MERGES), pattern=r"(?s).+")
    assert tuple((a.decode(), b.decode()) for a, b in tokenizer.merges) == diagrams.MERGES
    tokens = list(diagrams.TEXT)
    for pair in diagrams.MERGES:
        ranked = Counter(zip(tokens, tokens[1:])).most_common(2)
        assert ranked[0][0] == pair and ranked[0][1] > ranked[1][1]  # no rule for equals is needed
        tokens = diagrams.merged(tokens, pair)
    made = [tokenizer.vocab[i].decode().replace(" ", "␣") for i in tokenizer.encode(text)]
    assert tokens == made


def test_two_processes_take_the_step_of_the_whole_batch():
    shown = re.findall(r">(−?\d\.\d)<", diagrams.ddp().svg())
    first, second = diagrams.GRADIENTS
    mean = torch.tensor([first, second]).mean(0)
    weights = torch.nn.Parameter(torch.tensor(diagrams.WEIGHTS))
    weights.grad = mean
    torch.optim.SGD([weights], lr=diagrams.LR).step()
    rows = [[*own, *mean.tolist(), *weights.tolist()] for own in (first, second)]
    assert [float(value.replace("−", "-")) for value in shown] == pytest.approx(rows[0] + rows[1])
