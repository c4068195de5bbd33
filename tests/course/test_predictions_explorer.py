"""Week 6's explorer: what each model expected, and what the text cost it, are what PyTorch says."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from shared.course.explorers import predictions_explorer
from shared.tokenizers import BPETokenizer
from tests.course.test_explorers import CHARS, PHRASE, predictions, readers, small_gpt, status


def costs(model, tokenizer) -> tuple[list[str], list[float]]:
    """The tokens of the phrase, and the bits of all but the first."""
    ids = torch.tensor(tokenizer.encode(PHRASE))
    with torch.no_grad():
        logits = model(ids[None])[0, :-1]
    bits = cross_entropy(logits, ids[1:], reduction="none") / math.log(2)
    return [tokenizer.decode([i]) for i in ids.tolist()], bits.tolist()


def test_costs_and_expectations_are_the_models():
    for (model, tokenizer), shown in zip(readers().values(), predictions().data["models"], strict=True):
        tokens, bits = costs(model, tokenizer)
        assert shown["tokens"] == tokens and "".join(tokens) == PHRASE
        assert [place["bits"] for place in shown["places"]] == pytest.approx(bits, abs=1e-3)
        with torch.no_grad():
            rows = model(torch.tensor([tokenizer.encode(PHRASE)]))[0].softmax(-1)
        for t, place in enumerate(shown["places"]):
            best = rows[t].topk(8)
            assert [share for _, share, _ in place["expected"]] == pytest.approx(
                best.values.tolist(), rel=1e-3
            )
            assert [token for token, _, _ in place["expected"]] == [
                tokenizer.decode([i]) for i in best.indices.tolist()
            ]
            following = tokenizer.encode(PHRASE)[t + 1]
            assert place["rank"] == rows[t].argsort(descending=True).tolist().index(following) + 1
            assert place["p"] == pytest.approx(rows[t, following].item(), rel=1e-3)


def test_bits_per_byte_are_those_of_the_part_that_all_predict():
    data = predictions().data
    read = {name: costs(*pair) for name, pair in readers().items()}
    firsts = [len(tokens[0]) for tokens, _ in read.values()]
    assert data["start"] >= max(firsts)
    for shown, (tokens, bits) in zip(data["models"], read.values(), strict=True):
        ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
        assert data["start"] in ends
        counted = sum(cost for begin, cost in zip(ends, bits) if begin >= data["start"])
        size = len(PHRASE.encode()) - data["start"]
        assert shown["bits_per_byte"] == pytest.approx(counted / size, abs=1e-3)


@pytest.mark.slow
def test_a_place_that_is_chosen_in_one_is_chosen_in_all(visit):
    seen = visit(predictions())
    pieces, bits = costs(*readers()["by pairs"])
    long = next(i for i in range(2, len(pieces)) if len(pieces[i]) > 2)
    begin, end = len("".join(pieces[:long])), len("".join(pieces[: long + 1]))
    lists = seen.frame.get_by_role("listbox")
    lists.nth(1).locator("[tabindex='0']").focus()
    seen.page.keyboard.press("Home")
    for _ in range(long):
        seen.page.keyboard.press("ArrowRight")
    marked = [chip.text_content() for chip in lists.nth(0).locator(".part-of").all()]
    shown = pieces[long].replace(" ", "␣").replace("\n", "⏎")
    assert "".join(marked) == shown and len(marked) == len(pieces[long])
    _, letters = costs(*readers()["by characters"])
    sum_of = {"by characters": sum(letters[begin - 1 : end - 1]), "by pairs": bits[long - 1]}
    words = status(seen)
    for name, expected in sum_of.items():
        said = words.split(f"‹{shown}› costs {name} ")[1].split(" bits")[0]
        assert float(said) == pytest.approx(expected, abs=0.06)
    assert f"in {len(marked)} tokens" in words
    lists.nth(0).get_by_role("option").nth(begin + 1).click()
    assert lists.nth(1).locator("[aria-selected=true]").text_content() == shown
    frames = seen.frame.locator(".bars .token.right")
    assert frames.count() == 2 and frames.nth(1).text_content() == shown


def test_what_cannot_be_compared_is_refused():
    model = small_gpt()
    with pytest.raises(ValueError, match="no models"):
        predictions_explorer({}, PHRASE)
    with pytest.raises(ValueError, match="text is empty"):
        predictions_explorer({"one": (model, CHARS)}, "")
    with pytest.raises(ValueError, match="no place where all models begin a token"):
        predictions_explorer({"one": (model, CHARS)}, "t")
    _, bpe = readers()["by pairs"]
    assert isinstance(bpe, BPETokenizer)
    with pytest.raises(ValueError, match="by pairs: its tokens cut 'naïve' within characters"):
        predictions_explorer({"by pairs": readers()["by pairs"]}, "naïve")
