"""Week 0. For week 12: requests in the slots of an engine, step by step, and beside it batch after batch."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from shared.course.explorers.bigram import IdsToText
from shared.course.explorers.page import Explorer
from shared.course.explorers.pictures import as_image
from shared.course.report import figure
from shared.course.style import style
from shared.extras import needs
from shared.runtime import clock

with needs("course"):
    from matplotlib.figure import Figure

MOST = 26
"""Requests: each has a letter."""


class SteppedEngine(Protocol):
    """What the explorer asks of an engine: `shared.serving.engine.Engine` with start=False has it."""

    def submit(self, request: Any, listen: Callable[[Any], None], /) -> Any:
        """Lets a request wait in line; `listen` is called with each token, and with None at the end."""

    def step(self) -> bool:
        """One pass. Returns whether there was anything to do."""

    def close(self) -> None:
        """Gives up what is not done."""


def slots_explorer(
    engine_with: Callable[..., SteppedEngine],
    requests: Sequence[Any],
    arrivals: Sequence[int],
    tokenizer: IdsToText,
    *,
    slots: Sequence[int] = (2, 4, 8),
    runs: int = 5,
    seconds: Callable[[], float] = clock,
    title: str = "Who has which slot",
) -> Explorer:
    """The slots of an engine, step by step, for requests that come one after another: written with continuous
    batching, and with the next batch only when all of the last one are done.

    engine_with: `engine_with(slots=4)` is a new engine of which nobody else calls `step`. Both ways are
    recorded from it, for each number in `slots`. arrivals: before which step each request comes, from 0, in
    order. A step's time is the shortest of `runs` runs, by `seconds`. Raises ValueError for arrivals that do
    not fit, more than `MOST` requests, a request that ends without a token, and texts that differ from run to
    run (temperatures without a seed).
    """
    arrivals = [int(arrival) for arrival in arrivals]
    if not 1 <= len(requests) <= MOST or len(arrivals) != len(requests):
        raise ValueError(
            f"{len(requests)} requests and {len(arrivals)} arrivals: give from 1 to {MOST} requests, and for"
            " each the step before which it comes"
        )
    if arrivals != sorted(arrivals) or arrivals[0] < 0:
        raise ValueError(f"arrivals={arrivals}: they are counted from 0, and come in order")
    if not slots or min(slots) < 1 or runs < 1:
        raise ValueError(
            f"slots={list(slots)}, runs={runs}: at least one number of slots and one run, from 1 up"
        )
    timelines, words = [], None
    for count in slots:
        for whole in (False, True):
            recorded = [
                _recorded(engine_with(slots=count), requests, arrivals, count if whole else None, seconds)
                for _ in range(runs)
            ]
            timelines.append({"slots": count, "whole": whole, **_in_one(recorded)})
            words = words or recorded[0][0]
            if any(texts != words for texts, _, _ in recorded):
                raise ValueError(
                    "a request's text was another one in another run: give each temperature 0, or a seed"
                )
    data = {
        "requests": [
            {"arrival": arrival, "prompt": len(request.prompt), "text": [tokenizer.decode([i]) for i in ids]}
            for request, arrival, ids in zip(requests, arrivals, words or (), strict=True)
        ],
        "timelines": timelines,
        "first": list(slots).index(sorted(slots)[len(slots) // 2]),
    }
    return Explorer(title, ("slots.js",), data, _stand_in(data))


def _recorded(
    engine: SteppedEngine,
    requests: Sequence[Any],
    arrivals: Sequence[int],
    together: int | None,
    seconds: Callable[[], float],
) -> tuple[list[list[int]], list["_Course"], list[float]]:
    """One run: each request's ids, its course through the engine, and the time of each step.

    together: how many are submitted at a time, when all those before are done; None: each as it comes.
    """
    texts: list[list[int]] = [[] for _ in requests]
    courses = [_Course() for _ in requests]
    submitted: list[Any] = []
    times: list[float] = []
    while len(submitted) < len(requests) or _unfinished(submitted):
        arrived = sum(arrival <= len(times) for arrival in arrivals)
        if together is not None:
            arrived = len(submitted) if _unfinished(submitted) else min(arrived, len(submitted) + together)
        for i in range(len(submitted), arrived):
            submitted.append(engine.submit(requests[i], _keeping(texts[i])))
        began = seconds()
        worked = engine.step()
        times.append(seconds() - began)
        if not worked and _unfinished(submitted):
            raise ValueError(
                "the engine has requests and does nothing: give one that nobody else steps or stops"
            )
        for course, generation in zip(courses, submitted):
            course.note(len(times) - 1, generation)
    engine.close()
    for i, generation in enumerate(submitted):
        if generation.finish_reason not in ("stop", "length") or not courses[i].draws:
            raise ValueError(
                f"request {i} ended with {generation.finish_reason!r} after {generation.drawn} tokens: the"
                " explorer shows requests of at least one token that are written to their end"
            )
    return texts, courses, times


def _unfinished(generations: Sequence[Any]) -> bool:
    return any(generation.finish_reason is None for generation in generations)


def _keeping(ids: list[int]) -> Callable[[Any], None]:
    """A listener that appends each token's id."""

    def listen(token: Any) -> None:
        if token is not None:
            ids.append(token.id)

    return listen


class _Course:
    """A request's way through the engine: in which slot, and what was done for it in which step."""

    def __init__(self) -> None:
        self.slot: int | None = None
        self.begin = 0
        self.reads: list[tuple[int, int]] = []
        """Steps, each with how many tokens of the prompt were read."""
        self.draws: list[tuple[int, int]] = []
        """Steps, each with how many tokens were written."""

    def note(self, step: int, generation: Any) -> None:
        """Takes down what this step has changed."""
        if self.slot is None and generation.slot is not None:
            self.slot, self.begin = generation.slot, step
        for done, noted in ((generation.read, self.reads), (generation.drawn, self.draws)):
            new = done - sum(count for _, count in noted)
            if new:
                noted.append((step, new))


def _in_one(recorded: Sequence[tuple[list[list[int]], list[_Course], list[float]]]) -> dict[str, Any]:
    """The runs as the page reads them: what all have in common, and the shortest time of each step."""
    courses = [[vars(course) for course in run] for _, run, _ in recorded]
    if any(run != courses[0] for run in courses):
        raise ValueError(
            "the engine went another way in another run: give requests without a time limit, each with"
            " temperature 0 or a seed"
        )
    times = zip(*(times for _, _, times in recorded), strict=True)
    return {
        "courses": courses[0],
        "milliseconds": [float(f"{1000 * min(of_a_step):.4g}") for of_a_step in times],
    }


def _stand_in(data: dict[str, Any]) -> str:
    pair = data["timelines"][2 * data["first"] : 2 * data["first"] + 2]
    steps, whole_steps = (len(timeline["milliseconds"]) for timeline in pair)
    return as_image(
        _picture(pair),
        f"Who has which of {pair[0]['slots']} slots in each step: orange where a prompt is read, blue where"
        f" the text is written, grey where it waits. With continuous batching all is done after {steps}"
        f" steps, with whole batches after {whole_steps}.",
    )


def _picture(pair: Sequence[dict[str, Any]]) -> Figure:
    """Two timelines, one above the other."""
    with style():
        fig, axes = figure(8, 5, nrows=2)
        for ax, timeline in zip(axes, pair):
            for number, course in enumerate(timeline["courses"]):
                row = timeline["slots"] - course["slot"] - 1
                span = (course["begin"], course["draws"][-1][0] + 1 - course["begin"])
                ax.broken_barh([span], (row - 0.4, 0.8), color="#d0d7de")
                for steps, colour in ((course["draws"], "#0072b2"), (course["reads"], "#e69f00")):
                    ax.broken_barh([(step, 1) for step, _ in steps], (row - 0.4, 0.8), color=colour)
                around = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "pad": 0.15}
                middle = (span[0] + span[1] / 2, row)
                ax.annotate(chr(65 + number), middle, ha="center", va="center", fontsize=9, bbox=around)
            ax.set_yticks(range(timeline["slots"]), [f"slot {i}" for i in range(timeline["slots"], 0, -1)])
            longest = max(len(one["milliseconds"]) for one in pair)
            name = "Whole batches" if timeline["whole"] else "Continuous batching"
            ax.set(title=name, xlabel="step", xlim=(0, longest))
            ax.grid(False)
        return fig
