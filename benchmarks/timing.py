"""What the benchmarks measure time with."""

import statistics
from collections.abc import Callable

from shared.runtime import clock


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """How long `work` takes: the median of some runs."""
    times = []
    for _ in range(repeats):
        started = clock()
        work()
        times.append(clock() - started)
    return statistics.median(times)
