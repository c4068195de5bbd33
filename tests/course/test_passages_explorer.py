"""The passages' explorer: its map is scikit-learn's, its fusion the index's, its counts are those of both."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from shared.course.explorers.passages import plane
from shared.retrieval.index import reciprocal_rank_fusion
from tests.course.explored import ASKED, CHUNKS, TEXTS, by_letters, by_vectors, passages, vectors_of
from tests.course.test_explorers import status

WEIGHTS = (0.0, 0.15, 0.5, 1.0)


def numbers(hits) -> list[int]:
    return [int(chunk.id) for chunk, _ in hits]


def fused(question: str, k: float, weight: float) -> list[tuple[int, float]]:
    rankings = [numbers(by_vectors(question)), numbers(by_letters(question))]
    return reciprocal_rank_fusion(rankings, k, [1.0, weight])


def test_the_plane_is_that_of_scikit_learn():
    texts, asked = vectors_of(TEXTS), vectors_of(list(ASKED))
    known = PCA(2, svd_solver="full").fit(texts.astype(np.float64))
    found, questions, share = plane(texts, asked)
    assert share == pytest.approx(known.explained_variance_ratio_.sum(), abs=1e-4)
    signs = np.sign((found * known.transform(texts)).sum(0))
    assert np.allclose(found, known.transform(texts) * signs, atol=1e-4)
    assert np.allclose(questions, known.transform(asked) * signs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("k", [60, 10, 1])
def test_the_fusion_is_that_of_the_index(visit, k):
    seen = visit(passages())
    script = """([k, weight]) => JSON.parse(document.getElementById("data").textContent).questions.map(
        (entry) => fusion(entry.found.map(({ ids }) => integersOf(ids, Uint16Array)), k, [1, weight]))"""
    for weight in WEIGHTS:
        for question, ranking in zip(ASKED, seen.frame.evaluate(script, [k, weight]), strict=True):
            expected = fused(question, k, weight)
            assert [number for number, _ in ranking] == [number for number, _ in expected]
            assert [score for _, score in ranking] == pytest.approx([score for _, score in expected])


@pytest.mark.slow
def test_lists_and_counts_follow_the_weight_of_words(visit):
    seen = visit(passages())
    for weight in WEIGHTS:
        seen.frame.locator("#weight").fill(str(weight))
        first = 0
        for index, (question, right) in enumerate(ASKED.items()):
            seen.frame.locator("#question").select_option(str(index))
            expected = fused(question, 60, weight)
            shown = seen.frame.locator("section[aria-label='Found by fused'] .cite").all_text_contents()
            assert [text.removeprefix("✓ ") for text in shown] == [f"page {i}" for i, _ in expected[:5]]
            assert [text.startswith("✓") for text in shown] == [i in right for i, _ in expected[:5]]
            place = min(i for i, (number, _) in enumerate(expected, 1) if number in right)
            assert f"fused: place {place}" in status(seen)
            first += place == 1
        bars = seen.frame.locator("section[aria-label='Found first'] .share").all_text_contents()
        ahead = sum(numbers(by_vectors(question))[0] in right for question, right in ASKED.items())
        assert bars[0] == f"{ahead} of 3" and bars[2] == f"{first} of 3"


@pytest.mark.slow
def test_each_search_has_its_hits_and_scores(visit):
    seen = visit(passages())
    for index, question in enumerate(ASKED):
        seen.frame.locator("#question").select_option(str(index))
        for name, search in (("meaning", by_vectors), ("words", by_letters)):
            section = seen.frame.locator(f"section[aria-label='Found by {name}']")
            shown = section.locator(".share").all_text_contents()
            scores = [float(text.replace("−", "-")) for text in shown]
            assert scores == pytest.approx([score for _, score in search(question)[:5]], abs=0.0051)
    assert (
        "Not read for this question"
        in seen.frame.locator("section[aria-label='Found by re-ranked']").inner_text()
    )
    seen.frame.locator("#question").select_option("0")
    again = seen.frame.locator("section[aria-label='Found by re-ranked'] .cite").all_text_contents()
    assert again == ["✓ page 0", "page 3", "page 5"]


@pytest.mark.slow
def test_keys_choose_questions_searches_and_passages(visit):
    seen = visit(passages())
    seen.frame.get_by_role("button", name="Next question").focus()
    before = seen.frame.locator("#question").input_value()
    seen.page.keyboard.press("Enter")
    assert seen.frame.locator("#question").input_value() != before
    seen.frame.locator("[role=radiogroup] [tabindex='0']").focus()
    seen.page.keyboard.press("ArrowRight")
    assert seen.frame.locator("[aria-checked=true]").text_content() == "words"
    hit = seen.frame.locator("section[aria-label='Found by words'] button").nth(1)
    hit.focus()
    seen.page.keyboard.press("Enter")
    cite = seen.frame.evaluate("document.activeElement.querySelector('.cite').textContent")
    assert seen.frame.locator(".passage").text_content().startswith(cite.removeprefix("✓ "))
    assert seen.frame.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"


@pytest.mark.slow
def test_a_click_on_a_dot_opens_its_passage(visit):
    seen = visit(passages())
    asked, found = vectors_of(list(ASKED)), vectors_of(TEXTS)
    places, questions, _ = plane(found, asked)
    every = np.concatenate([places, questions])
    low, high = every.min(0), every.max(0)
    side = seen.frame.locator("canvas.map").evaluate("canvas => parseFloat(canvas.style.width)")
    at = side / 2 + (places[5] - (low + high) / 2) * [1, -1] * (side - 30) / (high - low).max()
    seen.frame.locator("canvas.map").click(position={"x": 1 + at[0], "y": 1 + at[1]})
    assert seen.frame.locator(".passage").text_content().startswith(f"page 5: {TEXTS[5]}")


@pytest.mark.slow
def test_the_filter_names_the_questions_that_one_search_has_first_and_the_other_not(visit):
    seen = visit(passages())
    words = seen.frame.locator("#filter option").all_text_contents()
    ahead = [
        numbers(by_vectors(question))[0] in right and numbers(by_letters(question))[0] not in right
        for question, right in ASKED.items()
    ]
    assert words[0] == "all questions (3)" and words[1].endswith(f"({sum(ahead)})")
    seen.frame.locator("#filter").select_option("6")
    listed = seen.frame.locator("#question option").all_text_contents()
    assert listed == [next(iter(ASKED))]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"chunks": CHUNKS[:2]}, "2 passages, 3 questions and 2 searches"),
        ({"questions": {}, "reranked": {}}, "12 passages, 0 questions"),
        ({"searches": {"meaning": by_vectors}}, "and 1 searches"),
        ({"questions": {"Who?": []}, "reranked": {}}, "at least one number from 0 to 11"),
        ({"questions": {"Who?": [12]}, "reranked": {}}, "at least one number from 0 to 11"),
        ({"reranked": {"Why?": []}}, "'Why\\?' was re-ranked"),
    ],
    ids=["passages", "questions", "searches", "no-right", "out-of-range", "reranked"],
)
def test_what_cannot_be_drawn_is_refused(changed, says):
    with pytest.raises(ValueError, match=says):
        passages(**changed)
