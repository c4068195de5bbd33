"""The pictures of the data flow: as their module draws them, readable by all, and true of the code."""

import re
from itertools import combinations
from xml.etree import ElementTree

import pytest

from shared.course.pictures.catalogue import PICTURES, picture_path
from shared.course.pictures.drawing import KINDS, LETTERS, SMALLEST, STYLE, WIDTH, Box, Picture
from shared.runtime import ROOT
from tests.course import evidence

ALL = pytest.mark.parametrize("draw", PICTURES, ids=lambda draw: draw.__name__)
SVG = "{http://www.w3.org/2000/svg}"


@ALL
def test_the_files_are_what_the_code_draws(draw):
    assert picture_path(draw).read_text(encoding="utf-8") == draw().svg(), (
        "run python -m shared.course.pictures"
    )


def test_no_file_is_left_that_nothing_draws():
    drawn = {picture_path(draw).name for draw in PICTURES} | {"architecture.svg"}
    assert {path.name for path in (ROOT / "docs" / "images").glob("*.svg")} == drawn


def test_every_picture_is_shown_in_a_notebook_with_words_for_it():
    pages = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("weeks/*/notebook.ipynb"))]
    shown = [
        found
        for page in pages
        for found in re.findall(r"!\[([^\]]+)\]\(../../docs/images/(\w+)\.svg\)", page)
    ]
    assert {name for _, name in shown} == {draw.__name__ for draw in PICTURES}
    assert min(len(alt) for alt, _ in shown) > 40


@ALL
def test_a_picture_is_read_aloud_and_its_words_are_large_enough(draw):
    root = ElementTree.fromstring(draw().svg())
    named = {element.get("id"): element.text for element in root if element.get("id")}
    assert root.get("role") == "img" and root.get("aria-labelledby").split() == ["title", "desc"]
    assert 20 < len(named["title"]) < 110 and len(named["desc"]) > 100
    sizes = [int(element.get("font-size")) for element in root.iter(f"{SVG}text")]
    assert len(sizes) > 5 and min(sizes) >= SMALLEST == 12
    assert SMALLEST * 360 / int(root.get("width")) >= 9  # pixels, on a phone that is 360 wide


# ---- what is said of the code


@ALL
def test_shapes_are_those_of_a_real_pass(draw):
    known = evidence.shapes()
    for claim in draw().shapes:
        assert claim.of in known, claim
        assert evidence.evaluated(claim.words) == known[claim.of], claim


@ALL
def test_types_are_those_under_autocast(draw):
    for claim in draw().types:
        assert evidence.types()[claim.of] == claim.words, claim


@ALL
def test_names_are_those_of_the_code(draw):
    for claim in draw().names:
        assert claim.of.endswith(claim.words) and evidence.has(claim.of), claim


def test_letters_stand_for_different_sizes():
    assert set(evidence.SIZES) == set(LETTERS)
    assert len(set(evidence.SIZES.values())) == len(LETTERS)


# ---- how it looks


def overlap(a: Box, b: Box) -> bool:
    apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
    return not apart


def inside(a: Box, b: Box) -> bool:
    return b.x <= a.x and a.x + a.width <= b.x + b.width and b.y <= a.y and a.y + a.height <= b.y + b.height


def shrunk(box: Box) -> Box:
    return Box(box.x + 1, box.y + 1, box.width - 2, box.height - 2)


@ALL
def test_nothing_lies_on_anything_else(draw):
    picture = draw()
    assert [pair for pair in combinations(picture.boxes, 2) if overlap(*pair)] == []
    assert [pair for pair in combinations(picture.words, 2) if overlap(*pair)] == []
    for words in picture.words:
        assert all(inside(words, box) for box in picture.boxes if overlap(words, box)), words
        if not any(inside(words, box) for box in picture.boxes):  # a box may reach over several groups
            assert all(inside(words, group) for group in picture.groups if overlap(words, group)), words
    lines = [
        Box(min(a[0], b[0]), min(a[1], b[1]), abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in picture.lines
    ]
    solid = [*picture.words, *(shrunk(box) for box in picture.boxes)]
    assert [(line, thing) for line in lines for thing in solid if overlap(line, thing)] == []


MEASURE = """() => {
  const place = e => { const b = e.getBBox(); return [b.x, b.y, b.width, b.height]; };
  const boxes = "rect.values, rect.learned, rect.frozen, rect.step, rect.chosen, rect.week";
  return [
    [...document.querySelectorAll("svg > text")].map(e => [e.textContent, ...place(e)]),
    [...document.querySelectorAll(boxes)].map(place),
  ];
}"""


@ALL
def test_words_stay_in_their_places_in_a_browser(draw, chromium):
    """With the fonts that are there."""
    page = chromium.new_page()
    page.set_content(draw().svg())
    texts, rects = page.evaluate(MEASURE)
    page.close()
    # A letter's box is 1.16 times its size, a fifth of that above and below what is drawn.
    words = [
        (text, Box(x, y + 0.2 * height, width, 0.6 * height)) for text, x, y, width, height in texts if text
    ]
    boxes = [Box(*rect) for rect in rects if rect[2] > 22]
    assert [(a, b) for (a, one), (b, other) in combinations(words, 2) if overlap(one, other)] == []
    for text, place in words:
        assert place.x >= 0 and place.x + place.width <= WIDTH - 4, text
        assert all(inside(place, box) for box in boxes if overlap(place, box)), text


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
    picture = Picture("T", "An idea.", "A picture.")
    with pytest.raises(AssertionError, match="too wide for its box"):
        picture.box(Box(10, 50, 40, 30), "far too long for it")
    with pytest.raises(AssertionError, match="leaves the picture"):
        picture.write(WIDTH - 10, 60, "over the edge", anchor="start")
    with pytest.raises(AssertionError, match="tiny"):
        picture.write(100, 60, "tiny", size=11)
