"""Week 11's study of answers that quote: ranked sentences, and spans of them, beside generated answers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halves import HALVES, answer_scores, half_of, paired_difference
from library import Library, home, make_quoter, open_library, place
from measures import with_bounds, with_intervals
from names import QUOTED, quoted_label
from shared.course.report import read_runs
from shared.course.workspace import Workspace
from shared.models.names import named_run
from shared.retrieval.evidence import Window
from shared.retrieval.quoting import Quoter
from shared.retrieval.ranking import bootstrap, exact_match, holds_answer, reciprocal_rank
from shared.runtime import RunLog, table

if TYPE_CHECKING:
    from run import Settings


@dataclass(frozen=True)
class Half:
    """The questions of one half, and what was read for each."""

    name: str
    asked: Sequence[dict[str, Any]]
    readings: Sequence[dict[str, Any]]
    settings: "Settings"
    work: Workspace
    library_name: str

    def log(self, run: str) -> AbstractContextManager[RunLog]:
        name = named_run(self.settings.model, f"{self.library_name}-{run}")
        return self.work.log(name, self.settings)


def study_quotes(settings: "Settings", work: Workspace) -> dict[str, float]:
    """What re-ranking and quoting bring. The weight of the re-ranking was chosen on half A; both halves are
    measured, and B is the one to believe.
    """
    library = open_library(settings, work.device)
    quoter = make_quoter(settings, work.device)
    asked = library.asked[:2] if settings.preset == "smoke" else library.asked
    readings = [read_question(library, quoter, question) for question in asked]
    with work.log(named_run(settings.model, f"{library.name}-quotes"), settings) as log:
        log.artifact(readings=readings)
        log.finish(questions=len(readings), sentences=quoter.sentences)
    metrics: dict[str, float] = {}
    for name in HALVES:
        chosen = [i for i, question in enumerate(asked) if half_of(library, question) == name]
        if chosen:
            these = [asked[i] for i in chosen], [readings[i] for i in chosen]
            half = Half(name, *these, settings, work, library.name)
            metrics |= measure_quotes(half)
            metrics |= measure_reranking(half)
    return metrics


def read_question(library: Library, quoter: Quoter, question: dict[str, Any]) -> dict[str, Any]:
    """What is found, how it is ranked anew, and what is quoted from the first sentence of each ranking."""
    windows = library.index.nearest_windows(question["question"], quoter.sentences)
    reads = quoter.ranked(question["question"], windows)
    best = quoter.quote_from(reads[0])
    quoted = "" if best is None else best.text
    plain = quoted
    if reads[0].window is not windows[0]:
        first = quoter.quote_from(next(read for read in reads if read.window is windows[0]))
        plain = "" if first is None else first.text
    return {
        "question": question["question"],
        "right": question["answers"][0],
        "nearest": [as_found(window, question) for window in windows],
        "likelihoods": [next(r.likelihood for r in reads if r.window is w) for w in windows],
        "order": [next(i for i, w in enumerate(windows) if w is read.window) for read in reads],
        "quoted": quoted,
        "quoted_from_nearest": plain,
    }


def as_found(window: Window, question: dict[str, Any]) -> dict[str, Any]:
    """A sentence for the log."""
    return {
        "cite": window.chunk.cite,
        "place": list(place(window.chunk, question)),
        "text": " ".join(window.text.split()),
        "score": window.score,
    }


def answers_of(reading: dict[str, Any]) -> dict[str, str]:
    """One question's answers, by the keys of `QUOTED`."""
    nearest, order = reading["nearest"], reading["order"]
    return {
        "sentence": nearest[0]["text"],
        "reranked": nearest[order[0]]["text"],
        "span": reading["quoted_from_nearest"],
        "reranked-span": reading["quoted"],
    }


def measure_quotes(half: Half) -> dict[str, float]:
    """The quoted answers on one half, and those that `--study answers` logged where that has been run."""
    keys = [key for key in QUOTED if key != "generated"]
    answers = {key: [answers_of(reading)[key] for reading in half.readings] for key in keys}
    written = named_run(half.settings.model, f"{half.library_name}-all-answer-retrieved")
    generated = read_runs(half.work.logs).get(written)
    if generated:
        said = {row["question"]: row["answer"] for row in generated.artifacts["answers"]}
        if all(question["question"] in said for question in half.asked):
            answers = {"generated": [said[question["question"]] for question in half.asked]} | answers
    rows, metrics = [], {}
    for key, texts in answers.items():
        scores = answer_scores(texts, half.asked)
        with half.log(f"quotes-{half.name}-{key}") as log:
            log.finish(
                name=quoted_label(key, half.settings.model),
                half=half.name,
                questions=len(half.asked),
                **with_bounds(scores),
            )
        rows.append({f"half {half.name}": quoted_label(key, half.settings.model)} | with_intervals(scores))
        metrics |= {f"{half.name}_{key}_{score}": value.mean for score, value in scores.items()}
    print(f"\n{len(half.asked)} questions of half {half.name}\n" + table(rows))
    measure_gains(half, answers)
    return metrics


def measure_gains(half: Half, answers: dict[str, list[str]]) -> None:
    """What one way of answering has over another, on the same questions."""
    model = half.settings.model
    for ours, theirs, measure in (
        ("reranked", "sentence", holds_answer),
        ("reranked-span", "span", holds_answer),
        ("reranked-span", "generated", holds_answer),
        ("reranked-span", "generated", exact_match),
        ("reranked", "generated", holds_answer),
    ):
        if theirs not in answers:
            continue
        pairs = [
            [measure(a, q["answers"]) for a, q in zip(answers[key], half.asked)] for key in (ours, theirs)
        ]
        gain = paired_difference(*pairs)
        what = "exact" if measure is exact_match else "holds"
        with half.log(f"gain-{half.name}-{ours}-{theirs}-{what}") as log:
            log.finish(half=half.name, **with_bounds({"gain": gain}))
        shown = f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
        print(f"{half.name}: {quoted_label(ours, model)} less {quoted_label(theirs, model)}, {what}: {shown}")


# ---- re-ranking


def places_of(reading: dict[str, Any], order: Sequence[int]) -> list[tuple]:
    """The places of the sentences in an order, each once."""
    return list(dict.fromkeys(tuple(reading["nearest"][i]["place"]) for i in order))


def measure_reranking(half: Half) -> dict[str, float]:
    """The passages of the first sentences, in MiniLM's order and ranked anew."""
    first: dict[str, list[float]] = {}
    reciprocal: dict[str, list[float]] = {}
    metrics: dict[str, float] = {}
    for key in ("without", "with"):
        orders = [r["order"] if key == "with" else range(len(r["order"])) for r in half.readings]
        rankings = [places_of(reading, order) for reading, order in zip(half.readings, orders)]
        first[key] = [float(ranking[0] == home(q)) for ranking, q in zip(rankings, half.asked)]
        reciprocal[key] = [reciprocal_rank(ranking, {home(q)}) for ranking, q in zip(rankings, half.asked)]
        scores = {"recall@1": bootstrap(first[key]), "mrr": bootstrap(reciprocal[key])}
        with half.log(f"rerank-{half.name}-{key}") as log:
            log.finish(
                name=f"{key} re-ranking", half=half.name, questions=len(half.asked), **with_bounds(scores)
            )
        metrics[f"{half.name}_{key}_reranking_recall_at_1"] = scores["recall@1"].mean
        print(f"{half.name}, {key} re-ranking: {with_intervals(scores)}")
    gains = {
        "recall@1": paired_difference(first["with"], first["without"]),
        "mrr": paired_difference(reciprocal["with"], reciprocal["without"]),
    }
    with half.log(f"rerank-{half.name}-gain") as log:
        log.finish(half=half.name, **with_bounds(gains))
    print(f"{half.name}, gain: {with_intervals(gains)}")
    return metrics
