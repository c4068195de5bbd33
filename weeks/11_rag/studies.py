"""Week 11's studies: every question, what to embed, the learner's own model, and what an index costs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load, save

from depths import study_depths
from domain import study_domain
from learned_reading import study_own
from library import Library, home, kept_folder, make_reader, open_library
from measures import measure_answers, ranking, with_bounds, with_intervals
from names import EFFORTS, WINDOWS
from reading import study_quotes
from shared.assets import SUM_BYTES, is_whole, write_with_sum
from shared.course.workspace import Workspace
from shared.data.corpus import read_text
from shared.retrieval.documents import Chunk
from shared.retrieval.embedders import MiniLM
from shared.retrieval.index import Index
from shared.retrieval.ranking import bootstrap, rank_scores, recall_at
from shared.retrieval.splitting import split
from shared.retrieval.stores import VectorStore, make_store
from shared.runtime import clock, table
from shared.tokenizers import gpt2_tokenizer
from shared.tokenizers.base import Tokenizer
from talking import study_followups

if TYPE_CHECKING:
    from run import Settings

ASKING_VECTORS = 200
"""So many of the lines ask for the others."""


def study_answers(settings: "Settings", work: Workspace) -> dict[str, float]:
    """Every question is answered."""
    library = open_library(settings, work.device)
    every = settings if settings.preset == "smoke" else replace(settings, questions=None)
    reader = make_reader(settings, work.device)
    return measure_answers(every, work, library, reader, "all-")


# ---- what to embed


def study_windows(settings: "Settings", work: Workspace) -> dict[str, float]:
    """What is embedded by itself. The choice is made on the questions on one half of the documents and
    measured on those on the other, both ways: a figure on the questions that the choice was made by would
    flatter.
    """
    library = open_library(settings, work.device)
    tokenizer = gpt2_tokenizer()
    recalls = {name: recalls_with_windows(name, tokenizer, settings, work, library) for name in WINDOWS}
    sources = sorted({chunk.source for chunk in library.chunks})
    halves: tuple[list[int], list[int]] = [], []
    for i, question in enumerate(library.asked):
        halves[sources.index(question["document"]) % 2].append(i)

    def mean_recalls(name: str, half: Sequence[int]) -> list[float]:
        return np.mean([recalls[name][i] for i in half], axis=0).tolist()

    chosen = [max(WINDOWS, key=lambda name: mean_recalls(name, half)) for half in halves]  # by recall@5 first
    fair = [recalls[name][i] for name, half in zip(chosen, reversed(halves)) for i in half]
    scores = {
        "recall@5": bootstrap([at_5 for at_5, _ in fair]),
        "recall@1": bootstrap([at_1 for _, at_1 in fair]),
    }
    with work.log(f"{library.name}-windows", settings) as log:
        log.artifact(chosen=chosen)
        metrics = log.finish(questions=len(fair), **with_bounds(scores))
    print(
        f"\nchosen on one half: {chosen[0]}, on the other: {chosen[1]}; each measured on the half it was not"
        f" chosen on: {with_intervals(scores)}"
    )
    return {name.replace("@", "_at_"): value for name, value in metrics.items()}


def recalls_with_windows(
    name: str, tokenizer: Tokenizer, settings: "Settings", work: Workspace, library: Library
) -> list[tuple[float, float]]:
    """Recall at 5 and at 1 for each question, with one of `WINDOWS`."""
    relevant = [{home(question)} for question in library.asked]
    with work.log(f"{library.name}-windows-{name.replace(' ', '-')}", settings) as log:
        index = Index(library.index.embedder)
        index.add(
            replace(chunk, windows=cut_windows(chunk, WINDOWS[name], tokenizer)) for chunk in library.chunks
        )
        rankings = [ranking(index, question) for question in library.asked]
        scores = rank_scores(rankings, relevant)
        log.finish(name=name, windows=len(index.store), **with_bounds(scores))
    shown = ", ".join(f"{key} {value}" for key, value in with_intervals(scores).items())
    print(f"{name}: {len(index.store)} windows, {shown}")
    return [(recall_at(r, right, 5), recall_at(r, right, 1)) for r, right in zip(rankings, relevant)]


def cut_windows(
    chunk: Chunk, how: tuple[int, int] | int | None, tokenizer: Tokenizer
) -> tuple[tuple[int, int], ...]:
    """A chunk's windows in one of `WINDOWS`' ways; its own ones are its sentences."""
    if how is None:
        return ()
    if isinstance(how, tuple):
        return tuple(split(chunk.text, tokenizer, *how))
    last = len(chunk.windows) - 1
    spans = [
        (chunk.windows[i][0], chunk.windows[min(i + how - 1, last)][1]) for i in range(max(1, last + 2 - how))
    ]
    return tuple(dict.fromkeys(spans))


# ---- the index


def study_index(settings: "Settings", work: Workspace) -> dict[str, float]:
    """Stores side by side on real embeddings: recall@10 with Flat as the truth, milliseconds for a question,
    bytes for a vector.
    """
    vectors = line_vectors(settings, work.device)
    asking, kept = vectors[:ASKING_VECTORS], vectors[ASKING_VECTORS:]
    rows: list[dict[str, Any]] = []
    truth: list[list[int]] = []
    for kind, efforts in EFFORTS.items():
        store = make_store(kind, vectors.shape[1])
        started = clock()
        store.add(range(len(kept)), kept)
        building, size = clock() - started, store.num_bytes() / len(kept)
        for effort in efforts:
            store.effort = effort or 0
            found, times = search_one_by_one(store, asking)
            truth = truth or found  # Flat comes first, and finds the nearest ones
            recalls = [recall_at([i for i in f if i >= 0], t, 10) for f, t in zip(found, truth)]
            name = f"{kind}-{effort}" if effort else kind
            with work.log(f"index-{name}", settings) as log:
                row = log.finish(
                    name=name,
                    vectors=len(kept),
                    recall=np.mean(recalls).item(),
                    milliseconds=1000 * float(np.median(times)),
                    bytes=size,
                    build_seconds=building,
                )
            rows.append(row)
    shown = ("name", "recall", "milliseconds", "bytes", "build_seconds")
    print("\n" + table([{key: row[key] for key in shown} for row in rows]))
    return {f"{row['name']}_recall": row["recall"] for row in rows}


def search_one_by_one(store: VectorStore, asking: np.ndarray) -> tuple[list[list[int]], list[float]]:
    """The ten nearest to each vector, and the seconds that each search took."""
    found, times = [], []
    for vector in asking:
        started = clock()
        found.append(store.search(vector[None], 10)[1][0].tolist())
        times.append(clock() - started)
    return found, times


def line_vectors(settings: "Settings", device: torch.device) -> np.ndarray:
    """MiniLM's vectors of the lines of Shakespeare's plays, as many as are wanted, kept for the next time:
    float32 [n, 384].
    """
    path = kept_folder(settings) / f"lines-{settings.vectors}.safetensors"
    if is_whole(path):
        return load(path.read_bytes()[SUM_BYTES:])["lines"].numpy()
    if path.exists():
        print(f"{path} is cut or damaged, or of an earlier version: it is made again")
    wanted = play_lines()[: settings.vectors + ASKING_VECTORS]
    if len(wanted) < settings.vectors + ASKING_VECTORS:
        raise ValueError(
            f"vectors={settings.vectors}: the plays give {len(wanted)} different texts, {ASKING_VECTORS} of"
            " which ask: choose fewer"
        )
    print(f"embedding {len(wanted):,} texts once, which takes minutes on a CPU")
    vectors = np.random.default_rng(0).permutation(MiniLM(device, batch_size=256).embed(wanted))
    write_with_sum(path, save({"lines": torch.from_numpy(vectors)}))
    return vectors


def play_lines() -> list[str]:
    """All lines of 37 plays, each once, and then all pairs of neighbours."""
    text = read_text("shakespeare")[1]
    lines = list(dict.fromkeys(line for line in text.splitlines() if len(line.split()) > 3))
    pairs = [f"{line} {following}" for line, following in zip(lines, lines[1:])]
    return list(dict.fromkeys([*lines, *pairs]))


STUDIES: dict[str, Callable[["Settings", Workspace], dict[str, float]]] = {
    "answers": study_answers,
    "windows": study_windows,
    "index": study_index,
    "own": study_own,
    "depths": study_depths,
    "quotes": study_quotes,
    "domain": study_domain,
    "followups": study_followups,
}
