"""Week 0. Grades an answer: solved, not attempted, or wrong, and then how.

A wrong answer is told in this order: it crashed, it never ends, it changed its input, it makes a known
mistake, it breaks a property (see properties.py), it differs. The smallest case that shows it comes with it.
"""

import copy
import inspect
import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from typing import Any

import torch

from shared.course.exercise.comparison import (
    LOOSE,
    alike_in_type,
    difference,
    has_no_nan,
    is_all_nan,
    is_bounded,
    loosened,
    same,
)
from shared.course.exercise.definition import SAID, Answer, Exercise, Mistake, Sentence
from shared.course.exercise.gradients import (
    OVERWRITES,
    Gradients,
    gradients,
    where_detached,
    where_overflowing,
)
from shared.course.exercise.properties import Evidence, Failure, property_of
from shared.course.exercise.running import (
    SECONDS,
    Calls,
    TimeUpError,
    capped,
    changes_its_input,
    changes_the_program,
    kept,
    left_alone,
    parameters_of,
    printing_a_little,
    says_unwritten,
    stopwatch,
    where,
)
from shared.course.exercise.shrinking import size, smallest
from shared.course.exercise.trials import Trial, first_difference
from shared.course.exercise.verdict import Case, Verdict
from shared.runtime import clock

OTHER_CASES = 1000
"""Added to the seed for the cases that a right answer is tried on once more."""


def grade(exercise: Exercise, answer: Any, seed: int = 0, source: str | None = None) -> Verdict:
    """Runs an answer on the exercise's cases beside the reference; not attempted, with the reason, where this
    machine lacks what the exercise needs.

    The inputs are copies, so nothing that it does can reach a later case. seed: of the cases. source: the
    answer's, where it is known: an unchanged stub is told by it.
    """
    if not callable(answer):
        says = f"this is {type(answer).__name__} {answer!r:.60}, and a function or a class is wanted."
        return Verdict(exercise.name, "wrong", says, kind="type")
    if exercise.lacking:
        return Verdict(exercise.name, "not attempted", f"not graded on this machine: {exercise.lacking}")
    if exercise.is_untouched(answer, source):
        return _not_attempted(exercise)
    verdict = _Grading(exercise, answer, seed).verdict()
    if verdict.status == "solved":  # and not only on the cases that a learner has seen
        with redirect_stdout(io.StringIO()):
            again = _Grading(exercise, answer, seed + OTHER_CASES).verdict()
        if again.status == "wrong":
            says = f"right on the cases that were tried first, but not on others: {again.says}"
            return replace(again, says=says)
    return verdict


def readable_case(exercise: Exercise) -> Case:
    """The case of an exercise that is quickest to read, with the right result."""
    cases = [tuple(case) for case in exercise.cases(torch.Generator().manual_seed(0))]
    arguments = min(cases, key=size)
    seen = exercise.seen(exercise.reference, copy.deepcopy(arguments))
    what, expected = next(iter(seen.items()))
    return Case(dict(zip(exercise.parameters, arguments)), expected, what=what)


def _not_attempted(exercise: Exercise) -> Verdict:
    return Verdict(exercise.name, "not attempted", "not attempted yet. Write it in place of the stub.")


class _Grading:
    """An answer being graded."""

    def __init__(self, exercise: Exercise, answer: Answer, seed: int):
        self.exercise = exercise
        self.answer = answer
        started = clock()
        cases = exercise.cases(torch.Generator().manual_seed(seed))
        trials = [Trial(tuple(case), self._right(tuple(case))) for case in cases]
        # A law that the reference breaks by chance, as one on drawn tokens may be, says nothing of an answer.
        self.trials = [trial for trial in trials if SAID not in trial.expected]
        self.seconds = max(SECONDS, 20 * (clock() - started))
        self.tolerance = exercise.tolerance
        self.remark = ""
        """What is said to a right answer beside that it is right."""

    def _right(self, arguments: tuple) -> dict[str, Any]:
        return self.exercise.seen(self.exercise.reference, copy.deepcopy(arguments))

    def _yours(self, arguments: tuple) -> dict[str, Any]:
        return kept(self.exercise.seen(self.answer, arguments))

    def verdict(self) -> Verdict:
        calls = Calls(self.exercise.forbids)
        changed: list[str] = []
        with left_alone(changed), printing_a_little():
            verdict = self._tried(calls)
        if changed and (verdict is None or verdict.kind != "time"):
            return self._verdict("program", changes_the_program(changed))
        if verdict is not None:
            return verdict
        # What the answer prints is shown once, not for every try, and so is what PyTorch warns of.
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            failed = [trial for trial in self.trials if not self._is_right(trial)]
            if failed:
                return self._wrong(failed)
            return self._forbidden(calls) or self._detached() or self._solved()

    def _is_right(self, trial: Trial) -> bool:
        return same(trial.seen, trial.expected, self.tolerance)

    def _tried(self, calls: Calls) -> Verdict | None:
        """Runs the answer on every case. The verdict where it does not come back with a result."""
        passed = stopwatch()
        for number, trial in enumerate(self.trials, 1):
            given = copy.deepcopy(trial.arguments)
            try:
                with calls.watched():
                    trial.seen = capped(max(self.seconds - passed(), 0.01), self._yours, given)
            except TimeUpError as error:
                return self._too_slow(trial, error)
            except (Exception, SystemExit) as error:
                if isinstance(error, NotImplementedError) and says_unwritten(error, self.answer):
                    return _not_attempted(self.exercise)
                return self._crashed(trial, error, number)
            if not same(given, trial.arguments, 0):
                return self._changed_input(given, trial)
        return None

    def _solved(self) -> Verdict:
        says = f"solved. It agrees with the reference on all {len(self.trials)} cases.{self.remark}"
        return Verdict(self.exercise.name, "solved", says)

    def _verdict(self, kind: str, says: str, case: Case | None = None, mistake: str | None = None) -> Verdict:
        return Verdict(self.exercise.name, "wrong", says, mistake, kind, case)

    # ---- before any result is compared

    def _too_slow(self, trial: Trial, error: TimeUpError) -> Verdict:
        line = where(error, self.answer)
        at = f" It was at {line}." if line else ""
        says = (
            f"it was still running after {self.seconds:.0f} s, and was ended. Is there a loop whose condition"
            f" never becomes false?{at}"
        )
        return self._verdict("time", says, self._case(trial.arguments, "", error="it never came back"))

    def _crashed(self, trial: Trial, error: Exception | SystemExit, number: int) -> Verdict:
        signature = self._wrong_signature()
        if signature:
            return self._verdict("crash", signature)
        mistake = None
        with redirect_stdout(io.StringIO()), suppress(TimeUpError):
            mistake, wrong = capped(self.seconds, self._crashing_mistake, trial, error)
            if mistake is not None and wrong:
                what = first_difference(wrong, self.tolerance)
                return capped(self.seconds, self._mistaken, mistake, wrong, what)
        found: list[tuple[tuple, BaseException]] = [(trial.arguments, error)]

        def crashes(arguments: tuple) -> bool:
            if not self._is_valid(arguments):
                return False
            try:
                self._yours(copy.deepcopy(arguments))
            except (Exception, SystemExit) as smaller:
                if type(smaller) is type(error):
                    found.append((arguments, smaller))
                    return True
            return False

        with redirect_stdout(io.StringIO()), suppress(TimeUpError):
            if capped(self.seconds, crashes, trial.arguments):
                capped(self.seconds, smallest, trial.arguments, crashes)
        arguments, last = found[-1]
        case = self._case(arguments, "", error=where(last, self.answer))
        if mistake is not None:
            return self._verdict("mistake", mistake.told, case, mistake.name)
        return self._verdict("crash", f"it crashed on case {number} of {len(self.trials)}.", case)

    def _crashing_mistake(self, crashed: Trial, error: BaseException) -> tuple[Mistake | None, list[Trial]]:
        """The mistake that crashes with the same words; or the one that does the same wherever the answer
        ends, and the cases that show it.
        """
        for mistake in self.exercise.mistakes:
            if self.exercise.crash(mistake.function, crashed.arguments) == (type(error), Sentence(error)):
                return mistake, []
        ended = []
        for trial in self.trials:
            with suppress(Exception, SystemExit):
                trial.seen = self._yours(copy.deepcopy(trial.arguments))
                ended.append(trial)
        wrong = [trial for trial in ended if not self._is_right(trial)]
        for mistake in self.exercise.mistakes if wrong else ():
            if self._does_the_same(mistake, ended, self.tolerance) and self._tells_apart(mistake, wrong):
                return mistake, wrong
        return None, []

    def _wrong_signature(self) -> str | None:
        """What is wrong with the number of the answer's arguments, if that is what makes it crash."""
        if self.exercise.observe is not None:
            return None
        wanted = self.exercise.parameters
        try:
            inspect.signature(self.answer).bind(*wanted)
        except TypeError:
            own = parameters_of(self.answer)
            return own and f"it takes {own}, and the task calls it with ({', '.join(wanted)})."
        except ValueError:  # a built-in function without a signature
            return None
        return None

    def _changed_input(self, given: tuple, trial: Trial) -> Verdict:
        arguments = trial.arguments
        with redirect_stdout(io.StringIO()), suppress(TimeUpError):
            smaller = capped(self.seconds, smallest, arguments, self._changes)
            after = copy.deepcopy(smaller)
            self._yours(after)
            if not same(after, smaller, 0):
                given, arguments = after, smaller
        triples = zip(self.exercise.parameters, given, arguments)
        changed = [(name, now, was) for name, now, was in triples if not same(now, was, 0)]
        says = changes_its_input({name: was for name, _, was in changed})
        name, now, was = changed[0]
        before = dict(zip(self.exercise.parameters, arguments))
        case = Case(before, was, now, what=f"{name} after the call", differs=difference(now, was, 0))
        return self._verdict("input", says, case)

    def _changes(self, arguments: tuple) -> bool:
        """Whether the answer changes arguments that the task allows."""
        given = copy.deepcopy(arguments)
        try:
            self._yours(given)
        except Exception:
            return False
        return not same(given, arguments, 0) and self._is_valid(arguments)

    # ---- right, but

    def _forbidden(self, calls: Calls) -> Verdict | None:
        if not calls.made:
            return None
        names = [self.exercise.forbidden_names[self.exercise.forbids.index(call)] for call in calls.made]
        says = f"right, but by a call that the task forbids: {', '.join(names)}. Write out what it does."
        return self._verdict("forbidden", says)

    def _detached(self) -> Verdict | None:
        """The verdict where gradients do not reach the arguments, or are not the reference's."""
        if not self.exercise.differentiable:
            return None
        names = self.exercise.parameters
        for trial in self.trials:
            right = gradients(self.exercise.reference, names, trial.arguments)
            says = "the values are right, but their gradient is not."
            try:
                yours = capped(self.seconds, gradients, self.answer, names, trial.arguments)
            except (Exception, TimeUpError, SystemExit) as error:
                if "modified by an inplace operation" in str(error):
                    self.remark = OVERWRITES
                    continue
                says = f"the values are right, but not with gradients: {where(error, self.answer)}"
            else:
                if same(yours, right, 10 * self.tolerance):
                    continue
                says = where_detached(yours, right) or ""
                if not says:
                    return self._wrong_gradient(trial, yours, right)
            return self._verdict("detached", says, self._case(trial.arguments, ""))
        return None

    def _wrong_gradient(self, trial: Trial, yours: Gradients, right: Gradients) -> Verdict:
        """The verdict with the first gradient that is wrong; a known mistake's name, where one has it too."""
        name = next(n for n in right if not same(yours[n], right[n], 10 * self.tolerance))
        differs = difference(yours[name], right[name], 10 * self.tolerance)
        given = dict(zip(self.exercise.parameters, trial.arguments))
        case = Case(given, right[name], yours[name], what=f"the gradient of {name}", differs=differs)
        for mistake in self.exercise.mistakes:
            if self._does_the_same(mistake, [trial], self.tolerance):
                made = gradients(mistake.function, self.exercise.parameters, trial.arguments)
                if same(made, yours, 10 * self.tolerance):
                    return self._verdict("mistake", mistake.told, case, mistake.name)
        says = f"the values are right, but the gradient of `{name}` is not."
        return self._verdict("detached", where_overflowing(yours, right) or says, case)

    # ---- wrong

    def _wrong(self, failed: Sequence[Trial]) -> Verdict:
        what = first_difference(failed, self.tolerance)
        failed = sorted(failed, key=lambda trial: not trial.is_wrong_in(what, self.tolerance))
        case = self._case(failed[0].arguments, what)
        verdict = self._verdict("differs", f"not right yet. {case.differs}".rstrip(), case)
        with suppress(TimeUpError):  # then what was found until then is told
            verdict = capped(self.seconds, self._explained, failed, what)
        return verdict

    def _explained(self, failed: Sequence[Trial], what: str) -> Verdict:
        """The verdict with what can be found out about how the answer is wrong."""
        mistake, is_exact = self._known_mistake(failed)
        if mistake is not None and is_exact:
            return self._mistaken(mistake, failed, what)
        if what == SAID:
            said = next(trial for trial in failed if SAID in trial.seen)
            return self._verdict("property", f"not right yet: {said.seen[SAID]}", self._given(said.arguments))
        if self._of_another_type(failed, what):
            case = self._smallest(failed, what)
            return self._verdict("type", f"not right yet: {case.differs}", case)
        if mistake is not None:
            return self._mistaken(mistake, failed, what)
        case = self._smallest(failed, what)
        says = self._explanation(case) or property_of(self._evidence(failed, what))
        if says:
            return self._verdict("property", f"not right yet. {says}", case)
        share = f"{len(failed)} of {len(self.trials)} cases"
        return self._verdict("differs", f"not right yet, on {share}. {case.differs}", case)

    def _explanation(self, case: Case) -> str | None:
        """What the exercise itself says of the answer's result on a case."""
        if self.exercise.explain is None or case.error:
            return None
        with suppress(Exception):  # a result of any form
            return self.exercise.explain(case.yours, *case.arguments)
        return None

    def _mistaken(self, mistake: Mistake, failed: Sequence[Trial], what: str) -> Verdict:
        case = self._smallest(failed, what, mistake)
        return self._verdict("mistake", mistake.told, case, mistake.name)

    def _known_mistake(self, failed: Sequence[Trial]) -> tuple[Mistake | None, bool]:
        """The mistake that does the same in all cases; or nearly, in every case that is wrong.

        Cases in which the answer overflows as well are left out of the near ones: two things are wrong there.
        """
        finite = [trial for trial in failed if all(map(is_bounded, trial.seen.values()))]
        near: list[Mistake] = []
        for mistake in self.exercise.mistakes:
            if self._does_the_same(mistake, self.trials, self.tolerance):
                return mistake, True
            if self._does_the_same(mistake, finite, LOOSE) and self._tells_apart(mistake, finite):
                near.append(mistake)
        return (near[0] if near else None), False

    def _does_the_same(self, mistake: Mistake, trials: Sequence[Trial], tolerance: float) -> bool:
        for trial in trials:
            seen = loosened(trial.seen, tolerance)
            made = set()
            try:
                for what, value in self.exercise.looks(mistake.function, copy.deepcopy(trial.arguments)):
                    if what not in seen or not same(seen[what], loosened(value, tolerance), tolerance):
                        return False  # what comes behind it makes it no more alike
                    made.add(what)
            except Exception:
                return False
            if made != seen.keys():
                return False
        return True

    def _tells_apart(self, mistake: Mistake, failed: Sequence[Trial]) -> bool:
        """Whether agreeing with the mistake says something: results have many values, or fail many times."""
        return len(failed) > 1 or bool(failed) and sum(map(size, failed[0].expected.values())) > 6

    def _of_another_type(self, failed: Sequence[Trial], what: str) -> bool:
        """Whether the results differ in what they are, before any value is looked at."""
        yours, right = failed[0].seen.get(what), failed[0].expected.get(what)
        return not alike_in_type(yours, right, self.tolerance)

    def _evidence(self, failed: Sequence[Trial], what: str) -> Evidence:
        failures = [
            Failure(trial.arguments, trial.seen[what], trial.expected[what])
            for trial in failed
            if what in trial.seen and trial.is_wrong_in(what, self.tolerance)
        ]

        def on(answer: Answer) -> Callable[[tuple], Any]:
            return lambda arguments: kept(self.exercise.seen(answer, copy.deepcopy(arguments), what))[what]

        return Evidence(
            self.exercise.parameters,
            failures,
            [trial.arguments for trial in self.trials],
            on(self.answer),
            on(self.exercise.reference),
            self.tolerance,
            whole=None if self.exercise.observe is None else self._yours,
            named=self.exercise.named,
        )

    # ---- the smallest case

    def _is_valid(self, arguments: tuple) -> bool:
        return self._right_if_valid(arguments) is not None

    def _right_if_valid(self, arguments: tuple) -> dict[str, Any] | None:
        """What is right for arguments; None where the task does not allow them, as far as can be told."""
        try:  # a smaller case may not even have the form that `valid` counts on
            if self.exercise.valid is not None and not self.exercise.valid(*arguments):
                return None
            expected = self._right(arguments)
        except Exception:
            return None
        return expected if all(has_no_nan(value) for value in expected.values()) else None

    def _smallest(self, failed: Sequence[Trial], what: str, mistake: Mistake | None = None) -> Case:
        """The smallest case on which the answer is wrong in the same way."""
        is_alike = not self._of_another_type(failed, what)
        candidates = [trial for trial in failed if trial.is_wrong_in(what, self.tolerance)]
        telling = [t for t in candidates if not any(is_all_nan(r.get(what)) for r in (t.seen, t.expected))]

        def fails_alike(arguments: tuple) -> bool:
            right = self._right_if_valid(arguments)
            if right is None:
                return False
            try:
                yours = kept(self.exercise.seen(self.answer, copy.deepcopy(arguments), what))
                is_cut_off = SAID in yours and what not in yours
                if is_cut_off or same(yours.get(what), right.get(what), self.tolerance):
                    return False
                if telling and is_all_nan(yours.get(what)):
                    return False
                if alike_in_type(yours.get(what), right.get(what), self.tolerance) != is_alike:
                    return False
                if not is_alike and self._differs(yours, right, what) != differs:
                    return False  # a shape whose sizes are all 1 says nothing
                if mistake is None:
                    return True
                made = self.exercise.seen(mistake.function, copy.deepcopy(arguments), what)
            except Exception:
                return False
            return same(loosened(yours.get(what), LOOSE), loosened(made.get(what), LOOSE), LOOSE)

        simplest = min(telling or candidates or failed, key=lambda trial: size(trial.arguments))
        if what == SAID:  # a law is broken: there is no result to compare
            return replace(self._given(simplest.arguments), differs=str(simplest.seen.get(SAID, "")))
        first = (candidates or failed)[0]
        differs = self._differs(first.seen, first.expected, what)
        return self._case(smallest(simplest.arguments, fails_alike), what)

    def _differs(self, yours: dict[str, Any], right: dict[str, Any], what: str) -> Sentence:
        if same(yours.get(what), right.get(what), self.tolerance):
            return Sentence("")
        return Sentence(difference(yours.get(what), right.get(what), self.tolerance))

    def _given(self, arguments: tuple) -> Case:
        """A case without results."""
        return Case(dict(zip(self.exercise.parameters, arguments)), None, only_given=True)

    def _case(self, arguments: tuple, what: str, error: str = "") -> Case:
        expected = self._right(arguments)
        what = what if what in expected else next(iter(expected))
        yours, differs = None, ""
        if not error:
            try:
                yours = capped(self.seconds, self._yours, copy.deepcopy(arguments)).get(what)
            except (Exception, TimeUpError, SystemExit):
                yours = None
            else:
                if not same(yours, expected[what], self.tolerance):
                    differs = difference(yours, expected[what], self.tolerance)
        given = dict(zip(self.exercise.parameters, arguments))
        return Case(given, expected[what], yours, error, what, differs)
