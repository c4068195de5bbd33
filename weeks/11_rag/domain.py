"""Week 11's study of questions about the world: which are refused, and which of the handbook's with them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import roc_auc_score

from halves import HALVES, half_of
from library import HERE, open_library
from measures import best_threshold, with_bounds
from names import SIGNS
from shared.course.workspace import Workspace
from shared.retrieval.index import Index
from shared.retrieval.ranking import bootstrap
from shared.runtime import read_jsonl, table

if TYPE_CHECKING:
    from run import Settings

NO_SCORE = -1.0
"""In place of the score, where a name is unknown: a cosine is never lower."""


def study_domain(settings: "Settings", work: Workspace) -> dict[str, float]:
    """A threshold that is chosen on half A and every second question about the world, and measured on the
    others. That unknown names are looked for was decided with all of the questions in sight.
    """
    library = open_library(settings, work.device)
    world = read_jsonl(HERE / "world_questions.jsonl")
    inside = {half: [q for q in library.asked if half_of(library, q) == half] for half in HALVES}
    outside = {"A": world[0::2], "B": world[1::2]}
    rows, metrics = [], {}
    for sign, label in SIGNS.items():
        good = {half: signals_of(library.index, inside[half], sign) for half in HALVES}
        bad = {half: signals_of(library.index, outside[half], sign) for half in HALVES}
        silent = signals_of(library.index, library.unanswerable, sign)
        threshold = 0.0 if sign == "names" else float(best_threshold(good["A"], bad["A"]))
        with work.log(f"{library.name}-domain-{sign}", settings) as log:
            log.artifact(inside=good["B"].tolist(), outside=bad["B"].tolist(), silent=silent.tolist())
            result = measure_refusals(good["B"], bad["B"], threshold)
            result["silent_answered"] = float((silent >= threshold).mean())
            log.finish(name=label, questions=len(good["B"]), outside=len(bad["B"]), **result)
        rows.append({"refused by": label} | {key: result[key] for key in SHOWN})
        metrics |= {f"{sign}_{key}": value for key, value in result.items()}
    print(f"\nchosen on half A, measured on B: {len(inside['B'])} and {len(outside['B'])} questions")
    print(table(rows))
    return metrics


SHOWN = ("threshold", "auc", "false_refusals", "false_answers", "silent_answered")
"""Of the measures, for the table."""


def signals_of(index: Index, questions: Sequence[dict[str, Any]], sign: str) -> np.ndarray:
    """A number for each question, which is high where the documents can answer it. sign: of `SIGNS`."""
    values = []
    for row in questions:
        question = row["question"]
        unknown = sign != "score" and bool(index.unknown_names(question))
        if unknown:
            values.append(NO_SCORE)
        else:
            values.append(1.0 if sign == "names" else index.search(question, 1)[0].score)
    return np.array(values)


def measure_refusals(inside: np.ndarray, outside: np.ndarray, threshold: float) -> dict[str, float]:
    """How often a question that the documents answer is refused, and one about the world is not."""
    labels = [1] * len(inside) + [0] * len(outside)
    shares = {
        "false_refusals": bootstrap((inside < threshold).astype(float)),
        "false_answers": bootstrap((outside >= threshold).astype(float)),
    }
    auc = float(roc_auc_score(labels, [*inside, *outside]))
    return {"threshold": threshold, "auc": auc, **with_bounds(shares)}
