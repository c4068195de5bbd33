"""The explorers of rounded weights and of ranks: what they compute is what the course and PyTorch do."""

import pytest
import torch

from shared.course.explorers import quantization_explorer, rank_explorer
from shared.quantization.packing import NF4, Int4Weight, Int8Weight, NF4Weight
from tests.course.number_explorers import changes, quantization, rank, weight
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


# Ranks.


@pytest.mark.slow
def test_the_matrix_at_a_rank_is_the_best_one_of_that_rank(visit):
    seen = visit(rank())
    found = seen.frame.evaluate(
        """() => {
            const data = JSON.parse(document.getElementById("data").textContent);
            const all = data.changes.map((change) => new Change(change, data.out, data.in));
            const at = (change, r) => [change.share(r), Array.from(change.sumOf(0, r))];
            return all.map((change) => [0, 1, 3, 10, 24].map((r) => at(change, r)));
        }"""
    )
    for change, by_rank in zip(changes().values(), found, strict=True):
        u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
        for r, (share, numbers) in zip((0, 1, 3, 10, 24), by_rank, strict=True):
            assert share == pytest.approx((s[:r].square().sum() / s.square().sum()).item(), abs=1e-6)
            best = (u[:, :r] * s[:r]) @ v[:r]
            off = (torch.tensor(numbers, dtype=torch.float64).view(40, 24) - best).norm() / s.norm()
            assert off < 5e-4  # float16 columns and rows


@pytest.mark.slow
def test_the_rank_says_what_is_caught_and_what_it_costs(visit):
    seen = visit(rank())
    s = torch.linalg.svdvals(changes()["whole"].double()).square()
    for r, loss in ((3, "rank 2, the loss is 3.500"), (16, "rank 8, the loss is 3.200")):
        seen.frame.locator("#rank").fill(str(r))
        share = (s[:r].sum() / s.sum()).item()
        caught, numbers = (
            number(text) for text in seen.frame.locator(".row.scheme .share").all_text_contents()
        )
        assert caught == pytest.approx(100 * share, abs=0.51)
        assert numbers == pytest.approx(100 * r * 64 / 960, abs=0.51)
        assert f"in {r * 64:,} numbers instead of 960" in status(seen) and loss in status(seen)
    seen.frame.get_by_role("radio", name="whole").focus()
    seen.page.keyboard.press("ArrowRight")
    assert "It has 3 pieces in all" in status(seen) and "hold 100 %" in status(seen)


@pytest.mark.slow
def test_one_number_is_the_sum_of_its_terms(visit):
    seen = visit(rank())
    whole = changes()["whole"]
    row, column = divmod(int(whole.abs().argmax()), 24)
    assert seen.frame.locator("#row").input_value() == str(row + 1)
    assert seen.frame.locator("#column").input_value() == str(column + 1)
    canvas = seen.frame.locator("canvas.weights").first
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 7.5 / 24, "y": box["height"] * 5.5 / 40})
    seen.frame.locator("#rank").fill("5")
    u, s, v = torch.linalg.svd(whole.double(), full_matrices=False)
    terms = s[:5] * u[5, :5] * v[:5, 7]
    shown = [number(text) for text in seen.frame.locator("td.signed").all_text_contents()]
    assert shown == pytest.approx(terms.tolist(), rel=0.01, abs=1e-3)
    kept, exact = (number(text) for text in seen.frame.locator(".terms td.value").all_text_contents())
    assert kept == pytest.approx(terms.sum().item(), rel=0.01, abs=1e-3)
    assert exact == pytest.approx(whole[5, 7].item(), rel=0.01, abs=1e-3)


def test_changes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="all of one shape"):
        rank_explorer({"a": torch.ones(2, 3), "b": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="at least one matrix"):
        rank_explorer({})
    with pytest.raises(ValueError, match="all zeros"):
        rank_explorer({"a": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="a rank is 0 or more"):
        rank_explorer({"a": torch.ones(2, 3)}, {-1: 3.0})
