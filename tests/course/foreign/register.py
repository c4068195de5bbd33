"""Where these answers enter themselves."""

from collections.abc import Callable

WRONG: list[tuple[Callable, str]] = []
"""Each with what is wrong with it."""
RIGHT: list[Callable] = []


def wrong(what: str) -> Callable[[Callable], Callable]:
    """Enters a wrong answer."""

    def enter(answer: Callable) -> Callable:
        WRONG.append((answer, what))
        return answer

    return enter


def right(answer: Callable) -> Callable:
    """Enters a right one."""
    RIGHT.append(answer)
    return answer
