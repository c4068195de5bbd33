"""What week 11 measures: how well the right section is found, and how well questions are answered."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import roc_auc_score

from library import HERE, Library, Place, home, make_reader, own_embedder, place
from names import CONDITIONS, MEASURES, RETRIEVERS
from own import OwnSearch, own_search
from shared.course.workspace import Workspace
from shared.models.names import model_label, named_run
from shared.retrieval.documents import Chunk
from shared.retrieval.index import Index
from shared.retrieval.rag import RAG, Reader, Reply
from shared.retrieval.ranking import Interval, bootstrap, holds_answer, rank_scores
from shared.runtime import RunLog, clock, read_jsonl, table

if TYPE_CHECKING:
    from run import Settings

NO_GAIN = -99.0
"""Where there is no answer, there is none that the passage could make likelier."""


def measure_library(settings: "Settings", work: Workspace, library: Library) -> dict[str, float]:
    """Finding, on all questions, and answering, on some."""
    metrics = measure_retrieval(settings, work, library)
    reader = make_reader(settings, work.device)
    metrics |= measure_answers(settings, work, library, reader)
    if library.name == "handbook":
        illustrate(settings, work, library, reader)
    return metrics


def with_bounds(scores: dict[str, Interval]) -> dict[str, float]:
    """Means and their intervals, flat."""
    flat = {}
    for name, interval in scores.items():
        flat[name] = interval.mean
        flat[f"{name}_low"] = interval.low
        flat[f"{name}_high"] = interval.high
    return flat


def with_intervals(scores: dict[str, Interval]) -> dict[str, str]:
    """The same for people."""
    return {name: f"{s.mean:.3f} ({s.low:.3f} to {s.high:.3f})" for name, s in scores.items()}


# ---- finding


def measure_retrieval(settings: "Settings", work: Workspace, library: Library) -> dict[str, float]:
    """Every retriever on every question: the right section is the one that the question was written from.

    With --mine, the learner's code searches by words and fuses.
    """
    own = Index(own_embedder(settings, work.device))
    own.add(library.chunks)
    searched = own_search(work, library.index, library.chunks)
    relevant = [{home(question)} for question in library.asked]
    rows, metrics = [], {}
    for name, label in RETRIEVERS.items():
        index, by = searched, name
        if name == "own":
            index, by = own, "dense"
        with work.log(f"{library.name}-find-{name}", settings) as log:
            started = clock()
            rankings = [ranking(index, question, by) for question in library.asked]
            milliseconds = 1000 * (clock() - started) / len(library.asked)
            scores = rank_scores(rankings, relevant)
            found_in_5 = [home(q) in places[:5] for q, places in zip(library.asked, rankings)]
            log.artifact(missed=[q["question"] for q, there in zip(library.asked, found_in_5) if not there])
            facts = {"name": label, "questions": len(library.asked), "milliseconds": milliseconds}
            log.finish(**facts, **with_bounds(scores))
        rows.append({"retriever": label} | with_intervals(scores))
        metrics |= {f"{name}_{key.replace('@', '_at_')}": score.mean for key, score in scores.items()}
    print(f"\n{len(library.asked)} questions, with 95 % intervals\n" + table(rows))
    headline = "dense_recall_at_5"
    return {headline: metrics[headline]} | metrics


def ranking(index: Index | OwnSearch, question: dict[str, Any], by: str = "dense") -> list[Place]:
    """The places that are found, each once, at most ten."""
    hits = index.search(question["question"], 30, by)
    return list(dict.fromkeys(place(hit.chunk, question) for hit in hits))[:10]


# ---- answering


def measure_answers(
    settings: "Settings", work: Workspace, library: Library, reader: Reader, prefix: str = ""
) -> dict[str, float]:
    """Answers without, with the found, with the right passage; abstention; and whether the answer follows
    when the passage changes.

    prefix: what the runs' names in the logs begin with, after the library's.
    """
    asked = spread(library.asked, settings.questions)
    unanswerable = spread(library.unanswerable, settings.questions)
    rag = RAG(library.index, reader, settings.k, settings.by, least_score=settings.min_score or 0.0)
    runs = named_run(settings.model, f"{library.name}-{prefix}")
    rows, metrics = [], {}
    for name, label in CONDITIONS.items():
        with work.log(f"{runs}answer-{name}", settings) as log:
            started = clock()
            replies = [read_under(name, question, rag, library).text for question in asked]
            seconds = (clock() - started) / len(asked)
            scores = grade_answers(log, label, asked, replies, seconds=seconds)
        rows.append({model_label(settings.model): label} | with_intervals(scores))
        metrics |= {f"{name}_{key}": score.mean for key, score in scores.items()}
    print(f"\n{len(asked)} questions answered\n" + table(rows))
    if unanswerable:
        with work.log(f"{runs}abstain", settings) as log:
            metrics |= log.finish(**measure_abstention(rag, asked, unanswerable, log))
        print_abstention(metrics, len(unanswerable))
    if library.name == "handbook":
        swaps = spread(read_jsonl(HERE / "swaps.jsonl"), settings.questions)
        with work.log(f"{runs}swaps", settings) as log:
            metrics |= log.finish(**measure_swaps(reader, library.chunks, swaps))
        print(
            f"\nof {metrics['swaps_read']} answers read from the passage, {metrics['swaps_followed']:.0%}"
            " follow when it changes"
        )
    return metrics


def spread(rows: Sequence[dict], count: int | None) -> list[dict]:
    """`count` of the rows, evenly; None: all."""
    wanted = min(count or len(rows), len(rows))
    return [rows[i] for i in np.linspace(0, len(rows) - 1, wanted).round().astype(int)]


def read_under(condition: str, question: dict[str, Any], rag: RAG, library: Library) -> Reply:
    """The answer under one of `CONDITIONS`."""
    if condition == "without":
        return rag.reader.read(question["question"])
    if condition == "retrieved":
        return rag.ask(question["question"])
    return rag.reader.read(question["question"], [library.right(question)])


def grade_answers(
    log: RunLog, label: str, asked: Sequence[dict], replies: Sequence[str], **more: float
) -> dict[str, Interval]:
    """The answers' scores, written into their log with the answers. more: further metrics for the log."""
    scores = {}
    for name, measure in MEASURES.items():
        scores[name] = bootstrap([measure(a, q["answers"]) for a, q in zip(replies, asked)])
    answers = [
        {"question": question["question"], "answer": reply, "right": question["answers"][0]}
        for question, reply in zip(asked, replies)
    ]
    log.artifact(answers=answers)
    log.finish(name=label, questions=len(asked), **with_bounds(scores), **more)
    return scores


# ---- abstention


def measure_abstention(
    rag: RAG, asked: Sequence[dict], unanswerable: Sequence[dict], log: RunLog
) -> dict[str, float]:
    """Two signals that tell questions with an answer from those without: AUC (0.5 is chance), and what a
    threshold withholds and loses.
    """
    good, bad = signals(rag, asked), signals(rag, unanswerable)
    log.artifact(**{name: {"answerable": good[name], "unanswerable": bad[name]} for name in good})
    metrics: dict[str, float] = {"answerable": len(asked), "unanswerable": len(unanswerable)}
    for name in good:
        separation = measure_separation(np.array(good[name]), np.array(bad[name]))
        metrics |= {f"{name}_{key}": value for key, value in separation.items()}
    return metrics


def signals(rag: RAG, questions: Sequence[dict]) -> dict[str, list[float]]:
    """For each question the best passage's score, and how much likelier the passages make the answer."""
    scores, gains = [], []
    for question in questions:
        hits = rag.index.search(question["question"], rag.k, rag.by)
        scores.append(hits[0].score)
        prompt, ids = rag.reader.draft(question["question"], [hit.chunk for hit in hits])
        gains.append(rag.reader.gain(question["question"], prompt, ids) if ids else NO_GAIN)
    return {"score": scores, "gain": gains}


def measure_separation(good: np.ndarray, bad: np.ndarray) -> dict[str, float]:
    """How well a signal tells questions with an answer from those without: its values for both.

    The threshold is the best for one half of the questions and measured on the other, both ways.
    """
    labels = [1] * len(good) + [0] * len(bad)
    thresholds = []
    withheld = []
    lost = []
    for half in (0, 1):
        threshold = best_threshold(good[half::2], bad[half::2])
        thresholds.append(threshold)
        withheld.append(bad[1 - half :: 2] < threshold)
        lost.append(good[1 - half :: 2] < threshold)
    return {
        "auc": float(roc_auc_score(labels, [*good, *bad])),
        "threshold": float(np.mean(thresholds)),
        "withheld": float(np.mean(np.concatenate(withheld))),
        "lost": float(np.mean(np.concatenate(lost))),
    }


def best_threshold(good: np.ndarray, bad: np.ndarray) -> float:
    """The value of `good` that lets most of `good` through and withholds most of `bad`."""
    return max(good, key=lambda value: (good >= value).mean() + (bad < value).mean())


def print_abstention(metrics: dict[str, float], unanswerable: int) -> None:
    """What `measure_abstention` found, for people."""
    print(
        f"\nfor {unanswerable} more there is no answer. AUC of the passage's score"
        f" {metrics['score_auc']:.2f}, of the answer's gain {metrics['gain_auc']:.2f}; with a least gain"
        f" of about {metrics['gain_threshold']:.2f}, {metrics['gain_withheld']:.0%} of these are"
        f" withheld, and {metrics['gain_lost']:.0%} of the others"
    )


# ---- changed passages


def measure_swaps(reader: Reader, chunks: Sequence[Chunk], swaps: Sequence[dict]) -> dict[str, float]:
    """Where the answer is read from the passage: how often it is the new one when only that changes in the
    passage.
    """
    read, followed = 0, 0
    for swap in swaps:
        chunk = next((c for c in chunks if c.source == swap["document"] and swap["old"] in c.text), None)
        if chunk is None:
            continue
        reply = reader.read(swap["question"], [chunk]).text
        if not holds_answer(reply, [swap["old_answer"]]):
            continue
        read += 1
        changed = replace(chunk, text=chunk.text.replace(swap["old"], swap["new"]))
        reply = reader.read(swap["question"], [changed]).text
        followed += holds_answer(reply, [swap["new_answer"]])
    return {"swaps": len(swaps), "swaps_read": read, "swaps_followed": followed / max(1, read)}


# ---- one question in detail


def sentence_scores(index: Index, question: str, chunk: Chunk) -> list[tuple[str, float]]:
    """A chunk's windows as they are embedded, each with its nearness to the question."""
    texts = chunk.window_texts()
    nearness = index.embedder.embed(texts) @ index.embedder.embed([question])[0]
    return list(zip(texts, nearness.tolist()))


def example(index: Index, question: str, reply: Reply) -> dict[str, Any]:
    """One question on its way: what is found, which sentence of the best is near, what is answered."""
    hits = index.search(question, 5)
    best = hits[0].chunk
    scores = [score for _, score in sentence_scores(index, question, best)]
    sentences = [[best.text[start:end], score] for (start, end), score in zip(best.windows, scores)]
    return {
        "question": question,
        "answer": reply.text,
        "sources": reply.sources,
        "hits": [[hit.chunk.cite, hit.score] for hit in hits],
        "sentences": sentences,
    }


def illustrate(settings: "Settings", work: Workspace, library: Library, reader: Reader) -> None:
    """Keeps the example of `--illustrated`."""
    best = library.index.search(settings.illustrated, 1)[0]
    with work.log(named_run(settings.model, f"{library.name}-example"), settings) as log:
        reply = reader.read(settings.illustrated, [best.chunk])
        log.artifact(**example(library.index, settings.illustrated, reply))
        log.finish(score=best.score)
