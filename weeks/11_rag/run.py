"""Week 11: retrieval. A folder of documents that no model has read about, found in four ways and answered from.

python weeks/11_rag/run.py --preset laptop                            # how well it finds, and how well it answers
python weeks/11_rag/run.py --ask "When does the last ferry leave?"
python weeks/11_rag/run.py --data path/to/folder --interactive    # your own documents, question after question
python weeks/11_rag/run.py --study index                              # recall against latency and bytes, 100,000 vectors
python weeks/11_rag/run.py --study answers                            # every question, not a sample
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from shared.commandline import cli
from shared.course import WeekSettings, Workspace, output_root
from shared.data import read_text
from shared.documents import Chunk, chunk_documents, load_documents
from shared.models.pretrained import load_smollm2
from shared.quantization import quantize
from shared.rag import RAG, Reader, Reply
from shared.ranking import bootstrap, exact_match, holds_answer, rank_scores, recall_at, token_f1
from shared.report import COLOURS, figure, load_script, read_runs, save_figure
from shared.retrieval import HiddenStates, Index, MiniLM
from shared.runtime import clock, pick_device, read_jsonl, table
from shared.stores import STORES, make_store
from shared.tokenizers import gpt2_tokenizer

WEEK_6 = load_script("06_gpt2")
HERE = Path(__file__).parent
RETRIEVERS = ("bm25", "dense", "hybrid", "own")
CONDITIONS = ("without", "retrieved", "right passage")
EFFORTS = {"flat": (None,), "pq": (None,), "ivf": (1, 4, 16, 64), "hnsw": (16, 64, 256)}


@dataclass(frozen=True)
class Settings(WeekSettings):
    data: str = "handbook"
    """handbook, or the path of a folder with documents (or of one document)."""
    own_data: str = "tinyshakespeare"
    """What the learner's own model, whose hidden states are the retriever "own", was trained on."""
    size: int = 256
    """Tokens of a chunk, at most."""
    overlap: int = 32
    window: int = 64
    """Tokens of a sentence that is embedded by itself, at most."""
    store: str = "flat"
    """Where vectors are kept: flat, ivf, hnsw, pq or qdrant."""
    by: Literal["dense", "bm25", "hybrid"] = "dense"
    """How passages are found for answers."""
    k: int = 1
    """How many passages the model is given. A model of this size reads one better than three."""
    max_new_tokens: int = 32
    min_score: float = 0.0
    """Questions whose best passage has a lower score are not answered."""
    questions: int | None = 60
    """So many of the questions are answered, spread over all; none takes all. Retrieval is measured on all."""
    vectors: int = 100_000
    """For --study index."""
    ask: str | None = None
    """Answer this and end."""
    interactive: bool = False
    """Answer what is typed, until an empty line."""
    study: Literal["index", "answers"] | None = None

    def __post_init__(self) -> None:
        problems = [f"no store is called {self.store!r}; there are: {', '.join(STORES)}"] * (self.store not in STORES)
        counts = ("k", "max_new_tokens", "questions", "vectors")
        problems += [f"{name}={n}: must be at least 1" for name in counts if (n := getattr(self, name)) is not None and n < 1]
        if problems:
            raise ValueError("; ".join(problems))


PRESETS = {
    "smoke": Settings(preset="smoke", questions=2, vectors=2000, max_new_tokens=8),
    "laptop": Settings(),
    "gpu": Settings(preset="gpu", questions=None, vectors=1_000_000),
}


def main(settings: Settings) -> dict[str, float]:
    """Measures retrieval and answers; or answers what is asked; or runs a study. Returns the week's figures."""
    if settings.ask or settings.interactive:
        return converse(settings)
    if settings.study == "index":
        return study_index(settings)
    if settings.data != "handbook":
        raise ValueError(f"there are no questions with known answers on {settings.data}: use --ask or --interactive")
    device = pick_device(settings.device)
    work = Workspace(__file__, settings, "handbook", device)
    answerable, unanswerable = questions()
    index, chunks = open_index(settings, device)
    finding = measure_retrieval(settings, work, index, chunks, answerable)
    answering = measure_answers(replace(settings, questions=None) if settings.study else settings, work, index, chunks, answerable, unanswerable)
    return work.finish(finding | answering, draw)


def folder_of(settings: Settings) -> Path:
    return HERE / "handbook" if settings.data == "handbook" else Path(settings.data)


def questions() -> tuple[list[dict], list[dict]]:
    """Those that the handbook answers, and those that it does not."""
    rows = read_jsonl(HERE / "questions.jsonl")
    return [row for row in rows if row["document"]], [row for row in rows if not row["document"]]


def open_index(settings: Settings, device: torch.device) -> tuple[Index, list[Chunk]]:
    """The folder's index, kept beside the checkpoints and brought up to date, and its chunks."""
    path = folder_of(settings)
    documents = load_documents(path).documents
    chunks = chunk_documents(documents, gpt2_tokenizer(), settings.size, settings.overlap, settings.window)
    kept = output_root() / "checkpoints" / "11_rag" / settings.preset / path.resolve().name / settings.store
    embedder = MiniLM(device)
    index = Index.load(kept, embedder) if (kept / "index.json").exists() else Index(embedder, make_store(settings.store, embedder.dim))
    changes = index.sync(chunks)
    index.save(kept)
    print(f"{len(documents)} documents, {len(chunks)} chunks, {len(index.store)} windows; " + ", ".join(f"{len(v)} {k}" for k, v in changes.items()))
    return index, chunks


def make_reader(settings: Settings, device: torch.device) -> Reader:
    """SmolLM2; on a CPU in int8, which writes several times as fast."""
    model, tokenizer = load_smollm2()
    if device.type == "cpu":
        quantize(model, "int8", group_size=64)
    return Reader(model.to(device), tokenizer, settings.max_new_tokens)


# ---- asking


def converse(settings: Settings) -> dict[str, float]:
    """Answers one question, or one after the other, with sources."""
    device = pick_device(settings.device)
    index, _ = open_index(settings, device)
    rag = RAG(index, make_reader(settings, device), settings.k, settings.by, settings.min_score)
    if settings.ask:
        show(rag.ask(settings.ask))
        return {}
    print("Type a question and press Enter; an empty line ends.")
    while question := input("> ").strip():
        try:
            show(rag.ask(question))
        except ValueError as error:
            print(f"error: {error}")
    return {}


def show(reply: Reply) -> None:
    for piece in reply:
        print(piece, end="", flush=True)
    print("".join(f"\n  [{number}] {source}" for number, source in enumerate(reply.sources, 1)))


# ---- finding


def place(chunk: Chunk) -> tuple[str, str | None]:
    """What a question's answer is looked up by: file and section."""
    return chunk.source, chunk.headings[-1] if chunk.headings else None


def places(found: Iterable[Any]) -> list[tuple[str, str | None]]:
    """The sections of hits, each at its best place."""
    return list(dict.fromkeys(place(hit.chunk) for hit in found))


def measure_retrieval(settings: Settings, work: Workspace, index: Index, chunks: Sequence[Chunk], asked: Sequence[dict]) -> dict[str, float]:
    """Every retriever on every question: the right section is the one that the question was written from."""
    week_6 = replace(WEEK_6.PRESETS[settings.preset], data=settings.own_data, device=settings.device)
    model = WEEK_6.trained_model(week_6, WEEK_6.open_corpus(week_6)).to(work.device)
    own = Index(HiddenStates(model, model.tokenizer, "week 6"))
    own.add(chunks)
    relevant, rows, figures = [{(q["document"], q["section"])} for q in asked], [], {}
    for name in RETRIEVERS:
        searched, by = (own, "dense") if name == "own" else (index, name)
        with work.log(f"retrieval-{name}", settings) as log:
            started = clock()
            rankings = [places(searched.search(q["question"], 10, by)) for q in asked]
            seconds = (clock() - started) / len(asked)
            scores = rank_scores(rankings, relevant)
            log.artifact(missed=[q["question"] for q, r, found in zip(asked, relevant, rankings) if not set(found[:5]) & r])
            log.finish(
                name=name, milliseconds=1000 * seconds, **{f"{k}{end}": v for k, s in scores.items() for end, v in zip(("", "_low", "_high"), s)}
            )
        rows.append({"retriever": name} | {k: f"{s.mean:.3f} ({s.low:.3f} to {s.high:.3f})" for k, s in scores.items()})
        figures |= {f"{name}_{k.replace('@', '_at_')}": s.mean for k, s in scores.items()}
    print(f"\n{len(asked)} questions, with 95 % intervals\n" + table(rows))
    return figures


# ---- answering


def measure_answers(
    settings: Settings, work: Workspace, index: Index, chunks: Sequence[Chunk], asked: Sequence[dict], unanswerable: Sequence[dict]
) -> dict[str, float]:
    """Answers without, with found, with the right passage; abstention; and whether the answer follows when the passage changes."""
    asked, unanswerable, swaps = (spread(rows, settings.questions) for rows in (asked, unanswerable, read_jsonl(HERE / "swaps.jsonl")))
    reader = make_reader(settings, work.device)
    rag = RAG(index, reader, settings.k, settings.by, settings.min_score)
    right = {q["question"]: next(c for c in chunks if place(c) == (q["document"], q["section"])) for q in asked}
    read = {
        "without": lambda q: reader.read(q["question"]),
        "retrieved": lambda q: rag.ask(q["question"]),
        "right passage": lambda q: reader.read(q["question"], [right[q["question"]]]),
    }
    rows, figures = [], {}
    for condition in CONDITIONS:
        with work.log(f"answers-{condition.replace(' ', '-')}", settings) as log:
            replies = [read[condition](q).text for q in asked]
            measures = {"exact": exact_match, "f1": token_f1, "holds": holds_answer}
            scores = {name: bootstrap([measure(a, q["answers"]) for a, q in zip(replies, asked)]) for name, measure in measures.items()}
            log.artifact(answers=[{"question": q["question"], "answer": a, "right": q["answers"][0]} for q, a in zip(asked, replies)])
            log.finish(name=condition, **{f"{k}{end}": v for k, s in scores.items() for end, v in zip(("", "_low", "_high"), s)})
        rows.append({"condition": condition} | {k: f"{s.mean:.3f} ({s.low:.3f} to {s.high:.3f})" for k, s in scores.items()})
        figures |= {f"{condition.replace(' ', '_')}_{k}": s.mean for k, s in scores.items()}
    print(f"\n{len(asked)} questions answered\n" + table(rows))
    with work.log("abstention", settings) as log:
        found = abstention(rag, asked, unanswerable)
        figures |= log.finish(**found)
    with work.log("swaps", settings) as log:
        found = swapped(reader, chunks, swaps)
        figures |= log.finish(**found)
    print(f"\nabstention: of {len(unanswerable)} questions without an answer {figures['rightly_abstained']:.0%} are not answered, of {len(asked)} with one "
          f"{figures['wrongly_abstained']:.0%}; the passage's score tells them apart with AUC {figures['score_auc']:.2f}, the answer's gain with "
          f"{figures['gain_auc']:.2f}\nswaps: of {figures['swaps_read']} answers read from the passage, {figures['swaps_followed']:.0%} follow when it changes")  # fmt: skip
    return figures


def spread(rows: Sequence[dict], count: int | None) -> list[dict]:
    """`count` of the rows, evenly."""
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(count or len(rows), len(rows))).round().astype(int)]


def abstention(rag: RAG, asked: Sequence[dict], unanswerable: Sequence[dict]) -> dict[str, float]:
    """How often nothing is answered, and how well two signals tell questions with an answer from those without (0.5 is chance)."""
    reader, signals, silent = rag.reader, {"score": ([], []), "gain": ([], [])}, ([], [])
    for side, rows in enumerate((asked, unanswerable)):
        for q in rows:
            hits = rag.index.search(q["question"], rag.k, rag.by)
            silent[side].append(rag.ask(q["question"]).abstained)
            signals["score"][side].append(hits[0].score)
            prompt, answer = reader.draft(q["question"], [hit.chunk for hit in hits])
            signals["gain"][side].append(reader.gain(q["question"], prompt, answer) if answer else -np.inf)
    found = {f"{name}_auc": auc(*sides) for name, sides in signals.items()}
    return found | {"wrongly_abstained": statistics.fmean(silent[0]), "rightly_abstained": statistics.fmean(silent[1])}


def auc(high: Sequence[float], low: Sequence[float]) -> float:
    """How often a value of `high` is above one of `low`; equals count half."""
    above = np.array(high)[:, None], np.array(low)[None]
    return float((np.greater(*above) + 0.5 * np.equal(*above)).mean())


def swapped(reader: Reader, chunks: Sequence[Chunk], swaps: Sequence[dict]) -> dict[str, float]:
    """Where the answer is read from the passage: how often it is the new one when only that changes in the passage."""
    read, followed = 0, 0
    for swap in swaps:
        chunk = next(c for c in chunks if c.source == swap["document"] and swap["old"] in c.text)
        if holds_answer(reader.read(swap["question"], [chunk]).text, [swap["old_answer"]]):
            read += 1
            changed = replace(chunk, text=chunk.text.replace(swap["old"], swap["new"]))
            followed += holds_answer(reader.read(swap["question"], [changed]).text, [swap["new_answer"]])
    return {"swaps": len(swaps), "swaps_read": read, "swaps_followed": followed / max(1, read)}


# ---- the index


def study_index(settings: Settings) -> dict[str, float]:
    """Stores side by side on real embeddings: recall@10 with Flat as the truth, milliseconds for a question, bytes for a vector."""
    device = pick_device(settings.device)
    work = Workspace(__file__, settings, "handbook", device)
    vectors = line_vectors(settings, device)
    asked, kept = vectors[:200], vectors[200:]
    rows: list[dict] = []
    truth = None
    for kind, efforts in EFFORTS.items():
        store, started = make_store(kind, vectors.shape[1]), clock()
        store.add(range(len(kept)), kept)
        building, size = clock() - started, store.num_bytes() / len(kept)
        for effort in efforts:
            store.effort = effort or 0
            times, found = [], []
            for vector in asked:
                started = clock()
                found.append(store.search(vector[None], 10)[1][0].tolist())
                times.append(clock() - started)
            truth = truth or found
            name = f"{kind}-{effort}" if effort else kind
            recall = statistics.fmean(recall_at([i for i in f if i >= 0], t, 10) for f, t in zip(found, truth))
            with work.log(f"index-{name}", settings) as log:
                rows.append(log.finish(
                    name=name, vectors=len(kept), recall=recall, milliseconds=1000 * statistics.median(times), bytes=size, build_seconds=building,
                ))  # fmt: skip
    print("\n" + table([{k: row[k] for k in ("name", "recall", "milliseconds", "bytes", "build_seconds")} for row in rows]))
    draw(work.logs, work.reports)
    return {f"{row['name']}_recall": row["recall"] for row in rows}


def line_vectors(settings: Settings, device: torch.device) -> np.ndarray:
    """MiniLM's vectors of the lines of Shakespeare's plays, as many as are wanted, kept for the next time: float32 [n, 384]."""
    path = output_root() / "checkpoints" / "11_rag" / f"lines-{settings.vectors}.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    lines = list(dict.fromkeys(line for line in read_text("shakespeare")[1].splitlines() if len(line.split()) > 3))
    pairs = [f"{a} {b}" for a, b in zip(lines, lines[1:])]
    wanted = [*lines, *pairs][: settings.vectors]
    if len(wanted) < settings.vectors:
        print(f"the plays give {len(wanted)} different texts: that many vectors are measured")
    print(f"embedding {len(wanted)} texts once, which takes minutes on a CPU")
    vectors = np.random.default_rng(0).permutation(MiniLM(device, batch_size=256).embed(wanted))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, vectors)
    return vectors


# ---- plots


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs = {name: run.summary for name, run in read_runs(logs).items() if run.summary}
    plots = []
    if any(name.startswith("retrieval-") for name in runs):
        rows = [runs[f"retrieval-{name}"] for name in RETRIEVERS if f"retrieval-{name}" in runs]
        plots.append(grouped(out / "retrieval.png", rows, ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"), "Finding the right section"))
    if any(name.startswith("answers-") for name in runs):
        rows = [runs[key] for name in CONDITIONS if (key := f"answers-{name.replace(' ', '-')}") in runs]
        plots.append(grouped(out / "answers.png", rows, ("exact", "f1", "holds"), "SmolLM2's answers"))
    if stores := [run for name, run in runs.items() if name.startswith("index-")]:
        fig, ax = figure()
        for colour, kind in zip(COLOURS, EFFORTS):
            of_kind = sorted((s for s in stores if s["name"].split("-")[0] == kind), key=lambda s: s["milliseconds"])
            ax.plot([s["milliseconds"] for s in of_kind], [s["recall"] for s in of_kind], "o-", color=colour, label=kind)
            for s in of_kind:
                ax.annotate(
                    s["name"].partition("-")[2] or f"{s['bytes']:,.0f} bytes",
                    (s["milliseconds"], s["recall"]),
                    xytext=(5, -12),
                    textcoords="offset points",
                )
        ax.set(
            xscale="log",
            xlabel="milliseconds for a question",
            ylabel="recall@10, Flat as the truth",
            title=f"{stores[0]['vectors']:,} vectors of 384 numbers",
        )
        ax.legend(frameon=False)
        plots.append(save_figure(fig, out / "index.png"))
    return plots


def grouped(path: Path, rows: Sequence[dict], keys: Sequence[str], title: str) -> Path:
    """Bars in groups, with their intervals."""
    fig, ax = figure(1.6 + 1.7 * len(keys), 4.8)
    width = 0.8 / len(rows)
    for i, (row, colour) in enumerate(zip(rows, COLOURS)):
        values = np.array([[row[key], row[f"{key}_low"], row[f"{key}_high"]] for key in keys])
        at = np.arange(len(keys)) + (i - (len(rows) - 1) / 2) * width
        errors = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
        ax.bar(at, values[:, 0], width, yerr=errors, color=colour, label=row["name"], capsize=2)
    ax.set(title=f"{title} (95 % intervals)", xticks=range(len(keys)), xticklabels=keys, ylim=(0, 1.05), ylabel="score", xlabel="measure")
    ax.legend(frameon=False, ncols=len(rows), loc="upper left")
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
