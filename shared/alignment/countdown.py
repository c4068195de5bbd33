"""Week 10. Countdown: from a few numbers, an expression that has a given value. A reward that is verified.

A problem is a line such as `3 8 12>60:`, an answer what follows, up to the line's end: `(8-3)*12`. Each
number must be used exactly once. An answer is read by a parser of our own; nothing that a model writes is
ever executed.

>>> judge(Problem((3, 8, 12), 60), "(8-3)*12").outcome.value
'right'
>>> judge(Problem((3, 8, 12), 60), "8-3*12").value
-28

Sources: the round of numbers in the television game "Countdown"; pass@k from Chen et al., "Evaluating Large
Language Models Trained on Code" (2021).
"""

import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from shared.alignment.loops import draw_answers, pad_prompts
from shared.checks import Checks
from shared.devices import device_of
from shared.evaluation import IGNORED, cross_entropy
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.char import CharTokenizer
from shared.training.config import TrainConfig
from shared.training.tasks import Task

TOKENIZER = CharTokenizer("\n0123456789+-*/() >:")
END = 0
"""The line break, which ends an answer."""
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
LONGEST = 200
"""No expression of more characters is read."""
ROWS_AT_ONCE = 512
FORMS, TRIES = 100, 2_000
"""A problem is sought in so many forms, with so many numbers for each: some have no value in range."""

Split = Literal["train", "tune", "test"]
"""To learn from, to choose settings on, and to report."""


# ---- reading an answer


class Outcome(Enum):
    """What is right, or first found wrong, with an answer."""

    RIGHT = "right"
    FORM = "not an expression"
    LEFT_OUT = "a number is left out"
    NOT_GIVEN = "a number is not given, or used too often"
    ZERO = "division by zero"
    INEXACT = "a division leaves a remainder"
    VALUE = "another value"


@dataclass(frozen=True)
class Problem:
    """Numbers, in the order in which they are shown, and the value that an expression of them must have."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        """The problem as the model reads it."""
        return f"{' '.join(map(str, self.numbers))}>{self.target}:"

    @property
    def in_order(self) -> "Problem":
        """The same problem with its numbers in ascending order."""
        return Problem(tuple(sorted(self.numbers)), self.target)

    @classmethod
    def from_prompt(cls, prompt: str) -> "Problem":
        """The problem that has this prompt."""
        numbers, _, target = prompt.removesuffix(":").partition(">")
        return cls(tuple(map(int, numbers.split())), int(target))


@dataclass(frozen=True)
class Judgement:
    """What an answer is worth. value: the expression's; None where it has none."""

    outcome: Outcome
    value: int | None = None

    @property
    def right(self) -> bool:
        """Whether the answer solves the problem."""
        return self.outcome is Outcome.RIGHT


class NoValue(Exception):
    """An expression that cannot be read, or has no whole value; the outcome says which."""

    def __init__(self, outcome: Outcome):
        super().__init__(outcome.value)
        self.outcome = outcome


class ExpressionReader:
    """Reads one expression by recursive descent, and computes its value in whole numbers.

        sum     = product {("+" | "-") product}
        product = atom {("*" | "/") atom}
        atom    = number | "(" sum ")"

    `numbers` are those it has met. There are no signs and no spaces; a number does not begin with 0.
    """

    def __init__(self, text: str):
        self.text = text
        self.place = 0
        self.numbers: list[int] = []
        self._broken: Outcome | None = None  # the first division without a whole value

    def value(self) -> int:
        """Raises NoValue: first for what is no expression, then for a division without a whole value."""
        if len(self.text) > LONGEST:
            raise NoValue(Outcome.FORM)
        value = self._sum()
        if self.place < len(self.text):
            raise NoValue(Outcome.FORM)
        if self._broken is not None:
            raise NoValue(self._broken)
        return value

    def _next_in(self, characters: str) -> str:
        """Takes the next character if it is one of these; "" if not."""
        character = self.text[self.place : self.place + 1]
        if not character or character not in characters:
            return ""
        self.place += 1
        return character

    def _sum(self) -> int:
        value = self._product()
        while operator := self._next_in("+-"):
            other = self._product()
            value = value + other if operator == "+" else value - other
        return value

    def _product(self) -> int:
        value = self._atom()
        while operator := self._next_in("*/"):
            other = self._atom()
            value = value * other if operator == "*" else self._quotient(value, other)
        return value

    def _quotient(self, value: int, other: int) -> int:
        """The rest of the text is still read after a division that does not work: its form comes first."""
        if other == 0:
            self._broken = self._broken or Outcome.ZERO
            return 0
        if value % other:
            self._broken = self._broken or Outcome.INEXACT
        return value // other

    def _atom(self) -> int:
        if self._next_in("("):
            value = self._sum()
            if not self._next_in(")"):
                raise NoValue(Outcome.FORM)
            return value
        digits = ""
        while digit := self._next_in("0123456789"):
            digits += digit
        if not digits or digits.startswith("0"):
            raise NoValue(Outcome.FORM)
        self.numbers.append(int(digits))
        return self.numbers[-1]


def judge(problem: Problem, answer: str) -> Judgement:
    """Whether an answer (without its line break) is an expression of exactly the problem's numbers, and has
    its value. Form comes first, then the numbers, then divisions, then the value.
    """
    reader = ExpressionReader(answer)
    value, outcome = None, Outcome.VALUE
    try:
        value = reader.value()
    except NoValue as error:
        outcome = error.outcome
    if outcome is Outcome.FORM:
        return Judgement(outcome)
    used, given = Counter(reader.numbers), Counter(problem.numbers)
    if used - given:
        return Judgement(Outcome.NOT_GIVEN, value)
    if given - used:
        return Judgement(Outcome.LEFT_OUT, value)
    if value == problem.target:
        return Judgement(Outcome.RIGHT, value)
    return Judgement(outcome, value)


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The chance that k answers, taken without replacement from these, have a right one among them.

    answers: how many were drawn; right: how many of them are right. Over draws of `answers` it has the mean
    of pass@k, without bias (Chen et al., 2021). Raises ValueError for a k that is not from 1 to `answers`.

    >>> pass_at_k(answers=4, right=1, k=1), pass_at_k(answers=4, right=1, k=2)
    (0.25, 0.5)
    """
    if not (1 <= k <= answers and 0 <= right <= answers):
        raise ValueError(
            f"pass_at_k(answers={answers}, right={right}, k={k}): k must be from 1 to the answers, of which"
            " 0 or more are right"
        )
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


# ---- making problems


@dataclass(frozen=True)
class Countdown:
    """Which problems there are. Each has a solution, by which it was made.

    The form of a problem's solution is drawn first, its operators all different, and then numbers until the
    value is in range: with the numbers first, sums would be far more frequent than products and differences.
    A problem belongs to one of three splits for good, by a hash of its numbers and its target, so that none
    is both learned from and reported.
    """

    sizes: tuple[int, ...] = (2, 3)
    """How many numbers a problem has: each as often."""
    smallest: int = 2
    """Numbers are from this, since a 1 makes many forms alike,"""
    largest: int = 30
    """to this."""
    largest_target: int = 99
    operators: str = "+-*/"
    """Of those that problems are made with; answers may have + - * and /."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "smallest", "largest_target")
        checks.at_least(self.smallest, "largest")
        checks.require(
            bool(self.sizes) and all(2 <= size <= 5 for size in self.sizes),
            f"sizes={self.sizes}: must be from 2 to 5",
        )
        different = set(self.operators) & PRECEDENCE.keys()
        checks.require(
            len(different) == len(self.operators) >= max(self.sizes, default=2) - 1,
            f"operators={self.operators!r}: must be different ones of {''.join(PRECEDENCE)}, and at"
            f" least one less than the most of sizes={self.sizes}, since a solution has none twice",
        )
        checks.finish()

    @property
    def prompt_tokens(self) -> int:
        """Of the longest problem."""
        numbers = max(self.sizes)
        return numbers * (len(str(self.largest)) + 1) + len(str(self.largest_target)) + 1

    @property
    def answer_tokens(self) -> int:
        """Of the longest answer in the form that problems are made in, with its end."""
        numbers = max(self.sizes)
        return numbers * len(str(self.largest)) + (numbers - 1) + 2 * (numbers - 2) + 1

    def draw(self, rng: random.Random, split: Split) -> tuple[Problem, str]:
        """A problem of a split, its numbers in any order, and the expression that it was made from."""
        for _ in range(FORMS):
            size = rng.choice(self.sizes)
            form = self.expression(rng, [f"{{{place}}}" for place in range(size)])
            for _ in range(TRIES):
                numbers = tuple(rng.randint(self.smallest, self.largest) for _ in range(size))
                solution = form.format(*numbers)
                try:
                    target = ExpressionReader(solution).value()
                except NoValue:
                    continue
                problem = Problem(numbers, target)
                if 1 <= target <= self.largest_target and split_of(problem) == split:
                    return problem, solution
        raise ValueError(f"no problem of the split {split!r} was found: take larger numbers")

    def expression(self, rng: random.Random, numbers: Sequence[int | str]) -> str:
        """A random expression of these numbers, in no more brackets than it needs and no operator twice."""
        shuffled = list(numbers)
        rng.shuffle(shuffled)
        return self._expression(rng, shuffled, rng.sample(self.operators, len(numbers) - 1))[0]

    def _expression(
        self, rng: random.Random, numbers: Sequence[int | str], operators: Sequence[str]
    ) -> tuple[str, int]:
        """The text, and the precedence of what binds it least; 3: a number."""
        if len(numbers) == 1:
            return str(numbers[0]), 3
        cut = rng.randrange(1, len(numbers))
        left, left_precedence = self._expression(rng, numbers[:cut], operators[: cut - 1])
        right, right_precedence = self._expression(rng, numbers[cut:], operators[cut:])
        operator = operators[cut - 1]
        own = PRECEDENCE[operator]
        if left_precedence < own:
            left = f"({left})"
        if right_precedence < own or (right_precedence == own and operator in "-/"):
            right = f"({right})"
        return f"{left}{operator}{right}", own

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """`count` problems of a split, different in more than the order; the same for the same seed."""
        rng = random.Random(seed)
        found: dict[Problem, Problem] = {}
        for _ in range(100 * count):
            problem = self.draw(rng, split)[0]
            found.setdefault(problem.in_order, problem)
            if len(found) == count:
                return list(found.values())
        raise ValueError(f"{count} problems of the split {split!r} were not found: take larger numbers")


def split_of(problem: Problem) -> Split:
    """By numbers in any order and target: seven tenths are learned from, one for settings, two reported."""
    tenth = zlib.crc32(problem.in_order.prompt.encode()) % 10
    if tenth < 2:
        return "test"
    return "tune" if tenth == 2 else "train"


# ---- learning from lines


class CountdownLines(Task):
    """A task for the Trainer: problems with expressions, of which the expressions are learned.

    right: the share of lines whose expression solves its problem; in the others it is a random one of the
    same numbers, so that they teach the form and nothing about the target. Every line is drawn anew. measure:
    further metrics, taken at each evaluation.
    """

    tokenizer: Tokenizer = TOKENIZER

    def __init__(
        self,
        countdown: Countdown,
        right: float,
        measure: Callable[[nn.Module], dict[str, float]] | None = None,
    ):
        if not 0 <= right <= 1:
            raise ValueError(f"right={right}: must be from 0 to 1, a share of the lines")
        self.countdown = countdown
        self.right = right
        self.measure = measure
        self.name = f"countdown-{zlib.crc32(self._about().encode()):08x}"

    def _about(self) -> str:
        return json.dumps([asdict(self.countdown), self.right])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Lines follow from the settings and the seed of the training."""
        return {"training data": self.name}

    def lines(self, rng: random.Random, count: int, split: Split = "train") -> list[tuple[str, str]]:
        """(prompt, expression with its line break), `count` of them."""
        made = []
        for _ in range(count):
            problem, solution = self.countdown.draw(rng, split)
            if rng.random() >= self.right:
                solution = self.countdown.expression(rng, problem.numbers)
            made.append((problem.prompt, solution + "\n"))
        return made

    def batches(
        self, config: TrainConfig, start_step: int, rank: int, world_size: int, *, every: int = 1
    ) -> Iterator[tuple[Tensor, ...]]:
        """(ids, targets), int64 [rows, block_size]; see `line_batch`. A batch follows from seed and step."""
        step = start_step
        while True:
            rng = random.Random(f"{config.seed}.{step}")
            rows = self.lines(rng, config.batch_size)[rank::world_size]
            yield line_batch(rows, config.block_size)
            step += every

    @torch.no_grad()
    def evaluate(self, model: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, float]:
        """The loss on lines of the split "tune" with their solutions, and what `measure` gives."""
        solved = CountdownLines(self.countdown, 1.0)
        rows = solved.lines(random.Random(config.seed), config.batch_size, "tune")
        ids, targets = line_batch(rows, config.block_size)
        was_training = model.training
        model.eval()
        metrics = {"val_loss": cross_entropy(model(ids.to(device)), targets.to(device)).item()}
        metrics |= self.measure(model) if self.measure else {}
        model.train(was_training)
        return metrics


def line_batch(lines: Sequence[tuple[str, str]], block_size: int) -> tuple[Tensor, Tensor]:
    """(prompt, expression) -> (ids, targets), int64 [lines, block_size]; targets other than the expression's
    tokens are `IGNORED`. Raises ValueError for a line that does not fit.
    """
    ids = torch.full((len(lines), block_size + 1), END)
    targets = torch.full((len(lines), block_size), IGNORED)
    for row, (prompt, expression) in enumerate(lines):
        line = TOKENIZER.encode(prompt + expression)
        if len(line) > block_size + 1:
            raise ValueError(f"a line of {len(line)} characters does not fit into block_size={block_size}")
        ids[row, : len(line)] = torch.tensor(line)
        begin, end = len(prompt) - 1, len(line) - 1
        targets[row, begin:end] = ids[row, begin + 1 : end + 1]
    return ids[:, :-1], targets


# ---- answers of a policy


def prompt_batch(problems: Sequence[Problem], device: torch.device | str = "cpu") -> Tensor:
    """The problems as prompts for the loops, int64 [problems, time]; see `pad_prompts`."""
    return pad_prompts([TOKENIZER.encode(problem.prompt) for problem in problems]).to(device)


def rewards(ids: Tensor, mask: Tensor) -> Tensor:
    """1 for each answer that is right, 0 for the others: float32 [batch], as the loops want it.

    ids and mask are those of `draw_answers`; the problem is read from the row itself. An answer without its
    line break is not finished, and wrong.
    """
    scores = []
    for row, in_answer in zip(ids.tolist(), mask.tolist()):
        begin = in_answer.index(True)
        text = TOKENIZER.decode([token for token, inside in zip(row, in_answer) if inside])
        problem = Problem.from_prompt(TOKENIZER.decode(row[:begin]))
        finished = text.endswith("\n")
        scores.append(float(finished and judge(problem, text.removesuffix("\n")).right))
    return torch.tensor(scores, device=ids.device)


@torch.no_grad()
def solve(
    policy: nn.Module,
    problems: Sequence[Problem],
    samples: int,
    max_new_tokens: int,
    seed: int,
    *,
    temperature: float = 1.0,
) -> list[list[str]]:
    """`samples` answers of a policy to each problem as text, without their line break. An answer that was cut
    off ends in "…", and is no expression. temperature: 0 gives the likeliest answer.
    """
    generator = Generator().manual_seed(seed)
    prompts = prompt_batch(problems, device_of(policy)).repeat_interleave(samples, 0)
    texts = []
    for part in prompts.split(ROWS_AT_ONCE):
        ids, mask = draw_answers(policy, part, max_new_tokens, END, generator, temperature=temperature)
        for row, in_answer in zip(ids.cpu(), mask.cpu()):
            text = TOKENIZER.decode(row[in_answer].tolist())
            texts.append(text[:-1] if text.endswith("\n") else text + "…")
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def success(
    problems: Sequence[Problem], answers: Sequence[Sequence[str]], ks: Sequence[int] = (1, 8)
) -> dict[str, float]:
    """pass@k of answers, the mean over the problems, and of pass@1 that of each number of numbers.

    Further the share of answers that are expressions of the right numbers (`in_form`), and of different
    answers among those to a problem (`different`).
    """
    judged = [[judge(problem, answer) for answer in own] for problem, own in zip(problems, answers)]
    right = [sum(judgement.right for judgement in own) for own in judged]
    drawn = len(answers[0])
    metrics = {f"pass_at_{k}": _mean([pass_at_k(drawn, r, k) for r in right]) for k in ks}
    for size in sorted({len(problem.numbers) for problem in problems}):
        own = [r / drawn for problem, r in zip(problems, right) if len(problem.numbers) == size]
        metrics[f"pass_at_1_of_{size}"] = _mean(own)
    with_form = (Outcome.RIGHT, Outcome.VALUE, Outcome.ZERO, Outcome.INEXACT)
    metrics["in_form"] = _mean([judgement.outcome in with_form for own in judged for judgement in own])
    metrics["different"] = _mean([len(set(own)) / drawn for own in answers])
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
