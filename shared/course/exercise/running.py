"""Week 0. Runs a learner's answer: with an end to endless loops, an eye on calls that a task forbids, and a
look at whether it left the rest of the program as it was.
"""

import builtins
import ctypes
import inspect
import io
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from types import CodeType, FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.course.exercise.comparison import plain_tensor
from shared.runtime import clock

T = TypeVar("T")
SECONDS = 10.0
"""How long all cases of an answer may take together, where the reference takes no time."""
AGAIN = 0.1
"""Seconds after which an answer that caught the error of its end gets it once more."""
POLL = 0.01
"""Seconds between two looks at whether its time is up, and, where there is no timer, whether it has ended."""
BUSY = 3
"""How many times as long an answer may take where the machine gives its time to other programs."""
PRINTED = 4000
"""Characters of what an answer prints that are shown."""


# ---- an end to endless loops


class TimeUpError(BaseException):
    """Raised in an answer that runs too long. Not an Exception: an answer may catch those."""


def stopwatch() -> Callable[[], float]:
    """Tells the seconds that have passed: those in which this process computed, where a busy machine let it
    wait; but at least a part, one in BUSY, of all, so that an answer that sleeps has an end, too.
    """
    started, computed = clock(), time.process_time()

    def passed() -> float:
        all_in_all = clock() - started
        return min(all_in_all, max(time.process_time() - computed, all_in_all / BUSY))

    return passed


def capped(seconds: float, work: Callable[..., T], *arguments: Any) -> T:
    """What `work(*arguments)` returns. After so many seconds, by the stopwatch, TimeUpError is raised in it,
    and again until it gets out.

    In the main thread, where the system has timers, what waits (`time.sleep`, a lock) is cut short, too. In
    another thread, and on Windows, the error comes at the next line of Python. One long call into C, such as
    a huge matrix product, is not cut short, only what comes after it.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _capped_by_timer(seconds, work, *arguments)
    return _capped_by_thread(seconds, work, *arguments)


def _capped_by_timer(seconds: float, work: Callable[..., T], *arguments: Any) -> T:
    started, passed, due = clock(), stopwatch(), seconds

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal due
        is_answers = frame is not None and frame.f_code.co_filename != __file__  # not in the lines below
        if is_answers and passed() >= due:
            due = passed() + AGAIN
            raise TimeUpError

    handler = signal.signal(signal.SIGALRM, interrupt)
    outer, interval = signal.setitimer(signal.ITIMER_REAL, seconds, POLL)
    try:
        return work(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if outer:  # a cap round this one goes on
            signal.setitimer(signal.ITIMER_REAL, max(outer - (clock() - started), 0.01), interval)


def _capped_by_thread(seconds: float, work: Callable[..., T], *arguments: Any) -> T:
    thread = ctypes.c_ulong(threading.get_ident())
    state = {"ended": False}

    def interrupt() -> None:
        passed, due = stopwatch(), seconds
        while not state["ended"]:
            if passed() >= due:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeUpError))
                due += AGAIN
            time.sleep(POLL)

    def end() -> None:
        """Ends the timer. What it raised in the last moment comes here, and is dropped. (To take it back with
        PyThreadState_SetAsyncExc(thread, None) would leave CPython 3.11 looking for it without an end.)
        """
        while True:
            try:
                state["ended"] = True
                timer.join()
                for _ in range(10):
                    pass
                return
            except TimeUpError:
                continue

    timer = threading.Thread(target=interrupt, daemon=True)
    timer.start()
    try:
        try:
            return work(*arguments)
        finally:
            end()
    finally:  # where the error came in the lines above
        end()


# ---- what an answer does beside its result


class _Bounded(io.TextIOBase):
    """Hands on what is printed, up to a number of characters."""

    def __init__(self, to: Any, characters: int):
        self._to = to
        self._left = characters

    def write(self, text: str) -> int:
        if self._left > 0:
            self._to.write(text[: self._left])
            if len(text) > self._left:
                self._to.write("\n... (it prints more than this; the rest is left out)\n")
        self._left -= len(text)
        return len(text)


def printing_a_little() -> AbstractContextManager[Any]:
    """Inside, printing ends after PRINTED characters: a loop that prints would fill the page."""
    return redirect_stdout(_Bounded(sys.stdout, PRINTED))


def kept(value: Any) -> Any:
    """A result as it is now: a tensor that the next call writes into stays what it was."""
    if isinstance(value, Tensor):
        return plain_tensor(value).clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(map(kept, value))
    if type(value) is dict:
        return {key: kept(part) for key, part in value.items()}
    return value


EVERYBODYS: dict[str, Any] = {
    "torch": torch,
    "F": F,
    "torch.Tensor": torch.Tensor,
    "nn.Module": nn.Module,
    "np": np,
    "math": math,
    "builtins": builtins,
}
"""What all of a program uses, the grader too."""


def _is_the_librarys(value: Any) -> bool:
    """Whether PyTorch itself put it there, as it does when torch.compile's modules are first imported."""
    return str(getattr(value, "__module__", "")).startswith("torch.")


@contextmanager
def left_alone(changed: list[str]) -> Iterator[None]:
    """Puts back, at the end, what was changed of EVERYBODYS or PyTorch's modes; `changed` gets the names."""
    before = {name: dict(vars(owner)) for name, owner in EVERYBODYS.items()}
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
            changed.append("torch.get_default_dtype()")
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
            changed.append("torch.is_grad_enabled()")
        for name, owner in EVERYBODYS.items():
            now = vars(owner)
            others = [
                key
                for key, value in before[name].items()
                if now.get(key, changed) is not value and not _is_the_librarys(now.get(key))
            ]
            for attribute in others:
                setattr(owner, attribute, before[name][attribute])
                changed.append(f"{name}.{attribute}")
            if inspect.isclass(owner):  # what a class inherits may be hidden by something of its own
                new = [key for key in vars(owner) if key not in before[name]]
                for attribute in [key for key in new if not _is_the_librarys(vars(owner)[key])]:
                    delattr(owner, attribute)
                    changed.append(f"{name}.{attribute}")


class Calls:
    """Notices calls of given functions, under whatever name they were imported.

    Python functions and classes are known by their code, functions and methods written in C by their name.
    """

    def __init__(self, forbidden: Sequence[Callable | str]):
        self._codes = {_code(call): call for call in forbidden if not isinstance(call, str)}
        self._code_names = {code.co_name for code in self._codes}
        self._names = {call for call in forbidden if isinstance(call, str)}
        self.made: list[Callable | str] = []
        """Those that were called, each once."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, calls are noticed. With nothing to look for, nothing is slowed down."""
        if not self._codes and not self._names:
            yield
            return
        before = sys.getprofile()
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _profile(self, frame: FrameType, event: str, what: Any) -> None:
        call: Callable | str | None = None
        if event == "call":
            code = frame.f_code
            if code.co_name in self._code_names:  # first, as the hash of code is that of all its instructions
                call = self._codes.get(code)
        elif event == "c_call" and what.__name__ in self._names:
            call = what.__name__
        if call is not None and call not in self.made:
            self.made.append(call)


def _code(call: Callable) -> CodeType:
    function = inspect.unwrap(call.__init__ if inspect.isclass(call) else call)
    return function.__code__


def files_of(answer: Any) -> set[str]:
    """The files, or notebook cells, that an answer's code is in."""
    parts = [*vars(answer).values()] if inspect.isclass(answer) else [answer, type(answer).__call__]
    codes = (getattr(inspect.unwrap(part), "__code__", None) for part in parts if callable(part))
    return {code.co_filename for code in codes if code is not None}


def _own_frames(error: BaseException, answer: Any) -> list[tuple[traceback.FrameSummary, CodeType]]:
    """The lines of the learner's own code that an error came through, and the function that each is in."""
    own = files_of(answer)
    lines = traceback.extract_tb(error.__traceback__)
    codes = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return [
        (line, code)
        for line, code in zip(lines, codes)
        if line.filename in own or "ipykernel" in line.filename
    ]


def where(error: BaseException, answer: Any) -> str:
    """The learner's own line that an error came from, and the error.

    A line that is not in the answer itself, but in a function that the answer calls, is told with that
    function's name, and below it the line of the call.
    """
    lines = _own_lines(_own_frames(error, answer), answer)
    if isinstance(error, TimeUpError):
        return lines[0] if lines else ""
    if isinstance(error, RecursionError):
        says = "RecursionError: it calls itself without an end"
        lines = lines[:1]
    else:
        says = f"{type(error).__name__}: {_message(error)}"
    return "\n".join([*lines, says])


def _own_lines(frames: list[tuple[traceback.FrameSummary, CodeType]], answer: Any) -> list[str]:
    """The last line, and where that is in another function the answer's own line that led there."""
    if not frames or not frames[-1][0].line:
        return []
    last, code = frames[-1]
    helper = _helper(code, answer)
    if not helper:
        return [f"line {last.lineno}: {last.line}"]
    lines = [f"line {last.lineno} of {helper}: {last.line}"]
    calls = [line for line, code in frames if not _helper(code, answer)]
    if calls:
        lines.append(f"which line {calls[-1].lineno} calls: {calls[-1].line}")
    return lines


def _helper(code: CodeType, answer: Any) -> str:
    """The name of the function that code is in; empty where that is the answer itself."""
    names = [name for name in code.co_qualname.split(".") if not name.startswith("<")]
    qualified = getattr(inspect.unwrap(answer), "__qualname__", type(answer).__qualname__)
    own = [name for name in qualified.split(".") if not name.startswith("<")]
    if not names or names[: len(own)] == own:
        return ""
    return names[-1]


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be made)"


def says_unwritten(error: NotImplementedError, answer: Any) -> bool:
    """Whether the learner's own line raised it, as a stub does, and not a function that she called."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_own = last in [line for line, _ in _own_frames(error, answer)]
    return is_own and (not last.line or "raise NotImplementedError" in last.line)


def parameters_of(answer: Callable[..., Any]) -> str | None:
    """What a function takes, in brackets, without types; None where it does not say."""
    try:
        signature = inspect.signature(answer)
    except (TypeError, ValueError):
        return None
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def changes_the_program(changed: Sequence[str]) -> str:
    """What is said of an answer that changed what all of a program uses. changed: the names."""
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(changed))
    return (
        f"it changes {names} for the whole program, and for the grader. It was put back: everything that an"
        " answer needs to know comes in through its arguments."
    )


def changes_its_input(changed: Mapping[str, Any]) -> str:
    """What is said of an answer that changed its arguments. changed: their names and what they were."""
    plain = [type(value).__name__ for value in changed.values() if _is_plain(value)]
    way = "use an operation that returns a new tensor (x = x + 1, and masked_fill without the _ at its end)"
    if len(plain) == len(changed):
        way = f"build a new {plain[0]}"
    return (
        f"it changed its input `{', '.join(changed)}` in place. Whoever calls it still needs that value: work"
        f" on a copy, or {way}."
    )


def _is_plain(value: Any) -> bool:
    """Whether a value is made of Python's own types, without tensors."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return isinstance(value, str | bytes | int | float | None)
