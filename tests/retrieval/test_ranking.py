"""shared/retrieval/ranking.py against ir-measures, scipy, and values worked out by hand."""

import math
import random

import ir_measures
import numpy as np
import pytest
import scipy.stats

from shared.retrieval.ranking import (
    bootstrap,
    exact_match,
    holds_answer,
    ndcg_at,
    normalise,
    rank_scores,
    recall_at,
    reciprocal_rank,
    token_f1,
)


def test_rankings_are_measured_as_ir_measures_does():
    draw = random.Random(3)
    rankings = [draw.sample(range(60), draw.choice([1, 7, 30])) for _ in range(40)]
    gains = [
        {d: draw.choice([1, 2, 3]) for d in draw.sample(range(60), draw.choice([1, 2, 9]))} for _ in rankings
    ]
    run = [
        ir_measures.ScoredDoc(str(q), str(d), -place)
        for q, ranking in enumerate(rankings)
        for place, d in enumerate(ranking)
    ]
    flat = [ir_measures.Qrel(str(q), str(d), 1) for q, g in enumerate(gains) for d in g]
    graded = [ir_measures.Qrel(str(q), str(d), n) for q, g in enumerate(gains) for d, n in g.items()]
    names = {"recall@1": "R@1", "recall@5": "R@5", "recall@10": "R@10", "mrr": "RR", "ndcg@10": "nDCG@10"}
    theirs = ir_measures.calc_aggregate(list(map(ir_measures.parse_measure, names.values())), flat, run)
    ours = rank_scores(rankings, [set(g) for g in gains])
    assert {name: ours[name].mean for name in names} == pytest.approx(
        {ours: theirs[ir_measures.parse_measure(n)] for ours, n in names.items()}
    )
    graded_mean = np.mean([ndcg_at(ranking, g, 10) for ranking, g in zip(rankings, gains)])
    assert graded_mean == pytest.approx(
        ir_measures.calc_aggregate([ir_measures.nDCG @ 10], graded, run)[ir_measures.nDCG @ 10]
    )


@pytest.mark.parametrize("k", [1, 3, 5, 100])
def test_each_measure_at_k_is_that_of_ir_measures(k):
    """With more that are relevant than k, fewer, and rankings that are shorter than both."""
    draw = random.Random(k)
    for _ in range(20):
        ranking = draw.sample(range(40), draw.choice([1, 4, 30]))
        gains = {d: draw.choice([1, 2, 5]) for d in draw.sample(range(40), draw.choice([1, 4, 20]))}
        run = [ir_measures.ScoredDoc("q", str(d), -place) for place, d in enumerate(ranking)]
        graded = [ir_measures.Qrel("q", str(d), gain) for d, gain in gains.items()]
        measures = [ir_measures.nDCG @ k, ir_measures.R @ k]
        theirs = ir_measures.calc_aggregate(measures, graded, run)
        assert ndcg_at(ranking, gains, k) == pytest.approx(theirs[measures[0]])
        assert recall_at(ranking, gains, k) == pytest.approx(theirs[measures[1]])
        best = sorted(gains, key=gains.get, reverse=True)
        assert ndcg_at(best, gains, k) == pytest.approx(1)


def test_rankings_by_hand():
    assert [recall_at("abc", "cx", k) for k in (1, 3)] == [0, 0.5]
    assert recall_at("abc", "ccx", 3) == 0.5  # named twice, relevant once
    assert [reciprocal_rank("abc", x) for x in ("c", "bc", "x")] == [1 / 3, 1 / 2, 0]
    assert ndcg_at("abc", "ac", 10) == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3)))


@pytest.mark.parametrize(
    "ranking, relevant, words", [("ab", "", "no id is relevant"), ("aba", "a", "comes twice")]
)
def test_what_cannot_be_measured_is_refused(ranking, relevant, words):
    for measure in (lambda *args: recall_at(*args, 5), reciprocal_rank, ndcg_at):
        with pytest.raises(ValueError, match=words):
            measure(ranking, relevant)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_is_scipys(level):
    values = np.random.default_rng(1).standard_normal(200)
    ours = bootstrap(values, level, rounds=10_000)
    theirs = scipy.stats.bootstrap(
        [values], np.mean, n_resamples=10_000, method="percentile", confidence_level=level, rng=2
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    # 90 instead of 95 % would be 0.022 off.
    assert ours[1:] == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_an_interval_can_be_had_again_and_needs_values():
    values = [0.0, 1.0, 1.0]
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap([0.5]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


@pytest.mark.parametrize(
    "answer, right, exact, f1, holds",
    [
        ("The 60 tallies.", ["60 tallies"], 1, 1, 1),
        ("It costs 60 tallies a year", ["60 tallies", "60"], 0, 2 * 2 / (5 + 2), 1),  # "a" is dropped
        ("160 tallies", ["60 tallies"], 0, 0.5, 0),  # whole words only
        ("at 17:50", ["17:50"], 0, 2 / 3, 1),
        ("Odo, Odo Brandt", ["Brandt Odo"], 0, 0.8, 0),  # a word counts as often as it is in both
        ("cafe\u0301 noir", ["caf\u00e9 noir"], 1, 1, 1),  # decomposed and composed
        ("", ["x"], 0, 0, 0),
        ("?!", ["the"], 1, 0, 0),  # nothing is left of either
        ("anything", [], 0, 0, 0),
    ],
)
def test_answers_by_hand(answer, right, exact, f1, holds):
    assert exact_match(answer, right) == exact
    assert token_f1(answer, right) == pytest.approx(f1)
    assert holds_answer(answer, right) == holds


def test_normalising_as_squad_does():
    assert normalise("An  Apple, the APPLE's a-b") == "apple apples ab"
