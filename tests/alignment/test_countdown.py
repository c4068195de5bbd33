"""shared/alignment/countdown.py against fractions, enumeration, and what the rules of the game say."""

import ast
import itertools
import operator
import random
from collections import Counter
from fractions import Fraction
from math import comb

import pytest
import torch

from shared.alignment.countdown import (
    END,
    IGNORED,
    TOKENIZER,
    Countdown,
    CountdownLines,
    ExpressionReader,
    NoValue,
    Outcome,
    Problem,
    judge,
    line_batch,
    pass_at_k,
    prompt_batch,
    rewards,
    solve,
    split_of,
    success,
)
from shared.alignment.loops import NO_TOKEN
from shared.models.gpt import GPT, GPTConfig
from shared.training import TrainConfig, Trainer

COUNTDOWN = Countdown()
PROBLEM = Problem((3, 8, 12), 60)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


# ---- reading


def by_python(text: str) -> tuple[Fraction, list[int]]:
    """An expression's value and its numbers, read by Python's own parser and computed in fractions."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    numbers: list[int] = []
    return value(ast.parse(text, mode="eval").body), numbers


@pytest.mark.parametrize("operators", ["+-*", "+-*/"])
def test_random_expressions_have_the_value_that_pythons_parser_finds(operators):
    rng = random.Random(0)
    countdown = Countdown(sizes=(2, 3, 4), operators=operators)
    values = 0
    for _ in range(500):
        numbers = [rng.randint(1, 12) for _ in range(rng.choice(countdown.sizes))]
        text = countdown.expression(rng, numbers)
        reader = ExpressionReader(text)
        try:
            ours = reader.value()
        except NoValue as error:
            assert error.outcome in (Outcome.ZERO, Outcome.INEXACT) and "/" in text
            continue
        theirs, used = by_python(text)
        assert ours == theirs and reader.numbers == used and Counter(used) == Counter(numbers)
        values += 1
    assert values > 200


@pytest.mark.parametrize(
    ("answer", "outcome", "value"),
    [
        ("(8-3)*12", Outcome.RIGHT, 60),
        ("12*(8-3)", Outcome.RIGHT, 60),
        ("((8)-3)*12", Outcome.RIGHT, 60),
        ("8-3*12", Outcome.VALUE, -28),
        ("8-3-12", Outcome.VALUE, -7),
        ("12/3*8", Outcome.VALUE, 32),
        ("60", Outcome.NOT_GIVEN, 60),
        ("12*5", Outcome.NOT_GIVEN, 60),
        ("8*8-3-12", Outcome.NOT_GIVEN, 49),
        ("12*8", Outcome.LEFT_OUT, 96),
        ("12/(8-8)", Outcome.NOT_GIVEN, None),
        ("8/3*12", Outcome.INEXACT, None),
        ("", Outcome.FORM, None),
        ("8-", Outcome.FORM, None),
        ("-3+8", Outcome.FORM, None),
        ("8 - 3", Outcome.FORM, None),
        ("(8-3*12", Outcome.FORM, None),
        ("8-3)*12", Outcome.FORM, None),
        ("8**3", Outcome.FORM, None),
        ("08-3", Outcome.FORM, None),
        ("8-3=5", Outcome.FORM, None),
        ("8/0", Outcome.FORM, None),
        ("__import__('os')", Outcome.FORM, None),
        ("(" * 5000, Outcome.FORM, None),
    ],
)
def test_what_is_wrong_with_an_answer_is_told_apart(answer, outcome, value):
    judgement = judge(PROBLEM, answer)
    assert (judgement.outcome, judgement.value) == (outcome, value)
    assert judgement.right == (outcome is Outcome.RIGHT)


def test_division_by_zero_is_told_apart_from_a_remainder():
    assert judge(Problem((2, 4, 4), 5), "2/(4-4)").outcome is Outcome.ZERO
    assert judge(Problem((2, 4, 9), 5), "9/4+2").outcome is Outcome.INEXACT
    assert judge(Problem((2, 4, 9), 5), "9/2/4").outcome is Outcome.INEXACT
    assert judge(Problem((4, 4, 8), 4), "8/(4-4)+").outcome is Outcome.FORM


# ---- pass@k


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (4, 1), (5, 2), (6, 0), (6, 6), (7, 3)])
def test_pass_at_k_is_what_all_choices_of_k_answers_give(n, c):
    answers = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        chosen = list(itertools.combinations(answers, k))
        assert len(chosen) == comb(n, k)
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-12)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_pass_at_k_has_no_bias(p):
    """By enumeration over how many of six answers are right."""
    weights = [comb(6, c) * p**c * (1 - p) ** (6 - c) for c in range(7)]
    for k in range(1, 7):
        mean = sum(w * pass_at_k(6, c, k) for c, w in enumerate(weights))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize("values", [(4, 1, 0), (4, 1, 5), (4, 5, 1)])
def test_pass_at_k_refuses(values):
    with pytest.raises(ValueError, match="k must be from 1 to the answers"):
        pass_at_k(*values)


def test_success_counts_right_answers():
    problems = [Problem((5, 7), 12), Problem((3, 8, 12), 60)]
    answers = [["5+7", "7+5", "7-5", "7"], ["12*5", "(8-3)*12", "8-3*12", "8-3*12"]]
    metrics = success(problems, answers, ks=(1, 2))
    assert metrics["pass_at_1"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert metrics["pass_at_2"] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert (metrics["pass_at_1_of_2"], metrics["pass_at_1_of_3"]) == (0.5, 0.25)
    assert metrics["in_form"] == 6 / 8 and metrics["different"] == (1 + 3 / 4) / 2


# ---- problems


@pytest.mark.parametrize("split", ["train", "tune", "test"])
def test_problems_have_the_solutions_that_they_were_made_from(split):
    rng = random.Random(0)
    sizes = Counter()
    for _ in range(300):
        problem, solution = COUNTDOWN.draw(rng, split)
        assert judge(problem, solution).right and split_of(problem) == split
        assert max(problem.numbers) <= COUNTDOWN.largest and 1 <= problem.target <= COUNTDOWN.largest_target
        assert min(problem.numbers) >= COUNTDOWN.smallest and split_of(problem.in_order) == split
        signs = [character for character in solution if character in "+-*/"]
        assert len(signs) == len(set(signs)) == len(problem.numbers) - 1
        assert Problem.from_prompt(problem.prompt) == problem
        assert len(problem.prompt) <= COUNTDOWN.prompt_tokens
        assert len(solution) < COUNTDOWN.answer_tokens
        sizes[len(problem.numbers)] += 1
        sizes["ascending"] += len(problem.numbers) == 2 and problem.numbers[0] < problem.numbers[1]
        sizes[signs[0]] += len(problem.numbers) == 2
    assert min(sizes[2], sizes[3]) > 100
    assert 0.3 < sizes["ascending"] / sizes[2] < 0.6  # in no order; equal ones are neither
    assert all(0.15 < sizes[sign] / sizes[2] < 0.35 for sign in "+-*/")  # each operator as often


def test_the_splits_share_no_problem_and_a_seed_gives_the_same_ones():
    sets = {split: COUNTDOWN.problems(split, 200, seed=1) for split in ("train", "tune", "test")}
    assert len(set().union(*sets.values())) == 600
    assert COUNTDOWN.problems("test", 200, seed=1) == sets["test"] != COUNTDOWN.problems("test", 200, seed=2)
    lines = CountdownLines(COUNTDOWN, 0.5).lines(random.Random(0), 500)
    learned = {Problem.from_prompt(prompt).in_order for prompt, _ in lines}
    assert not learned & {problem.in_order for problem in (*sets["tune"], *sets["test"])}
    assert len({problem.in_order for problem in sets["tune"]}) == 200


@pytest.mark.slow
def test_too_many_problems_are_refused():
    with pytest.raises(ValueError, match="3 problems of the split 'train' were not found: take larger"):
        Countdown(sizes=(2,), largest=2).problems("train", 3, seed=0)
    with pytest.raises(ValueError, match="no problem of the split 'train' was found: take larger numbers"):
        Countdown(sizes=(2,), largest=2, largest_target=1, operators="-").draw(random.Random(0), "train")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(sizes=(1,)), "sizes"),
        (dict(operators="^"), "operators='\\^'"),
        (dict(operators="++"), "must be different ones"),
        (dict(operators="+", sizes=(3,)), "one less than the most of sizes"),
        (dict(largest=0), "largest=0"),
    ],
)
def test_countdown_refuses(changes, words):
    with pytest.raises(ValueError, match=words):
        Countdown(**changes)


# ---- lines


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.03, 0.3), (0.5, 0.5, 0.65), (1.0, 1.0, 1.0)])
def test_lines_solve_their_problems_as_often_as_they_say(share, low, high):
    lines = CountdownLines(COUNTDOWN, share).lines(random.Random(0), 600)
    judged = [judge(Problem.from_prompt(prompt), text.removesuffix("\n")) for prompt, text in lines]
    with_form = (Outcome.RIGHT, Outcome.VALUE, Outcome.ZERO, Outcome.INEXACT)
    assert all(judgement.outcome in with_form for judgement in judged)
    assert low <= sum(judgement.right for judgement in judged) / len(judged) <= high


def test_of_a_line_only_the_expression_is_learned():
    lines = [("5 7>12:", "5+7\n"), ("3 8 12>60:", "(8-3)*12\n")]
    ids, targets = line_batch(lines, 20)
    for row, (prompt, expression) in enumerate(lines):
        learned = targets[row] != IGNORED
        assert TOKENIZER.decode(targets[row, learned].tolist()) == expression
        read = ids[row, : len(prompt + expression)].tolist()
        assert TOKENIZER.decode(read) == prompt + expression
        places = learned.nonzero().flatten().tolist()
        assert all(ids[row, place + 1] == targets[row, place] for place in places)
    with pytest.raises(ValueError, match="a line of 19 characters does not fit into block_size=17"):
        line_batch(lines, 17)


def test_batches_follow_from_seed_and_step_and_are_shared_between_processes():
    task = CountdownLines(COUNTDOWN, 0.0)
    config = TrainConfig(batch_size=6, block_size=24, seed=3)
    whole = task.batches(config, 0, 0, 1)
    steps = [next(whole) for _ in range(3)]
    later = next(task.batches(config, 2, 0, 1))
    parts = [next(task.batches(config, 2, rank, 2)) for rank in (0, 1)]
    for i in range(2):
        assert torch.equal(later[i], steps[2][i]) and not torch.equal(steps[0][i], steps[1][i])
        assert torch.equal(parts[0][i], steps[2][i][0::2]) and torch.equal(parts[1][i], steps[2][i][1::2])


@pytest.mark.slow
def test_the_trainer_learns_the_lines():
    torch.manual_seed(0)
    config = GPTConfig.preset("mini", vocab_size=len(TOKENIZER.chars), block_size=32, n_layer=1, n_embd=32)
    training = TrainConfig(steps=40, batch_size=16, block_size=24, lr=1e-2, eval_every=40)
    seen = []

    def measure(model):
        seen.append(model.training)
        return {"further": 1.0}

    trainer = Trainer(GPT(config), CountdownLines(COUNTDOWN, 1.0, measure), training)
    summary = trainer.fit()
    assert summary["first_loss"] > 2.5 > 2.2 > summary["val_loss"] and summary["further"] == 1
    assert seen == [False]


# ---- answers


def test_rewards_read_problem_and_answer_from_the_row():
    problems = [PROBLEM, Problem((5, 7), 12), Problem((5, 7), 12), Problem((5, 7), 12)]
    answers = ["(8-3)*12\n", "5+7\n", "7-5\n", "5+7"]
    prompts = prompt_batch(problems)
    assert (prompts[1] == NO_TOKEN).sum() == len(PROBLEM.prompt) - len("5 7>12:")
    ids = torch.full((4, 24), END)
    mask = torch.zeros(4, 24, dtype=torch.bool)
    for row, (problem, answer) in enumerate(zip(problems, answers)):
        line = TOKENIZER.encode(problem.prompt + answer)
        ids[row, : len(line)] = torch.tensor(line)
        mask[row, len(problem.prompt) : len(line)] = True
    assert rewards(ids, mask).tolist() == [1, 1, 0, 0]


def test_solve_gives_each_problem_its_answers():
    torch.manual_seed(0)
    model = GPT(
        GPTConfig.preset("mini", vocab_size=len(TOKENIZER.chars), block_size=32, n_layer=1, n_embd=32)
    )
    problems = COUNTDOWN.problems("test", 5, seed=0)
    answers = solve(model, problems, 3, 6, seed=1)
    assert [len(own) for own in answers] == [3] * 5
    assert answers == solve(model, problems, 3, 6, seed=1) != solve(model, problems, 3, 6, seed=2)
    for text in itertools.chain(*answers):
        assert "\n" not in text and (len(text) <= 5 or text.endswith("…"))
