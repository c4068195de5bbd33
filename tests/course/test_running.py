"""How an answer is run: loops end, forbidden calls are seen, and the rest of the program stays as it was."""

import inspect
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy as ce

from shared.course.exercise import grade, grading
from shared.course.exercise.running import PRINTED, Calls, TimeUpError, capped
from shared.runtime import ROOT
from tests.course.helpers import made_up, normal

SECONDS = 0.2


@pytest.fixture
def impatient(monkeypatch):
    """A grader that waits a moment."""
    monkeypatch.setattr(grading, "SECONDS", SECONDS)


def in_thread(work):
    """What `work()` returns or raises in another thread, where there are no signals."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    return outcome[0]


# ---- the end of endless loops


def endless(x):
    while True:
        x = x + 1


def swallowing(x):
    while True:
        try:
            x = x.log() + 1
        except Exception:
            continue


def swallowing_everything(x):
    while True:
        try:
            x = x.log() + 1
        except:  # noqa: E722  what learners write
            continue


def _for_ever(x):
    while True:
        x = x * 0.5  # in a helper


def with_helper(x):
    return _for_ever(x)


def recursive(x, depth=0):
    return recursive(x, depth + 1)


def sleeping(x):
    time.sleep(60)


def waiting(x):
    threading.Event().wait(60)


LOOPS = [endless, swallowing, swallowing_everything, with_helper, sleeping, waiting]


@pytest.mark.slow
@pytest.mark.parametrize("answer", LOOPS)
def test_a_loop_is_ended_and_its_line_is_named(impatient, answer):
    verdict = grade(made_up(lambda x: x, normal((2,))), answer)
    assert (verdict.status, verdict.kind) == ("wrong", "time")
    assert re.search(r"still running after \d+ s, and was ended", verdict.says)
    at, _, in_helper = verdict.says.split("It was at line ")[1].split(":")[0].partition(" of ")
    line = int(at)
    assert in_helper == ("_for_ever" if answer is with_helper else "")
    code = (_for_ever if answer is with_helper else answer).__code__
    lines = [at for _, _, at in code.co_lines() if at]
    assert min(lines) <= line <= max(lines)


@pytest.mark.slow
@pytest.mark.parametrize("answer", [endless, swallowing, swallowing_everything, with_helper])
def test_a_loop_in_another_thread_is_ended_too(answer):
    assert isinstance(in_thread(lambda: capped(SECONDS, answer, torch.ones(2))), TimeUpError)


@pytest.mark.slow
def test_the_cap_is_for_all_cases_together(impatient):
    def slow(x):
        end = time.monotonic() + 0.4 * SECONDS
        while time.monotonic() < end:
            pass
        return x

    started = time.monotonic()
    assert grade(made_up(lambda x: x, normal(*[(2,)] * 50)), slow).kind == "time"
    assert time.monotonic() - started < 20 * SECONDS


def busy(seconds):
    """Python code for so long. Raises what waits for this thread."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return "came back"


@pytest.mark.slow
@settings(max_examples=60)
@given(st.floats(-0.001, 0.001), st.booleans())
def test_the_cap_leaves_nothing_behind(lead, threaded):
    """Also where the work ends at the very moment when the time is up: it comes back, or its time was up."""

    def work():
        try:
            ended = capped(0.005, busy, 0.005 + lead)
        except TimeUpError:
            ended = "time up"
        busy(0.002)
        return ended

    assert (in_thread(work) if threaded else work()) in ("time up", "came back")


@pytest.mark.slow
def test_nothing_of_a_cap_comes_later():
    for lead in (-0.0005, 0, 0.0005):
        with suppress(TimeUpError):
            capped(0.02, busy, 0.02 + lead)
    assert busy(0.3) == "came back"  # three times as long as until an error is raised again


@pytest.mark.slow
def test_a_cap_within_a_cap_leaves_the_outer_one_in_force():
    def outer():
        with pytest.raises(TimeUpError):
            capped(0.05, endless, torch.ones(1))
        endless(torch.ones(1))

    with pytest.raises(TimeUpError):
        capped(0.3, outer)


@pytest.mark.slow
@pytest.mark.parametrize("threaded", [False, True])
def test_time_that_other_programs_take_does_not_count(threaded, monkeypatch):
    monkeypatch.setattr(time, "process_time", lambda: 0.0)  # as if it got none of the processor

    def work(seconds):
        try:
            return capped(SECONDS, busy, seconds)
        except TimeUpError:
            return "time up"

    run = in_thread if threaded else lambda timed: timed()
    assert run(lambda: work(2 * SECONDS)) == "came back"
    assert run(lambda: work(6 * SECONDS)) == "time up"


@pytest.mark.parametrize("threaded", [False, True])
def test_work_in_time_is_left_alone(threaded):
    def work():
        return capped(10, sum, range(1000))

    assert (in_thread(work) if threaded else work()) == 499500


def test_ctrl_c_reaches_the_person_and_disarms_the_cap():
    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade(made_up(lambda x: x, normal((2,))), interrupted)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


# ---- where it crashed


def _first_two(x):
    return [x[i] for i in (0, 1)]


def _with_helper(x):
    first, _ = _first_two(x)
    return first


class _WithMethod:
    def __call__(self, x):
        return self.first_two(x)[0]

    def first_two(self, x):
        return [x[i] for i in (0, 1)]


def test_a_crash_in_another_function_names_it_and_the_call():
    at, called = (inspect.getsourcelines(f)[1] + 1 for f in (_first_two, _with_helper))
    exercise = made_up(lambda x: x[0], normal((1,)))
    said = grade(exercise, _with_helper).case.error.splitlines()
    assert said[0] == f"line {at} of _first_two: return [x[i] for i in (0, 1)]"
    assert said[1] == f"which line {called} calls: first, _ = _first_two(x)"
    assert said[2].startswith("IndexError: ") and len(said) == 3
    method = inspect.getsourcelines(_WithMethod.first_two)[1] + 1  # of the answer itself
    assert grade(exercise, _WithMethod()).case.error.startswith(f"line {method}: return")


# ---- forbidden calls


def by_its_name(logits, targets):
    return F.cross_entropy(logits, targets)


def by_an_alias(logits, targets):
    return ce(logits, targets)


def by_a_module(logits, targets):
    return nn.CrossEntropyLoss()(logits, targets)


def through_getattr(logits, targets):
    return getattr(torch.nn.functional, "cross_" + "entropy")(logits, targets)


def in_a_helper(logits, targets):
    return by_an_alias(logits, targets)


def by_hand(logits, targets):
    return -logits.log_softmax(-1).gather(1, targets[:, None]).mean()


def _pairs(generator):
    logits = torch.randn(4, 3, generator=generator)
    return [(logits, torch.randint(3, (4,), generator=generator))]


@pytest.mark.parametrize("answer", [by_its_name, by_an_alias, by_a_module, through_getattr, in_a_helper])
def test_a_forbidden_call_is_seen_under_any_name(answer):
    exercise = made_up(by_hand, _pairs, forbids=(F.cross_entropy,))
    verdict = grade(exercise, answer)
    assert (verdict.status, verdict.kind) == ("wrong", "forbidden")
    assert "right, but by a call that the task forbids: F.cross_entropy." in verdict.says
    assert grade(exercise, by_hand).status == "solved"


@pytest.mark.parametrize(
    "answer", [lambda x: x.softmax(-1), lambda x: torch.softmax(x, -1), lambda x: F.softmax(x, dim=-1)]
)
def test_a_function_in_c_is_known_by_its_name(answer):
    def by_hand(x):
        return x.exp() / x.exp().sum(-1, keepdim=True)

    exercise = made_up(by_hand, normal((2, 3)), forbids=("softmax",))
    assert grade(exercise, answer).kind == "forbidden"
    assert grade(exercise, exercise.reference).status == "solved"


def test_a_wrong_answer_is_told_what_is_wrong_and_not_what_is_forbidden():
    exercise = made_up(by_hand, _pairs, forbids=(F.cross_entropy,))
    assert grade(exercise, lambda logits, targets: 2 * by_its_name(logits, targets)).kind == "property"


def test_the_profile_function_is_restored():
    def profile(frame, event, what):
        pass

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        with pytest.raises(ZeroDivisionError), Calls(["softmax"]).watched():
            assert sys.getprofile() is not profile
            _ = 1 / 0
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(before)


# ---- the rest of the program


def patching(x):
    torch.allclose = lambda *tensors, **options: True
    torch.Tensor.exp = None
    return x


def other_dtype(x):
    torch.set_default_dtype(torch.float64)
    return x


def without_gradients(x):
    torch.set_grad_enabled(False)
    return x


def other_builtin(x):
    import builtins

    builtins.len = lambda value: 7
    return x


@pytest.mark.parametrize(
    "answer, name",
    [
        (patching, "torch.allclose"),
        (other_dtype, "torch.get_default_dtype()"),
        (without_gradients, "torch.is_grad_enabled()"),
        (other_builtin, "builtins.len"),
    ],
)
def test_what_an_answer_changes_for_all_is_put_back_and_named(answer, name):
    before = torch.allclose, torch.Tensor.exp, torch.get_default_dtype(), torch.is_grad_enabled(), len
    verdict = grade(made_up(lambda x: x * 2, normal((2,))), answer)
    assert (verdict.status, verdict.kind) == ("wrong", "program") and f"`{name}`" in verdict.says
    after = torch.allclose, torch.Tensor.exp, torch.get_default_dtype(), torch.is_grad_enabled(), len
    assert after == before


@pytest.mark.slow
def test_what_pytorch_changes_itself_is_no_fault_of_the_answer():
    """An optimizer imports torch._dynamo, which replaces torch.manual_seed."""
    lines = [
        "import torch",
        "from shared.course.exercise import grade",
        "from tests.course.helpers import made_up, normal",
        "before = torch.manual_seed",
        "def answer(x):",
        "    import torch._dynamo",
        "    return x * 2",
        "verdict = grade(made_up(lambda x: x * 2, normal((2,))), answer)",
        "print(verdict.status, torch.manual_seed is before)",
    ]
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "solved False\n", done.stdout + done.stderr


def test_a_lot_of_printing_is_cut_off(capsys):
    def chatty(x):
        for i in range(20_000):
            print("step", i)
        return x

    assert grade(made_up(lambda x: x, normal((2,), (3,))), chatty).status == "solved"
    shown = capsys.readouterr().out
    assert shown.startswith("step 0\nstep 1\n") and PRINTED < len(shown) < PRINTED + 100
    assert "it prints more than this" in shown


def test_a_little_printing_is_shown_once_for_each_case(capsys):
    def debugging(x):
        print("shape", list(x.shape))
        return x + 1

    grade(made_up(lambda x: x, normal((2,), (3,))), debugging)
    assert capsys.readouterr().out == "shape [2]\nshape [3]\n"
