"""Week 0. What an exercise is made of: the task, a right answer, cases to try it on, and wrong answers that
learners give.

A week's `exercises.py` makes a list EXERCISES of these.
"""

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Observe = Callable[..., Iterator[tuple[str, Any]]]
Answer = Callable[..., Any]
"""A function, a class, or any object that can be called."""


STUB_WIDTH = 88
"""Characters of a line in a notebook."""
SHORT_NAMES = {
    "numpy.": "np.",
    "torch._C.Generator": "torch.Generator",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
    "collections.abc.": "",
}
"""The names that types are imported under."""
SAID = "said"
"""Where a `NotRight` stands among what was seen of an answer."""
NUMBER = re.compile(r"-?\d+(\.\d+)?")


class NotRight(Exception):  # noqa: N818  what it says is a verdict, not an error of the program
    """What is wrong with an answer, in a sentence for the learner."""


class Sentence(str):
    """What NotRight said. Two are equal where they differ in numbers alone."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sentence) and NUMBER.sub("#", self) == NUMBER.sub("#", other)

    __hash__ = str.__hash__


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that learners really give."""

    name: str
    """Short, as one would say it: "mask after the softmax"."""
    function: Answer
    """It may crash; an answer that crashes with the same words, numbers apart, is then this mistake."""
    why: str
    """What is wrong with it and why it matters: a sentence or two, told to the learner."""

    @property
    def told(self) -> str:
        """What a learner reads whose answer does the same."""
        return f"this looks like a known mistake: {self.name}.\n{self.why}"


@dataclass(frozen=True)
class Exercise:
    """What a learner writes, the answer, and how to tell them apart."""

    task: str
    """What to write, in Markdown: a few sentences, with shapes; formulas between $ signs."""
    reference: Answer
    """The right answer; its name and signature are the stub's."""
    cases: Callable[[torch.Generator], Sequence[tuple]]
    """Makes argument tuples from a seeded generator. Enough of them that every mistake differs from the
    reference on one.
    """
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str, str]
    """From a nudge to nearly the answer."""
    tolerance: float = 1e-5
    observe: Observe | None = None
    """How a class, or what has a state, is tried: called with the answer and a case's arguments, it yields
    what it sees, (name, value), from the plainest to the subtlest: ("the output", ...), ("the gradient of
    q_proj", ...). It may raise `NotRight`. None: the answer is a function, called with a case's arguments.
    """
    stub: str = ""
    """The source to fill in; where it is empty, the reference's signature with an empty body."""
    forbids: tuple[Answer | str, ...] = ()
    """What the answer may not call: Python functions, and the names of functions and methods written in C."""
    differentiable: bool = False
    """Whether gradients must flow through the answer to its arguments of type float."""
    valid: Callable[..., bool] | None = None
    """Whether arguments are such as the task allows, when the grader looks for a smaller failing case. None:
    all that the reference takes without an error.
    """
    explain: Callable[..., str | None] | None = None
    """What is wrong with a function's result, in a sentence for the learner: called with the result and the
    arguments of the smallest case that shows it. None: nothing that it knows of.
    """
    points: int = 1
    """For a teacher's table: 1 for a function, 3 for what is built."""
    lacks: Callable[[], str | None] | None = None
    """What this machine lacks for it, such as a compiler, in a sentence for the learner; None: nothing. Where
    something is lacking, nothing is graded.
    """

    def __post_init__(self) -> None:
        if not self.stub:
            object.__setattr__(self, "stub", _empty_body(self.reference))

    @property
    def name(self) -> str:
        return self.reference.__name__

    @property
    def parameters(self) -> list[str]:
        """The names of a case's arguments."""
        if self.observe is not None:
            return list(inspect.signature(self.observe).parameters)[1:]
        return list(inspect.signature(self.reference).parameters)

    @property
    def named(self) -> list[str]:
        """Those of the parameters that the stub names, too; the others are the grader's own."""
        return [name for name in self.parameters if re.search(rf"\b{name}\b", self.stub)]

    @property
    def forbidden_names(self) -> list[str]:
        """What the answer may not call, as a learner would write it."""
        return [_written(call, self.name) for call in self.forbids]

    @property
    def lacking(self) -> str | None:
        """What this machine lacks for it, in a sentence."""
        return None if self.lacks is None else self.lacks()

    def seen(self, answer: Answer, arguments: tuple, until: str | None = None) -> dict[str, Any]:
        """What is seen of an answer on a case's arguments, by name; a function's result has the name "", and
        what NotRight says stands under SAID. until: the name after which nothing more is looked at.
        """
        seen: dict[str, Any] = {}
        for name, value in self.looks(answer, arguments):
            seen[name] = value
            if name == until:
                break
        return seen

    def looks(self, answer: Answer, arguments: tuple) -> Iterator[tuple[str, Any]]:
        """What `seen` sees, one after the other: who has seen enough can stop."""
        if self.observe is None:
            yield "", answer(*arguments)
            return
        try:
            yield from self.observe(answer, *arguments)
        except NotRight as error:
            yield SAID, Sentence(str(error))

    def crash(self, answer: Answer, arguments: tuple) -> tuple[type, Sentence] | None:
        """The error that an answer ends with on a case; two are equal where they differ in numbers alone."""
        try:
            self.seen(answer, copy.deepcopy(arguments))
        except Exception as error:
            return type(error), Sentence(error)
        return None

    def is_untouched(self, answer: Answer, source: str | None) -> bool:
        """Whether the answer is still the stub. source: its own, where that is known."""
        if source is not None and _shape(source) is not None and _shape(source) == _shape(self.stub):
            return True
        return not inspect.isclass(answer) and is_empty(answer)


def _empty_body(function: Answer) -> str:
    """The head of a function, on one line where it fits and else an argument a line."""
    signature = inspect.signature(function)
    head = f"def {function.__name__}{signature}:"
    for long, short in SHORT_NAMES.items():
        head = head.replace(long, short)
    if len(head) > STUB_WIDTH:
        arguments, arrow, result = head.removesuffix(":").rpartition(" -> ")
        name, _, inside = arguments.removesuffix(")").partition("(")
        parts = [f"    {part.strip()},\n" for part in _split_at_top(inside)]
        head = f"{name}(\n{''.join(parts)}){arrow}{result}:"
    return f"{head}\n    # your code here\n    ...\n"


def _split_at_top(arguments: str) -> list[str]:
    """Arguments, split at the commas that stand in no brackets."""
    parts = [""]
    depth = 0
    for character in arguments:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _written(call: Answer | str, exercise: str) -> str:
    """exercise: the name of the exercise that forbids the call."""
    if isinstance(call, str):
        return call
    module = call.__module__.replace("torch.nn.functional", "F").replace("torch.nn.modules.", "nn.")
    name = getattr(call, "__qualname__", call.__name__)
    may_be_confused = inspect.isfunction(call) or name == exercise  # with what the learner writes
    is_ours = module.startswith("shared.") and may_be_confused
    return f"{module}.{name}" if module == "F" or is_ours else name


def _shape(source: str) -> str | None:
    """A source without its comments, docstrings and spacing; None where it is no Python."""
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            is_text = [isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in body]
            node.body = [s for s, text in zip(body, is_text) if not text]  # type: ignore[attr-defined]
    return ast.dump(tree)


def is_empty(function: Answer) -> bool:
    """Whether the body is nothing but a docstring, `...` or `pass`."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return False
    trivial = (_ellipsis, _pass, _documented, lambda: ..., lambda: None)
    docstring = getattr(inspect.unwrap(function), "__doc__", None)
    constants = [c for c in code.co_consts if c is not None and c is not ... and c != docstring]
    return not constants and code.co_code in [body.__code__.co_code for body in trivial]


def _ellipsis() -> None: ...


def _pass() -> None:
    pass


def _documented() -> None:
    """A docstring."""


def random_int(generator: torch.Generator, low: int, high: int) -> int:
    """A random number from `low` up to, not including, `high`, for an exercise's cases."""
    return int(torch.randint(low, high, (1,), generator=generator))
