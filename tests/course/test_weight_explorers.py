"""The explorer of rounded weights: what it computes is what the course and PyTorch do."""

import pytest
import torch

from shared.course.explorers import quantization_explorer
from shared.quantization.packing import NF4, Int4Weight, Int8Weight, NF4Weight
from tests.course.number_explorers import quantization, weight
from tests.course.test_explorers import status

PACKED = {
    "int8": lambda rows, size: Int8Weight(rows, size),
    "int4": lambda rows, size: Int4Weight(rows, size),
    "NF4": lambda rows, size: NF4Weight(rows, size, double_quant=False),
}
ROUNDED = """([scheme, size]) => {
    const data = JSON.parse(document.getElementById("data").textContent);
    const numbers = numbersOf(data.weight);
    return Array.from({ length: data.rows }, (_, row) => {
        const of = Array.from(numbers.subarray(row * data.columns, (row + 1) * data.columns));
        return roundedRow(scheme, of, size, data.levels.map(f32)).back;
    });
}"""


def packed(scheme: str, size: int, rows: torch.Tensor) -> torch.Tensor:
    return PACKED[scheme](rows, size).rows(slice(None))


def number(text: str) -> float:
    return float(text.lstrip("<> ").replace("−", "-").split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", PACKED)
def test_weights_are_rounded_as_the_courses_are(visit, scheme):
    seen = visit(quantization())
    for size in (32, 64, 128):
        shown = torch.tensor(seen.frame.evaluate(ROUNDED, [scheme, size]))
        assert torch.equal(shown, packed(scheme, size, weight())), size


def bars(seen) -> list[float]:
    return [number(text) for text in seen.frame.locator(".row.scheme .share").all_text_contents()]


@pytest.mark.slow
def test_a_larger_weight_costs_those_that_share_its_scale(visit):
    rows = weight()
    seen = visit(quantization())
    seen.frame.locator("#row").fill("6")
    seen.frame.get_by_role("radio", name="groups of 64").click()
    seen.frame.locator("#group").fill("2")
    typical = rows.square().mean().sqrt()
    for exponent in (0.0, 0.5, 1.0):
        seen.frame.locator("#times").fill(str(exponent))
        spoiled = rows.clone()
        spoiled[5, 70] *= 10**exponent
        expected = []
        for size in (32, 64, 128):
            off = (packed("int4", size, spoiled) - spoiled)[5]
            off = torch.cat([off[:70], off[71:]])
            expected.append(100 * (off.square().mean().sqrt() / typical).item())
        assert bars(seen) == pytest.approx(expected, rel=0.02, abs=0.51)
        group = packed("int4", 64, spoiled)[5, 64:]
        codes = len(group.unique())
        assert f"Row 6, group 2: {codes} of 16 codes in use" in status(seen)
    assert bars(seen)[0] < bars(seen)[1] < bars(seen)[2]


@pytest.mark.slow
def test_it_opens_at_the_group_that_is_most_off_and_a_click_and_keys_choose_others(visit):
    seen = visit(quantization())
    off = (packed("int4", 32, weight()) - weight()).unflatten(1, (-1, 32)).square().mean(-1).flatten()
    row, group = divmod(int(off.argmax()), 4)
    assert f"Row {row + 1}, group {group + 1}:" in status(seen)
    error = 100 * ((packed("int4", 32, weight()) - weight()).norm() / weight().norm()).item()
    assert f"5 bits for each weight, off by {error:.1f} %" in status(seen)
    canvas = seen.frame.locator("canvas.weights").first
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 0.9, "y": box["height"] * 1.5 / 12})
    assert "Row 2, group 4:" in status(seen)
    seen.frame.locator("#row").focus()
    seen.page.keyboard.press("ArrowRight")
    seen.frame.locator("#group").focus()
    seen.page.keyboard.press("Home")
    assert "Row 3, group 1:" in status(seen)
    seen.frame.get_by_role("radio", name="int4").focus()
    seen.page.keyboard.press("ArrowLeft")
    assert "int8, groups of 32: 9 bits" in status(seen) and "of 255 codes" in status(seen)


@pytest.mark.parametrize(
    ("given", "levels", "says"),
    [
        (torch.ones(4, 33), NF4, "multiple of 32"),
        (torch.ones(128, 128), NF4, "at most 8,192"),
        (torch.zeros(2, 32), NF4, "all zeros"),
        (torch.full((2, 32), float("inf")), NF4, "not finite"),
        (torch.ones(2, 32), NF4[:8], "give 16"),
    ],
    ids=["columns", "too-large", "zeros", "inf", "levels"],
)
def test_a_weight_or_levels_that_are_none_are_refused(given, levels, says):
    with pytest.raises(ValueError, match=says):
        quantization_explorer(given, levels)
