"""Week 0. Work shared out to several processes, whose results come in order, as if one had done it.

>>> list(in_groups(["to be", "or", "not"], len, 6))
[['to be', 'or'], ['not']]
>>> list(in_processes(sorted, [[2, 1], [4, 3]], processes=1))
[1, 2, 3, 4]
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_groups(items: Iterable[Item], size_of: Callable[[Item], int], size: int) -> Iterator[list[Item]]:
    """The items in their order, in groups of a size of at least `size` together; the last may have less."""
    group: list[Item] = []
    so_far = 0
    for item in items:
        group.append(item)
        so_far += size_of(item)
        if so_far >= size:
            yield group
            group = []
            so_far = 0
    if group:
        yield group


def in_processes(
    job: Callable[[list[Item]], Iterable[Result]],
    groups: Iterable[list[Item]],
    processes: int,
    set_up: tuple[Callable[..., None], Any] | None = None,
) -> Generator[Result, None, None]:
    """All that `job` makes of the groups, in their order.

    Only so many groups are read ahead as keep the processes busy. The job must be a function of a module;
    what it raises is raised here. set_up: a function that each process calls once before its jobs, and what
    it is called with. processes: 1 does all the work in this one. Ctrl-C ends them, and so does the end of
    this process, also where it is killed. Raises ValueError where one of them dies.
    """
    if processes == 1:
        if set_up is not None:
            set_up[0](set_up[1])
        yield from chain.from_iterable(map(job, groups))
        return
    # Not forked, which may hang where there are threads.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin_process, (set_up,))
    waiting: deque[Future] = deque()
    try:
        for group in groups:
            waiting.append(pool.submit(job, group))
            if len(waiting) > 4 * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"one of {processes} processes has died, perhaps for want of memory: run again with fewer; in a"
            " script of your own, call this under `if __name__ == '__main__':`"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process(set_up: tuple[Callable[..., None], Any] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of them; the parent ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if set_up is not None:
        set_up[0](set_up[1])


def _end_with_parent() -> None:
    """Ends this process when its parent does, also where that is killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
