"""The explorers of number formats: numbers, bits and gradients are those of PyTorch."""

import math

import numpy as np
import pytest
import torch

from shared.course.explorers import loss_scale_explorer, number_explorer
from shared.course.explorers.formats import FORMATS
from tests.course.number_explorers import gradients, loss_scale, numbers
from tests.course.test_explorers import status

INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
ROUND = """([name, numbers]) => {
    const { formats } = JSON.parse(document.getElementById("data").textContent);
    const format = formats.find((format) => format.name === name);
    return numbers.map((number) => [bitsOf(format, codeOf(format, number)), String(rounded(format, number))]);
}"""


def bits(x: torch.Tensor, dtype: torch.dtype) -> list[str]:
    x = x.to(dtype)
    width = 8 * x.itemsize
    return [f"{code % 2**width:0{width}b}" for code in x.view(INTEGERS[x.itemsize]).tolist()]


def hard_numbers(dtype: torch.dtype) -> torch.Tensor:
    """float32 of all sizes, and the format's own numbers with the middles between neighbours and what lies
    next to those.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**31), 2**31, (3000,), generator=generator).to(torch.int32)
    anything = codes.view(torch.float32)
    anything = anything[anything.isfinite()]
    size = dtype.itemsize
    own = torch.arange(0, 2 ** (8 * size - 1), 1 if size == 1 else 2 ** (8 * size - 11) + 1)
    numbers = own.to(INTEGERS[size]).view(dtype)
    above = (own + 1).to(INTEGERS[size]).view(dtype)
    finite = numbers.float().isfinite() & above.float().isfinite()
    own, above = numbers.double()[finite], above.double()[finite]
    middle = ((own + above) / 2).float()
    beside = [torch.nextafter(middle, torch.tensor(end)) for end in (math.inf, 0.0)]
    positive = torch.cat([own.float(), middle, *beside])
    ends = torch.tensor([0.0, 464.0, 464.1, 480.0, 61439.0, 61440.0, 65519.0, 65520.0, 3.4e38])
    return torch.cat([anything, positive, -positive, ends])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_roundings_are_those_of_pytorch(visit, name):
    dtype = FORMATS[name][0]
    x = hard_numbers(dtype)
    shown = visit(numbers()).frame.evaluate(ROUND, [name, x.double().tolist()])
    expected = x.to(dtype).double()
    for number, code, value, (own_bits, own_value) in zip(
        x.tolist(), bits(x, dtype), expected.tolist(), shown, strict=True
    ):
        if math.isnan(value):
            assert own_value == "NaN", number
        else:
            assert own_bits == code and float(own_value) == value, number


def row(seen, name: str) -> list[str]:
    return seen.frame.locator(".format", has_text=name).locator("code, .becomes, .soft").all_text_contents()


@pytest.mark.slow
def test_a_number_that_is_typed_is_rounded_in_every_format(visit):
    seen = visit(numbers())
    for typed, number in (("0.1", 0.1), ("-2^-24", -(2.0**-24)), ("70,000", 70000.0), ("π", math.pi)):
        seen.frame.locator("#number").fill(typed)
        x = torch.tensor([number])
        for name, (dtype, *_) in FORMATS.items():
            shown_bits, becomes, off = row(seen, name)
            value = x.to(dtype).double().item()
            if math.isfinite(value):
                assert shown_bits == bits(x, dtype)[0]
                assert float(becomes.replace("−", "-")) == pytest.approx(value, rel=1e-7)
                share = abs(value - x.double().item()) / abs(x.double().item())
                assert (
                    off == "exact" if share == 0 else float(off[:-2]) == pytest.approx(100 * share, rel=0.06)
                )
            else:
                assert becomes == "inf" and off == "lost"
    for typed in ("one", "1e60", "", "nan"):
        seen.frame.locator("#number").fill(typed)
        assert "no number of float32" in status(seen)
    assert row(seen, "bf16")[1] == "3.140625"


@pytest.mark.slow
def test_a_bit_that_is_turned_over_makes_the_number_of_its_code(visit):
    seen = visit(numbers())
    seen.frame.get_by_role("radio", name="fp8 E5M2").click()
    seen.frame.locator(".bits [tabindex='0']").focus()
    code = int(bits(torch.tensor([math.pi]), torch.float8_e5m2)[0], 2)
    for key, bit in (("End", 7), ("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2)):
        seen.page.keyboard.press(key)
        seen.page.keyboard.press("Enter")
        turned = code ^ (1 << (7 - bit))
        value = torch.tensor([turned], dtype=torch.uint8).view(torch.float8_e5m2).item()
        if not math.isfinite(value):
            continue
        code = turned
        assert float(seen.frame.locator("strong.value").text_content().replace("−", "-")) == pytest.approx(
            value, rel=1e-7
        )
        shown = seen.frame.locator(".bits button").all_text_contents()
        assert "".join(shown) == f"{code:08b}"


@pytest.mark.slow
def test_the_next_below_and_above_are_the_formats_neighbours(visit):
    seen = visit(number_explorer(1.0))
    seen.frame.get_by_role("radio", name="fp16").click()
    above = seen.frame.get_by_role("button", name="the next above")
    below = seen.frame.get_by_role("button", name="the next below")
    for press, value in ((above, 1 + 2**-10), (below, 1.0), (below, 1 - 2**-11)):
        press.focus()
        seen.page.keyboard.press("Enter")
        assert float(seen.frame.locator("#number").input_value()) == pytest.approx(value, rel=1e-7)
    seen.frame.locator("#number").fill("70000")
    assert above.is_disabled() and "Beyond it comes inf" in seen.frame.locator("body").text_content()
    below.click()
    assert float(seen.frame.locator("#number").input_value()) == 65504


@pytest.mark.slow
def test_a_tie_goes_to_the_number_whose_last_bit_is_0(visit):
    seen = visit(numbers())
    seen.frame.get_by_role("radio", name="bf16").click()
    for number, nearest in ((257, 256), (259, 260)):
        seen.frame.locator("#number").fill(str(number))
        assert torch.tensor(number).bfloat16().item() == nearest
        assert f"makes {nearest} of {number}" in status(seen)
        assert (
            "exactly in the middle" in seen.frame.locator("section[aria-label='One format']").text_content()
        )


@pytest.mark.slow
def test_the_line_counts_what_is_in_sight_and_a_drag_and_a_click_move_it(visit):
    seen = visit(numbers())
    seen.frame.get_by_role("radio", name="fp8 E4M3").click()
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().unique()
    inside = int(((codes >= -0.5) & (codes <= 8.5)).sum())  # 4 in the middle, 9 wide at first; one 0
    assert f"are {inside} of its numbers" in status(seen)
    box = seen.frame.locator("canvas.numbers").bounding_box()
    y = box["y"] + 40
    seen.page.mouse.move(box["x"] + box["width"] / 2, y)
    seen.page.mouse.down()
    seen.page.mouse.move(box["x"] + box["width"] / 2 - 0.3 * box["width"], y, steps=5)
    seen.page.mouse.up()
    moved = int(((codes >= 2.2) & (codes <= 11.2)).sum())
    assert f"are {moved} of its numbers" in status(seen)
    seen.page.mouse.click(box["x"] + box["width"] / 2, y)
    assert float(seen.frame.locator("#number").input_value()) == pytest.approx(6.7, abs=0.03)


def test_a_number_that_float32_does_not_have_is_refused():
    for number in (1e39, math.inf, math.nan):
        with pytest.raises(ValueError, match="the largest of float32"):
            number_explorer(number)


# Gradients under a loss scale.


@pytest.mark.slow
def test_fates_and_errors_are_those_of_pytorch(visit):
    seen = visit(loss_scale())
    found = seen.frame.evaluate(
        """() => {
            const data = JSON.parse(document.getElementById("data").textContent);
            const sizes = numbersOf(data.sizes);
            return data.formats.map((format) => [0, 16, 33, 40].map((power) =>
                [fatesOf(format, sizes, 2 ** power), errorsOf(format, sizes, 2 ** power).map(String)]));
        }"""
    )
    names = [name for name in FORMATS if name != "fp32"]
    sizes = torch.tensor(
        seen.frame.evaluate(
            "Array.from(numbersOf(JSON.parse(document.getElementById('data').textContent).sizes))"
        )
    )
    for name, by_scale in zip(names, found, strict=True):
        dtype = FORMATS[name][0]
        for power, (fates, errors) in zip((0, 16, 33, 40), by_scale, strict=True):
            nearest = (sizes * 2.0**power).to(dtype).float()
            expected = torch.full((len(sizes),), 2)
            expected[nearest < torch.finfo(dtype).tiny] = 1
            expected[nearest == 0] = 0
            expected[~nearest.isfinite()] = 3
            if name == "fp8 E4M3":  # has no inf: what is nearer to 480, if it had that, than to 448
                expected[sizes * 2.0**power > 464] = 3
            assert fates == expected.tolist(), (name, power)
            off = (nearest / 2.0**power - sizes).double().abs() / sizes.double()
            shown = np.array([float(error) for error in errors])
            finite = nearest.isfinite().numpy()
            assert (
                np.allclose(shown[finite], off.numpy()[finite], atol=1e-6) and np.isinf(shown[~finite]).all()
            )


@pytest.mark.slow
def test_the_shares_are_those_of_all_gradients(visit):
    seen = visit(loss_scale())
    moved = gradients().abs()
    moved = moved[moved > 0]
    seen.frame.locator("#scale").focus()
    for power in range(3):
        lost = ((moved * 2.0**power).half() == 0).double().mean().item()
        shown = seen.frame.locator(".row.zero .share").text_content()
        assert float(shown.split()[0]) == pytest.approx(100 * lost, abs=0.55)
        assert f"{shown} become 0" in status(seen)
        seen.page.keyboard.press("ArrowRight")
    seen.frame.locator("#scale").fill("40")
    assert seen.frame.locator(".row.over .share").text_content() != "0 %"


@pytest.mark.slow
def test_one_gradient_is_followed_there_and_back(visit):
    seen = visit(loss_scale())
    seen.frame.get_by_role("radio", name="fp16").click()
    seen.frame.locator("#which").fill("1500")
    for power in ("0", "12"):
        seen.frame.locator("#scale").fill(power)
        cells = seen.frame.locator("table.way td.value").all_text_contents()
        size, scaled, nearest, back = (float(cell.replace("−", "-")) for cell in cells)
        exact = torch.tensor(size) * 2.0 ** int(power)
        assert scaled == pytest.approx(exact.item(), rel=1e-5)
        assert nearest == pytest.approx(exact.half().item(), rel=1e-3)
        assert back == pytest.approx(nearest / 2.0 ** int(power), rel=1e-4)


def test_gradients_that_are_none_are_refused():
    with pytest.raises(ValueError, match="all gradients are 0"):
        loss_scale_explorer(torch.zeros(4))
    with pytest.raises(ValueError, match="not finite"):
        loss_scale_explorer(torch.tensor([1.0, math.inf]))
