"""Week 0. Runs a learner's answer: with an end to endless loops, and an eye on calls that a task forbids."""

import ctypes
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

SECONDS = 10.0
"""How long all cases of an answer may take together, where the reference takes no time."""


class TimeUpError(BaseException):
    """Raised in an answer that runs too long. Not an Exception: an answer may catch those."""


@contextmanager
def time_cap(seconds: float) -> Iterator[None]:
    """Inside, after so many seconds, TimeUpError is raised in this thread, at the next line of Python.

    A call into C (one large matrix product, `time.sleep`) is not cut short, only what comes after it.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    changing = threading.Lock()
    state = {"inside": True, "raised": False}

    def interrupt() -> None:
        with changing:
            if state["inside"]:
                state["raised"] = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeUpError))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with changing:
            state["inside"] = False
        timer.cancel()
        if state["raised"] and not isinstance(sys.exc_info()[1], TimeUpError):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)  # it ended in the very last moment


class Calls:
    """Notices calls of given functions, under whatever name they were imported.

    Python functions and classes are known by their code, functions and methods written in C by their name.
    """

    def __init__(self, forbidden: Sequence[Callable | str]):
        self._codes = {_code(call): call for call in forbidden if not isinstance(call, str)}
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
            call = self._codes.get(frame.f_code)
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


def where(error: BaseException, answer: Any) -> str:
    """The learner's own line that an error came from, and the error."""
    own = files_of(answer)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename in own or "ipykernel" in frame.filename
    ]
    line = ""
    if frames and frames[-1].line:
        line = f"line {frames[-1].lineno}: {frames[-1].line}\n"
    if isinstance(error, TimeUpError):
        return line.rstrip("\n")
    return f"{line}{type(error).__name__}: {error}"
