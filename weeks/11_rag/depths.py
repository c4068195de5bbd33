"""Week 11's study of k: how many passages, or sentences, are looked at, and what that does to the answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from halves import paired_difference
from library import Library, home, make_quoter, make_reader, open_library, place
from measures import spread, with_bounds, with_intervals
from names import DEPTHS
from shared.course.workspace import Workspace
from shared.models.names import named_run
from shared.retrieval.index import Index
from shared.retrieval.quoting import Quoter
from shared.retrieval.rag import RAG, Reader
from shared.retrieval.ranking import bootstrap, exact_match, holds_answer
from shared.runtime import table

if TYPE_CHECKING:
    from run import Settings


def study_depths(settings: "Settings", work: Workspace) -> dict[str, float]:
    """At each depth: what is found, on all questions, and what is answered, on `questions` of them: quoted
    from the best of so many sentences, and written from so many passages. Each depth is compared with one
    passage on the same questions. Nothing is chosen.
    """
    library = open_library(settings, work.device)
    asked = library.asked[:2] if settings.preset == "smoke" else library.asked
    quoter = make_quoter(settings, work.device, max(DEPTHS))
    reader = make_reader(settings, work.device)
    answered = spread(asked, settings.questions)
    rows = [found_at(library.index, question) for question in tqdm(asked, desc="found")]
    metrics = write_depths("found", rows, library, settings, work)
    rows = [quoted_at(library.index, quoter, question) for question in tqdm(answered, desc="quoted")]
    metrics |= write_depths("quoted", rows, library, settings, work)
    rows = [written_at(library, reader, settings.by, question) for question in tqdm(answered, desc="written")]
    return metrics | write_depths("written", rows, library, settings, work)


def found_at(index: Index, question: dict[str, Any]) -> dict[int, dict[str, float]]:
    """For each depth: whether the right passage is among so many, whether a right answer stands in so many
    sentences, and how many words so many passages have.
    """
    hits = index.search(question["question"], max(DEPTHS))
    windows = index.nearest_windows(question["question"], max(DEPTHS))
    return {
        k: {
            "passage": float(any(place(hit.chunk, question) == home(question) for hit in hits[:k])),
            "sentence": float(any(holds_answer(w.text, question["answers"]) for w in windows[:k])),
            "words": float(sum(len(hit.chunk.text.split()) for hit in hits[:k])),
        }
        for k in DEPTHS
    }


def quoted_at(index: Index, quoter: Quoter, question: dict[str, Any]) -> dict[int, dict[str, float]]:
    """For each depth: the score of what is quoted from the best of so many of the nearest sentences."""
    windows = index.nearest_windows(question["question"], max(DEPTHS))
    reads = quoter.ranked(question["question"], windows)
    quotes: dict[int, str] = {}
    scores = {}
    for k in DEPTHS:
        best = next(read for read in reads if any(read.window is window for window in windows[:k]))
        if id(best) not in quotes:
            quote = quoter.quote_from(best)
            quotes[id(best)] = "" if quote is None else quote.text
        scores[k] = answer_measures(quotes[id(best)], question)
    return scores


def written_at(
    library: Library, reader: Reader, by: str, question: dict[str, Any]
) -> dict[int, dict[str, float]]:
    """For each depth: the score of what the model writes from so many passages."""
    return {
        k: answer_measures(RAG(library.index, reader, k, by).ask(question["question"]).text, question)
        for k in DEPTHS
    }


def answer_measures(answer: str, question: dict[str, Any]) -> dict[str, float]:
    """Whether it is the right answer, and whether that stands in it."""
    right = question["answers"]
    return {"exact": exact_match(answer, right), "holds": holds_answer(answer, right)}


def write_depths(
    what: str,
    rows: Sequence[dict[int, dict[str, float]]],
    library: Library,
    settings: "Settings",
    work: Workspace,
) -> dict[str, float]:
    """A log for each depth, and a table: means with intervals, and the gain over the first depth."""
    shown, metrics = [], {}
    for k in DEPTHS:
        scores = {}
        for name in rows[0][k]:
            values = [row[k][name] for row in rows]
            scores[name] = bootstrap(values)
            scores[f"{name}_gain"] = paired_difference(values, [row[DEPTHS[0]][name] for row in rows])
        run = f"{library.name}-k-{what}-{k}"
        if what != "found":  # what is found depends on no model
            run = named_run(settings.model, run)
        with work.log(run, settings) as log:
            log.finish(k=k, questions=len(rows), **with_bounds(scores))
        shown.append({what: f"k = {k}"} | with_intervals(scores))
        metrics |= {f"{what}_{k}_{name}": score.mean for name, score in scores.items()}
    print(f"\n{len(rows)} questions\n" + table(shown))
    return metrics
