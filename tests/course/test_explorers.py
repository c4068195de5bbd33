"""The explorers in a real browser: what they show is what PyTorch and the tokenizers say, a mouse and a
keyboard move them, and they need neither scripts to be read nor a network to run.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared.course.explorers import (
    attention_explorer,
    bigram_explorer,
    lens_explorer,
    predictions_explorer,
    sampling_explorer,
    tokenizer_explorer,
    window_explorer,
)
from shared.course.explorers.page import LIMIT, script_json
from shared.models.attention import AttentionLM, AttentionLMConfig, attention_maps
from shared.models.config import LayerKind
from shared.models.gpt import GPT, GPTConfig
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.tokenizers import BPETokenizer, CharTokenizer
from tests.course.explored import frontier, passages, slots
from tests.course.number_explorers import loss_scale, numbers, quantization, rank
from tests.helpers import shake

TEXT = "the hen then the tea\nO that the ten then eat.\n" * 3
CHARS = CharTokenizer.train(TEXT)
PHRASE = "the hen\nthen eat"
PLAYGROUND = {
    "characters": CHARS,
    "270": BPETokenizer.train(TEXT, 270),
    "264": BPETokenizer.train(TEXT, 264),
}
FEATURES = {"position": "rope", "norm": "rmsnorm", "qk_norm": True}
MODELS = {
    "week 3's": lambda: AttentionLM(AttentionLMConfig(CHARS.vocab_size, n_layer=2, n_head=4, n_embd=32)),
    "a GPT with everything": lambda: GPT(
        GPTConfig(
            vocab_size=CHARS.vocab_size,
            block_size=32,
            n_layer=2,
            n_head=4,
            n_kv_head=2,
            n_embd=96,
            attention_softcap=4.0,
            attention_scale=0.3,
            layers=(LayerKind(window=5), LayerKind()),
            **FEATURES,
        )
    ),
}


def pairs() -> torch.Tensor:
    ids = torch.tensor(CHARS.encode(TEXT))
    size = CHARS.vocab_size
    return torch.bincount(ids[:-1] * size + ids[1:], minlength=size * size).view(size, size)


def bigram():
    return bigram_explorer(pairs(), CHARS)


def attention():
    torch.manual_seed(0)
    return attention_explorer(shake(MODELS["week 3's"]()), PHRASE, CHARS)


def tokenizer():
    return tokenizer_explorer(PLAYGROUND, "the teeth that he ate")


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return shake(MODELS["a GPT with everything"]())


def lens():
    return lens_explorer(small_gpt(), PHRASE, CHARS)


def sampling():
    return sampling_explorer(small_gpt(), PHRASE, CHARS)


def window_mlp() -> WindowMLP:
    torch.manual_seed(0)
    model = WindowMLP(WindowMLPConfig(CHARS.vocab_size, window=4, n_embd=6, n_hidden=20))
    model.lm_head.weight.data.mul_(200)  # as if it were trained: far from uniform
    return model


def window():
    return window_explorer(window_mlp(), PHRASE, CHARS)


def readers() -> dict:
    bpe = PLAYGROUND["270"]
    torch.manual_seed(1)
    larger = shake(GPT(GPTConfig(bpe.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=32)))
    return {"by characters": (small_gpt(), CHARS), "by pairs": (larger, bpe)}


def predictions():
    return predictions_explorer(readers(), PHRASE)


TABLES = (tokenizer, predictions)  # a table stands in for them, not a picture
EXPLORERS = [
    bigram,
    attention,
    tokenizer,
    lens,
    sampling,
    window,
    predictions,
    numbers,
    loss_scale,
    quantization,
    rank,
    frontier,
    passages,
    slots,
]
ALL = pytest.mark.parametrize("make", EXPLORERS, ids=lambda make: make.__name__)


def status(seen) -> str:
    return seen.frame.locator("[role=status]").first.text_content()


# Every explorer.


@ALL
@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1100])
def test_it_is_drawn_fits_its_width_and_is_as_tall_as_what_it_shows(visit, make, width):
    seen = visit(make(), width)
    wide, visible, high = seen.frame.evaluate(
        "[document.documentElement.scrollWidth, innerWidth, document.querySelector('main').offsetHeight]"
    )
    assert wide <= visible and seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert high > 300 and seen.page.locator("iframe").bounding_box()["height"] >= high


@ALL
@pytest.mark.slow
def test_it_is_light_or_dark_as_the_system_and_the_notebook_around_it_are(visit, make):
    seen = visit(make(), color_scheme="dark")
    theme = "document.documentElement.dataset.theme"
    assert seen.frame.evaluate(theme) == "dark"
    for around, expected in (
        ("document.body.dataset.jpThemeLight = 'true'", "light"),
        ("document.body.dataset.jpThemeLight = 'false'", "dark"),
        (
            "delete document.body.dataset.jpThemeLight; document.documentElement.dataset.theme = 'light'",
            "light",
        ),
    ):
        seen.page.evaluate(around)
        # The page's policy forbids the polling of wait_for_function, which is by eval.
        seen.frame.locator(f"html[data-theme={expected}]").wait_for(state="attached")


@ALL
@pytest.mark.slow
def test_where_scripts_do_not_run_a_picture_or_a_table_stands_there(visit, make):
    explorer = make()
    page = visit(explorer, java_script_enabled=False).page
    assert page.get_by_text(explorer.title).is_visible() and page.locator("iframe").count() == 0
    standing = page.locator("img, table").first
    assert standing.is_visible() and standing.bounding_box()["height"] > 50
    assert make in TABLES or len(standing.get_attribute("alt")) > 40


@ALL
@pytest.mark.slow
def test_whatever_can_be_clicked_has_a_name_and_the_tab_key_reaches_it(visit, make):
    seen = visit(make())
    nameless = seen.frame.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea, section, [role]')]
            .filter(e => !['status', 'presentation'].includes(e.role))
            .filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"""
    )
    assert nameless == []
    stops = seen.frame.evaluate(
        """[...document.querySelectorAll('[role=listbox], [role=radiogroup]')].map(list =>
           [...list.querySelectorAll('[tabindex="0"]')].length)"""
    )
    assert stops and set(stops) == {1}


@ALL
def test_it_is_the_same_each_time_it_is_made_and_small(make):
    assert make()._repr_html_() == make()._repr_html_()
    assert len(make()._repr_html_().encode()) <= LIMIT == 300_000


def test_what_is_too_large_is_refused():
    model = AttentionLM(AttentionLMConfig(CHARS.vocab_size, block_size=256, n_layer=4, n_embd=64))
    with pytest.raises(ValueError, match=r"more than the 300,000 .* fewer layers"):
        attention_explorer(model, "then " * 50, CHARS)
    attention_explorer(model, "then " * 10, CHARS, layers=(0, 3))


@pytest.mark.slow
def test_no_text_can_end_the_script_or_become_markup(visit):
    hostile = [
        "</script><script>document.title='1'</script>",
        "<!--<script>",
        "<img src=x onerror=alert(1)>",
        "'`${1}",
    ]
    words = SimpleNamespace(decode=lambda ids: hostile[ids[0]])
    seen = visit(bigram_explorer(torch.ones(4, 4), words, title="</script><b id='b'>&amp;"))
    assert seen.frame.locator("h2").text_content() == "</script><b id='b'>&amp;"
    assert [chip.text_content() for chip in seen.frame.locator(".chip").all()] == [
        text.replace(" ", "␣") for text in hostile
    ]
    assert seen.page.title() == "" and seen.frame.locator("img, b").count() == 0


def test_json_for_a_script_has_no_sign_that_could_end_it():
    text = script_json({"a": "</SCRIPT><!--\u2028\ud800"})
    assert "<" not in text and "\u2028" not in text and text.encode()
    with pytest.raises(ValueError):
        script_json([float("nan")])


# Week 1.


def shown_bars(seen) -> dict[str, float]:
    return {
        line.locator(".token").text_content(): float(line.locator(".share").text_content().split()[0])
        for line in seen.frame.locator(".bars .row:not(.wide)").all()
    }


@pytest.mark.slow
def test_the_bars_are_the_row_of_the_table_at_its_temperature(visit):
    seen = visit(bigram())
    seen.frame.locator("[role=listbox] [tabindex='0']").focus()
    seen.page.keyboard.press("t")
    row = pairs()[CHARS.encode("t")[0]].double()
    for exponent, temperature in (("0", 1.0), ("-0.5", 10**-0.5), ("1", 10.0)):
        seen.frame.locator("#temperature").fill(exponent)
        expected = (row.log() / temperature).softmax(0)
        bars = shown_bars(seen)
        assert len(bars) == min(12, int((row > 0).sum()))
        for token, share in bars.items():
            index = CHARS.encode({"␣": " ", "⏎": "\n"}.get(token, token))[0]
            assert share == pytest.approx(100 * expected[index].item(), abs=0.51)


@pytest.mark.slow
def test_each_draw_takes_the_character_on_whose_part_of_the_line_u_falls(visit):
    seen = visit(bigram())
    draw = seen.frame.get_by_role("button", name="Draw the next")
    draw.focus()
    table, text, names = pairs(), "\n", {"␣": " ", "⏎": "\n"}
    for _ in range(25):
        seen.page.keyboard.press("Enter")
        before, u, after = re.search(r"after (.): u = ([\d.]+) falls on (.),", status(seen)).groups()
        before, after = names.get(before, before), names.get(after, after)
        assert before == text[-1]
        row = table[CHARS.encode(before)[0]].double() / table[CHARS.encode(before)[0]].sum()
        order = row.argsort(descending=True, stable=True)
        place = order.tolist().index(CHARS.encode(after)[0])
        end = row[order].cumsum(0)[place].item()
        assert end - row[order][place].item() - 1e-3 <= float(u) <= end + 1e-3
        text += after
    shown = seen.frame.locator("pre").text_content()
    assert shown.replace("⏎\n", "\n").replace("␣", " ") == text


@pytest.mark.slow
def test_pointing_at_a_cell_says_how_often_the_pair_occurs(visit):
    seen = visit(bigram())
    cell, edge = seen.frame.evaluate(
        "(() => { const s = document.querySelector('canvas.map').clientWidth - 2, n = 13;"
        " const c = s / (n + LABELS); return [c, s - n * c]; })()".replace("13", str(CHARS.vocab_size))
    )
    i, j = CHARS.encode("th")
    at = {"x": 1 + edge + (j + 0.5) * cell, "y": 1 + edge + (i + 0.5) * cell}
    seen.frame.locator("canvas.map").hover(position=at)
    words = seen.frame.get_by_text("t then h:").text_content()
    assert f"{pairs()[i, j]} times" in words
    seen.frame.locator("canvas.map").click(position=at)
    assert seen.frame.locator("[aria-selected=true]").text_content() == "t"


@pytest.mark.slow
def test_a_character_that_nothing_follows_is_said_to_have_no_next(visit):
    table = pairs().float()
    table[0] = 0
    seen = visit(bigram_explorer(table, CHARS))
    seen.frame.get_by_role("button", name="Draw the next").click()
    assert "there is nothing to draw" in status(seen)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (torch.ones(3, 4), "shape"),
        (torch.ones(200, 200), "at most 128"),
        (-torch.ones(3, 3), "below 0"),
        (torch.full((3, 3), float("nan")), "finite"),
    ],
    ids=["not-square", "too-large", "negative", "nan"],
)
def test_a_table_that_is_none_is_refused(table, says):
    with pytest.raises(ValueError, match=says):
        bigram_explorer(table, CHARS)


# Week 3.


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_those_that_the_model_computes(visit, name):
    torch.manual_seed(1)
    model = shake(MODELS[name]()).eval()
    maps = attention_maps(model, torch.tensor([CHARS.encode(PHRASE)]))
    seen = visit(attention_explorer(model, PHRASE, CHARS))
    rows = """(() => {
        const data = JSON.parse(document.getElementById("data").textContent);
        return data.layers.map((layer) => {
            layer.queries = numbersOf(layer.q);
            layer.keys = numbersOf(layer.k);
            return Array.from({ length: layer.heads }, (_, head) =>
                new Head(layer, head, data.tokens.length).rows.map((row) => row.weights));
        });
    })()"""
    for shown, expected in zip(seen.frame.evaluate(rows), maps, strict=True):
        assert torch.allclose(torch.tensor(shown), expected[0], atol=2e-6)


@pytest.mark.slow
def test_the_arithmetic_of_a_cell_adds_up_to_its_weight(visit):
    torch.manual_seed(1)
    model = shake(MODELS["week 3's"]()).eval()
    maps = torch.cat(attention_maps(model, torch.tensor([CHARS.encode(PHRASE)])))
    seen = visit(attention_explorer(model, PHRASE, CHARS))
    seen.frame.get_by_role("radio", name="Layer 1, head 1").focus()
    seen.page.keyboard.press("ArrowDown")
    seen.page.keyboard.press("ArrowRight")
    seen.frame.get_by_role("option").nth(11).click()
    seen.page.keyboard.press("ArrowLeft")
    weights = maps[1, 1, 10]
    key = int(weights.argmax())
    assert f"position {key + 1}) {100 * weights[key]:.0f} %" in status(seen)
    seen.frame.locator(".bars button").nth(2).click()
    key = int(weights.argsort(descending=True)[2])
    terms = [
        [float(cell.text_content().replace("−", "-")) for cell in row.locator("td").all()]
        for row in seen.frame.locator(".sums tbody tr:not(.total)").all()
    ]
    total = float(seen.frame.locator(".sums tr.total td").last.text_content().replace("−", "-"))
    score = float(seen.frame.locator(".score").text_content().replace("−", "-"))
    assert len(terms) == 8 and [row[0] for row in terms] == list(range(1, 9))
    for _, q, k, product in terms:
        assert q * k == pytest.approx(product, abs=0.01 + 0.002 * (abs(q) + abs(k)))
    assert sum(row[3] for row in terms) == pytest.approx(total, abs=0.005)
    assert total / np.sqrt(8) == pytest.approx(score, abs=0.001)
    assert float(seen.frame.locator(".weight").text_content()) == pytest.approx(weights[key].item(), abs=6e-5)


@pytest.mark.slow
def test_a_cell_of_the_future_is_said_to_be_hidden(visit):
    seen = visit(attention())
    box = seen.frame.locator("canvas.map").bounding_box()
    seen.frame.locator("canvas.map").click(position={"x": box["width"] - 8, "y": box["height"] / 2})
    assert "its weight exactly 0" in seen.frame.locator(".sums").text_content()


def test_what_has_no_attention_or_no_such_layer_is_refused():
    model = MODELS["week 3's"]()
    with pytest.raises(ValueError, match="_Embeds has no layer with queries and keys"):
        attention_explorer(_Embeds(), PHRASE, CHARS)
    with pytest.raises(ValueError, match="has the layers 0 to 1"):
        attention_explorer(model, PHRASE, CHARS, layers=(2,))
    with pytest.raises(ValueError, match="text is empty"):
        attention_explorer(model, "", CHARS)


def test_a_model_in_training_is_in_training_afterwards():
    model = MODELS["week 3's"]().train()
    attention_explorer(model, PHRASE, CHARS)
    assert model.training and not model.layers[0]._forward_pre_hooks


class _Embeds(torch.nn.Embedding):
    def __init__(self):
        super().__init__(CHARS.vocab_size, 2)
