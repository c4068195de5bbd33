"""Week 11: retrieval. A folder of documents that no model has read about, found in four ways and answered
from.

python weeks/11_rag/run.py --preset laptop                            # how well it finds, and how well it answers
python weeks/11_rag/run.py --ask "When does the last ferry leave?"
python weeks/11_rag/run.py --data path/to/folder --interactive        # your own documents, question after question
python weeks/11_rag/run.py --data python                              # the same measurements on Python's language reference
python weeks/11_rag/run.py --study answers                            # every question, not a sample
python weeks/11_rag/run.py --study windows                            # what to embed, chosen on one half of the handbook, measured on the other
python weeks/11_rag/run.py --study index                              # recall against latency and bytes, 100,000 vectors
python weeks/11_rag/run.py --study own                                # week 6's model learns to answer from a sentence
"""

import hashlib
import random
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from sklearn.metrics import roc_auc_score

from shared.adapters import LoRAConfig, add_lora
from shared.adapters.instructions import Conversation, Instructions, answer, template_for
from shared.checkpoint import unshared
from shared.commandline import cli
from shared.course.report import COLOURS, LoggedRun, figure, read_runs, save_figure
from shared.course.workspace import WeekSettings, Workspace, output_root
from shared.data.corpus import read_text
from shared.models.gpt import GPT
from shared.models.pretrained import load_smollm2
from shared.quantization import quantize
from shared.retrieval.documents import Chunk, chunk_documents, load_documents, split
from shared.retrieval.embedders import HiddenStates, MiniLM
from shared.retrieval.index import Index
from shared.retrieval.rag import RAG, Reader, Reply
from shared.retrieval.ranking import (
    RANKING_METRICS,
    bootstrap,
    exact_match,
    holds_answer,
    normalise,
    rank_scores,
    recall_at,
    token_f1,
)
from shared.retrieval.stores import STORES, make_store
from shared.runtime import clock, pick_device, read_jsonl, table, write_atomically
from shared.tokenizers import gpt2_tokenizer
from shared.training import TrainConfig, Trainer
from shared.training.base_model import BASE_PRESETS, open_corpus, trained_base_model

HERE = Path(__file__).parent
RETRIEVERS = {"bm25": "BM25", "dense": "MiniLM", "hybrid": "BM25 + MiniLM", "own": "week 6's model"}
CONDITIONS = {
    "without": "without passages",
    "retrieved": "with what was found",
    "right": "with the right passage",
}
MEASURES = {"exact": exact_match, "f1": token_f1, "holds": holds_answer}
EFFORTS = {"flat": (None,), "pq": (None,), "ivf": (1, 4, 16, 64, 256), "hnsw": (16, 64, 256)}
WINDOWS = {
    "whole chunk": None,
    "128 tokens": (128, 16),
    "64 tokens": (64, 16),
    "32 tokens": (32, 8),
    "two sentences": 2,
    "sentence": 1,
}
"""What is embedded by itself: pieces of so many tokens with an overlap, or so many sentences."""
UNDERLINES = {"*": 1, "=": 2, "-": 3, "~": 4}
"""Of headings in Python's reference, with their levels."""


@dataclass(frozen=True)
class Settings(WeekSettings):
    data: str = "handbook"
    """handbook, python (the language reference), or the path of a folder with documents (or of one document).
    """
    text: str = "tinyshakespeare"
    """What the learner's own model was trained on, whose hidden states are the retriever "own"."""
    documents: int | None = None
    """So many of the documents, from the first; none takes all."""
    size: int = 256
    """Tokens of a chunk, at most."""
    overlap: int = 32
    window: int = 64
    """Tokens of a sentence that is embedded by itself, at most."""
    embedder: Literal["minilm", "own"] = "minilm"
    """For --ask and --interactive: own takes the hidden states of week 6's model."""
    store: str = "flat"
    """Where vectors are kept: flat, ivf, hnsw, pq or qdrant."""
    index: str | None = None
    """The folder of the index; none: one beside the checkpoints."""
    by: Literal["dense", "bm25", "hybrid"] = "dense"
    """How passages are found for answers."""
    k: int = 1
    """How many passages the model is given. A model of this size reads one better than three."""
    max_new_tokens: int = 32
    min_score: float = 0.0
    """Questions whose best passage has a lower score are not answered."""
    min_gain: float | None = None
    """Answers that the passage makes less likely than this, in nats per token, are not given."""
    questions: int | None = 48
    """So many of the questions are answered, spread over all; none takes all. Retrieval is measured on all.
    """
    illustrated: str = (
        "How long must someone have been resident before being allowed to take part in the ballot?"
    )
    """The question of the picture."""
    vectors: int = 100_000
    """For --study index."""
    train: TrainConfig = TrainConfig(
        steps=400,
        batch_size=4,
        block_size=256,
        lr=2e-3,
        schedule="linear",
        final_lr=0.0,
        warmup_steps=40,
        weight_decay=0.0,
        eval_every=50,
        checkpoint_every=50,
    )
    """How week 6's model learns to answer, for --study own."""
    ask: str | None = None
    """Answer this and end."""
    interactive: bool = False
    """Answer what is typed, until an empty line."""
    study: Literal["answers", "windows", "index", "own"] | None = None

    def __post_init__(self) -> None:
        problems = [f"no store is called {self.store!r}; there are: {', '.join(STORES)}"] * (
            self.store not in STORES
        )
        counts = ("documents", "k", "max_new_tokens", "questions")
        problems += [
            f"{name}={n}: must be at least 1"
            for name in counts
            if (n := getattr(self, name)) is not None and n < 1
        ]
        problems += [f"vectors={self.vectors}: must be at least 1000"] * (self.vectors < 1000)
        if problems:
            raise ValueError("; ".join(problems))


PRESETS = {
    "smoke": Settings(
        preset="smoke",
        documents=5,
        questions=2,
        vectors=1000,
        max_new_tokens=8,
        illustrated="Which dogs are exempt?",
        train=replace(Settings().train, steps=3, eval_every=2, checkpoint_every=2, warmup_steps=1),
    ),
    "laptop": Settings(),
    "gpu": Settings(preset="gpu", questions=None, vectors=190_000),
}


@dataclass(frozen=True)
class Library:
    """Documents, ready to be asked."""

    name: str
    chunks: list[Chunk]
    index: Index
    asked: list[dict]
    """Questions with their "answers" and the "document" and "section" that these stand in (no section:
    anywhere in the document).
    """
    unanswerable: list[dict]

    def right(self, question: dict) -> Chunk:
        """The passage that the answer stands in."""
        there = [c for c in self.chunks if place(c, question) == home(question)]
        return next((c for c in there if holds_answer(c.text, question["answers"])), there[0])


def main(settings: Settings) -> dict[str, float]:
    """Measures retrieval and answers; or answers what is asked; or runs a study. Returns the week's figures."""
    device = pick_device(settings.device)
    if settings.ask or settings.interactive:
        return converse(settings, device)
    if settings.data not in ("handbook", "python"):
        raise ValueError(
            f"there are no questions with known answers on {settings.data}: use --ask or --interactive"
        )
    text = open_corpus(replace(BASE_PRESETS[settings.preset], data=settings.text)).name
    work = Workspace(__file__, settings, text, device)
    if settings.study == "index":
        found = study_index(settings, work)
    else:
        library = open_library(settings, device)
        study = {"answers": study_answers, "windows": study_windows, "own": study_own, None: measure_all}[
            settings.study
        ]
        found = study(settings, work, library)
    if settings.study or library.name != "handbook":
        draw(work.logs, work.reports)
        return found
    return work.finish(found, draw)


def measure_all(settings: Settings, work: Workspace, library: Library) -> dict[str, float]:
    """Finding, on all questions, and answering, on some."""
    found = measure_retrieval(settings, work, library)
    reader = make_reader(settings, work.device)
    found |= measure_answers(settings, work, library, reader)
    if library.name == "handbook":
        illustrate(settings, work, library, reader)
    return found


def study_answers(settings: Settings, work: Workspace, library: Library) -> dict[str, float]:
    """Every question is answered."""
    every = settings if settings.preset == "smoke" else replace(settings, questions=None)
    return measure_answers(every, work, library, make_reader(settings, work.device), "all-")


# ---- documents, questions, the index, the models


def open_library(settings: Settings, device: torch.device) -> Library:
    """The folder's chunks and its index, which is kept beside the checkpoints and brought up to date."""
    kept = output_root() / "checkpoints" / "11_rag" / settings.preset
    path = {
        "handbook": HERE / "handbook",
        "python": kept / f"{sys.version_info.major}.{sys.version_info.minor}" / "python",
    }.get(settings.data, Path(settings.data))
    if settings.data == "python":
        write_python_reference(path)
    documents = load_documents(path).documents[: settings.documents]
    chunks = chunk_documents(documents, gpt2_tokenizer(), settings.size, settings.overlap, settings.window)
    name = path.resolve().name
    embedder = MiniLM(device) if settings.embedder == "minilm" else own_embedder(settings, device)
    folder = Path(
        settings.index
        or kept / "-".join(("index", name, re.sub(r"[^\w.]+", "-", embedder.name), settings.store))
    )
    index, changes = Index.kept(folder, embedder, chunks, lambda: make_store(settings.store, embedder.dim))
    print(
        f"{len(documents)} documents, {len(chunks)} chunks, {len(index.store)} windows; "
        + ", ".join(f"{len(v)} {k}" for k, v in changes.items())
    )
    return Library(name, chunks, index, *questions(settings.data, chunks))


def write_python_reference(folder: Path) -> None:
    """The language reference that comes with every Python, a Markdown file for each topic. A section that
    stands in several topics (most of the long ones repeat shorter ones) is kept in the shortest.
    """
    from pydoc_data.topics import topics

    seen = set()
    for topic, text in sorted(topics.items(), key=lambda pair: len(pair[1])):
        parts = re.split(
            r"^(\S.*)\n([*=~-])\2{2,}\n", text, flags=re.M
        )  # before, then heading, mark and text of each section
        written = [parts[0]]
        for heading, mark, body in zip(parts[1::3], parts[2::3], parts[3::3]):
            if body.split() and tuple(body.split()) in seen:
                continue
            seen.add(tuple(body.split()))
            written.append(
                f"{'#' * UNDERLINES[mark]} {heading}\n" + re.sub(r"^ {3}", "    ", body, flags=re.M)
            )  # 3 blanks and # were a heading
        if "".join(written).strip():
            write_atomically(folder / f"{topic}.md", "\n".join(written))


def questions(data: str, chunks: Sequence[Chunk]) -> tuple[list[dict], list[dict]]:
    """Those that these chunks answer, and those that no document does."""
    if data == "handbook":
        rows = read_jsonl(HERE / "questions.jsonl")
    elif data == "python":
        rows = [
            row | {"document": f"{row['topic']}.md", "section": None}
            for row in read_jsonl(HERE / "python_questions.jsonl")
        ]
    else:
        return [], []
    there = {chunk.source for chunk in chunks}
    return [row for row in rows if row["document"] in there], [row for row in rows if not row["document"]]


def home(question: dict) -> tuple[str, str | None]:
    """Where the answer stands: file and section."""
    return question["document"], question["section"]


def place(chunk: Chunk, question: dict) -> tuple[str, str | None]:
    """Where a chunk stands, as closely as the question knows."""
    return chunk.source, chunk.headings[-1] if chunk.headings and question["section"] else None


def own_embedder(settings: Settings, device: torch.device) -> HiddenStates:
    """The hidden states of week 6's model."""
    model = own_model(settings)
    weights = hashlib.sha256(save(unshared(model.cpu()))).hexdigest()[
        :8
    ]  # trained anew, it is another embedder
    return HiddenStates(
        model.to(device), model.tokenizer, f"week 6, {settings.preset}, {settings.text}, {weights}"
    )


def own_model(settings: Settings) -> GPT:
    """Week 6's model, trained first where it is not there."""
    return trained_base_model(settings.preset, data=settings.text, device=settings.device)[0]


def make_reader(settings: Settings, device: torch.device) -> Reader:
    """SmolLM2; on a CPU in int8, which writes several times as fast."""
    model, tokenizer = load_smollm2()
    if device.type == "cpu":
        quantize(model, "int8", group_size=64)
    return Reader(model.to(device), tokenizer, settings.max_new_tokens, settings.min_gain)


# ---- asking


def converse(settings: Settings, device: torch.device) -> dict[str, float]:
    """Answers one question, or one after the other, with sources."""
    index = open_library(settings, device).index
    rag = RAG(index, make_reader(settings, device), settings.k, settings.by, settings.min_score)
    if settings.ask:
        tell(rag.ask(settings.ask))
        return {}
    print("Type a question and press Enter; an empty line ends.")
    while question := typed():
        try:
            tell(rag.ask(question))
        except ValueError as error:
            print(f"error: {error}")
    return {}


def typed() -> str:
    """The next question; none where the input ends."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def tell(reply: Reply) -> None:
    """An answer, as it is written, and then its sources."""
    for piece in reply:
        print(piece, end="", flush=True)
    print("".join(f"\n  [{number}] {source}" for number, source in enumerate(reply.sources, 1)))


# ---- finding


def measure_retrieval(settings: Settings, work: Workspace, library: Library) -> dict[str, float]:
    """Every retriever on every question: the right section is the one that the question was written from."""
    own = Index(own_embedder(settings, work.device))
    own.add(library.chunks)
    rows, figures = [], {}
    for name, label in RETRIEVERS.items():
        searched, by = (own, "dense") if name == "own" else (library.index, name)
        with work.log(f"{library.name}-find-{name}", settings) as log:
            started = clock()
            rankings = [ranking(searched, q, by) for q in library.asked]
            milliseconds = 1000 * (clock() - started) / len(library.asked)
            scores = rank_scores(rankings, [{home(q)} for q in library.asked])
            log.artifact(
                missed=[
                    q["question"] for q, found in zip(library.asked, rankings) if home(q) not in found[:5]
                ]
            )
            log.finish(
                name=label, questions=len(library.asked), milliseconds=milliseconds, **with_bounds(scores)
            )
        rows.append({"retriever": label} | with_intervals(scores))
        figures |= {f"{name}_{k.replace('@', '_at_')}": s.mean for k, s in scores.items()}
    print(f"\n{len(library.asked)} questions, with 95 % intervals\n" + table(rows))
    first = "dense_recall_at_5"
    return {first: figures[first]} | figures


def ranking(index: Index, question: dict, by: str = "dense") -> list[tuple[str, str | None]]:
    """The places that are found, each once, at most ten."""
    return list(
        dict.fromkeys(place(hit.chunk, question) for hit in index.search(question["question"], 30, by))
    )[:10]


def with_bounds(scores: dict[str, Any]) -> dict[str, float]:
    """Means and their intervals, flat."""
    return {
        f"{name}{end}": value
        for name, interval in scores.items()
        for end, value in zip(("", "_low", "_high"), interval)
    }


def with_intervals(scores: dict[str, Any]) -> dict[str, str]:
    """The same for people."""
    return {name: f"{s.mean:.3f} ({s.low:.3f} to {s.high:.3f})" for name, s in scores.items()}


def study_windows(settings: Settings, work: Workspace, library: Library) -> dict[str, float]:
    """What is embedded by itself. The choice is made on the questions on one half of the documents and
    measured on those on the other, both ways: a figure on the questions that the choice was made by would
    flatter.
    """
    tokenizer, found = gpt2_tokenizer(), {}
    sources = sorted({c.source for c in library.chunks})
    halves = [
        [i for i, q in enumerate(library.asked) if sources.index(q["document"]) % 2 == half]
        for half in (0, 1)
    ]
    for name, how in WINDOWS.items():
        with work.log(f"{library.name}-windows-{name.replace(' ', '-')}", settings) as log:
            index = Index(library.index.embedder)
            index.add(replace(chunk, windows=windows(chunk, how, tokenizer)) for chunk in library.chunks)
            rankings = [ranking(index, q) for q in library.asked]
            scores = rank_scores(rankings, [{home(q)} for q in library.asked])
            found[name] = [
                (recall_at(r, {home(q)}, 5), recall_at(r, {home(q)}, 1))
                for r, q in zip(rankings, library.asked)
            ]
            log.finish(name=name, windows=len(index.store), **with_bounds(scores))
            print(
                f"{name}: {len(index.store)} windows, "
                + ", ".join(f"{k} {v}" for k, v in with_intervals(scores).items())
            )
    on = lambda name, half: np.mean([found[name][i] for i in half], axis=0).tolist()
    chosen = [
        max(WINDOWS, key=lambda name: on(name, half)) for half in halves
    ]  # by recall@5, then by recall@1
    fair = [found[name][i] for name, half in zip(chosen, reversed(halves)) for i in half]
    scores = {f"recall@{k}": bootstrap([pair[at] for pair in fair]) for at, k in enumerate((5, 1))}
    with work.log(f"{library.name}-windows", settings) as log:
        log.artifact(chosen=chosen)
        figures = log.finish(questions=len(fair), **with_bounds(scores))
    print(
        f"\nchosen on one half: {chosen[0]}, on the other: {chosen[1]}; each measured on the half it was not"
        f" chosen on: {with_intervals(scores)}"
    )
    return {name.replace("@", "_at_"): value for name, value in figures.items()}


def windows(chunk: Chunk, how: tuple[int, int] | int | None, tokenizer: Any) -> tuple[tuple[int, int], ...]:
    """A chunk's windows in one of `WINDOWS`' ways; its own ones are its sentences."""
    if how is None:
        return ()
    if isinstance(how, tuple):
        return tuple(split(chunk.text, tokenizer, *how))
    last = len(chunk.windows) - 1
    return tuple(
        dict.fromkeys(
            (chunk.windows[i][0], chunk.windows[min(i + how - 1, last)][1])
            for i in range(max(1, last + 2 - how))
        )
    )


# ---- answering


def measure_answers(
    settings: Settings, work: Workspace, library: Library, reader: Reader, prefix: str = ""
) -> dict[str, float]:
    """Answers without, with the found, with the right passage; abstention; and whether the answer follows
    when the passage changes.
    """
    asked, unanswerable = (
        spread(library.asked, settings.questions),
        spread(library.unanswerable, settings.questions),
    )
    rag = RAG(library.index, reader, settings.k, settings.by, settings.min_score)
    read = {
        "without": lambda q: reader.read(q["question"]),
        "retrieved": lambda q: rag.ask(q["question"]),
        "right": lambda q: reader.read(q["question"], [library.right(q)]),
    }
    rows, figures = [], {}
    for name, label in CONDITIONS.items():
        with work.log(f"{library.name}-{prefix}answer-{name}", settings) as log:
            started = clock()
            replies = [read[name](q).text for q in asked]
            scores = graded(log, label, asked, replies, seconds=(clock() - started) / len(asked))
        rows.append({"SmolLM2": label} | with_intervals(scores))
        figures |= {f"{name}_{k}": s.mean for k, s in scores.items()}
    print(f"\n{len(asked)} questions answered\n" + table(rows))
    if unanswerable:
        with work.log(f"{library.name}-{prefix}abstain", settings) as log:
            figures |= log.finish(**abstention(rag, asked, unanswerable, log))
        print(
            f"\nfor {len(unanswerable)} more there is no answer. AUC of the passage's score"
            f" {figures['score_auc']:.2f}, of the answer's gain {figures['gain_auc']:.2f}; with a least gain"
            f" of about {figures['gain_threshold']:.2f}, {figures['gain_withheld']:.0%} of these are"
            f" withheld, and {figures['gain_lost']:.0%} of the others"
        )
    if library.name == "handbook":
        with work.log(f"{library.name}-{prefix}swaps", settings) as log:
            figures |= log.finish(
                **swapped(
                    reader, library.chunks, spread(read_jsonl(HERE / "swaps.jsonl"), settings.questions)
                )
            )
        print(
            f"\nof {figures['swaps_read']} answers read from the passage, {figures['swaps_followed']:.0%}"
            " follow when it changes"
        )
    return figures


def graded(
    log: Any, label: str, asked: Sequence[dict], replies: Sequence[str], **more: float
) -> dict[str, Any]:
    """The answers' scores, written into their log with the answers."""
    scores = {
        name: bootstrap([score(a, q["answers"]) for a, q in zip(replies, asked)])
        for name, score in MEASURES.items()
    }
    log.artifact(
        answers=[
            {"question": q["question"], "answer": a, "right": q["answers"][0]} for q, a in zip(asked, replies)
        ]
    )
    log.finish(name=label, questions=len(asked), **with_bounds(scores), **more)
    return scores


def spread(rows: Sequence[dict], count: int | None) -> list[dict]:
    """`count` of the rows, evenly."""
    return [
        rows[i] for i in np.linspace(0, len(rows) - 1, min(count or len(rows), len(rows))).round().astype(int)
    ]


def abstention(rag: RAG, asked: Sequence[dict], unanswerable: Sequence[dict], log: Any) -> dict[str, float]:
    """Two signals that tell questions with an answer from those without: AUC (0.5 is chance), and what a
    threshold withholds and loses.

    The threshold is the best for one half of the questions and measured on the other, both ways.
    """
    reader, signals = rag.reader, {"score": ([], []), "gain": ([], [])}
    for side, rows in enumerate((asked, unanswerable)):
        for q in rows:
            hits = rag.index.search(q["question"], rag.k, rag.by)
            signals["score"][side].append(hits[0].score)
            prompt, ids = reader.draft(q["question"], [hit.chunk for hit in hits])
            signals["gain"][side].append(reader.gain(q["question"], prompt, ids) if ids else -99.0)
    log.artifact(
        **{name: dict(zip(("answerable", "unanswerable"), sides)) for name, sides in signals.items()}
    )
    found: dict[str, float] = {"answerable": len(asked), "unanswerable": len(unanswerable)}
    for name, sides in signals.items():
        good, bad = map(np.array, sides)
        found[f"{name}_auc"] = float(roc_auc_score([1] * len(good) + [0] * len(bad), [*good, *bad]))
        limits = [
            max(good[half::2], key=lambda t: (good[half::2] >= t).mean() + (bad[half::2] < t).mean())
            for half in (0, 1)
        ]
        found[f"{name}_threshold"] = float(np.mean(limits))
        found[f"{name}_withheld"] = float(
            np.mean(np.concatenate([bad[1 - half :: 2] < limits[half] for half in (0, 1)]))
        )
        found[f"{name}_lost"] = float(
            np.mean(np.concatenate([good[1 - half :: 2] < limits[half] for half in (0, 1)]))
        )
    return found


def swapped(reader: Reader, chunks: Sequence[Chunk], swaps: Sequence[dict]) -> dict[str, float]:
    """Where the answer is read from the passage: how often it is the new one when only that changes in the
    passage.
    """
    read, followed = 0, 0
    for swap in swaps:
        chunk = next((c for c in chunks if c.source == swap["document"] and swap["old"] in c.text), None)
        if chunk and holds_answer(reader.read(swap["question"], [chunk]).text, [swap["old_answer"]]):
            read += 1
            changed = replace(chunk, text=chunk.text.replace(swap["old"], swap["new"]))
            followed += holds_answer(reader.read(swap["question"], [changed]).text, [swap["new_answer"]])
    return {"swaps": len(swaps), "swaps_read": read, "swaps_followed": followed / max(1, read)}


def sentences(index: Index, question: str, chunk: Chunk) -> list[tuple[str, float]]:
    """A chunk's windows as they are embedded, each with its nearness to the question."""
    texts = chunk.window_texts()
    return list(zip(texts, (index.embedder.embed(texts) @ index.embedder.embed([question])[0]).tolist()))


def example(index: Index, question: str, reply: Reply) -> dict[str, Any]:
    """One question on its way: what is found, which sentence of the best is near, what is answered."""
    hits = index.search(question, 5)
    best = hits[0].chunk
    near = [
        [best.text[a:b], score] for (a, b), (_, score) in zip(best.windows, sentences(index, question, best))
    ]
    shown = [[hit.chunk.cite, hit.score] for hit in hits]
    return {
        "question": question,
        "answer": reply.text,
        "sources": reply.sources,
        "hits": shown,
        "sentences": near,
    }


def illustrate(settings: Settings, work: Workspace, library: Library, reader: Reader) -> None:
    """Keeps the example of `--illustrated`."""
    best = library.index.search(settings.illustrated, 1)[0]
    with work.log(f"{library.name}-example", settings) as log:
        log.artifact(
            **example(library.index, settings.illustrated, reader.read(settings.illustrated, [best.chunk]))
        )
        log.finish(score=best.score)


# ---- the learner's own model


def study_own(settings: Settings, work: Workspace, library: Library) -> dict[str, float]:
    """Week 6's model learns, by LoRA, to answer from a sentence. It is asked about one half of the documents,
    learns from most of the other half, and is kept as it was best on the rest.
    """
    random.seed(settings.train.seed)
    sources = sorted({c.source for c in library.chunks})
    parts = {"tested": sources[1::2], "validation": sources[::8]}
    parts["learned"] = [
        source for source in sources if source not in parts["tested"] and source not in parts["validation"]
    ]
    on = {part: [q for q in library.asked if q["document"] in chosen] for part, chosen in parts.items()}
    talks = [
        talk
        for q in on["learned"]
        for talk in talks_on(sentence_of(library, q), q["question"], q["answers"][0])
    ]
    talks += [talk for chunk in library.chunks if chunk.source in parts["learned"] for talk in gaps(chunk)]
    asked = on["tested"] if settings.preset != "smoke" else on["tested"][:2]
    held_out = [
        talk_on(sentence_of(library, q), q["question"], q["answers"][0]) for q in on["validation"] or asked
    ]
    model = own_model(settings).to(work.device)
    template = template_for(model.tokenizer)
    say = lambda q, text: answer(model, template, [talk_on(text, q["question"], "?")[0]], 24)
    nearest = lambda q: max(
        sentences(library.index, q["question"], library.index.search(q["question"], 1)[0].chunk),
        key=lambda pair: pair[1],
    )[0]
    right = [sentence_of(library, q) for q in asked]
    has_digit = lambda text: bool(re.search(r"\d", text))
    rows, figures = [], {}

    def row(name: str, label: str, replies: list[str]) -> None:
        with work.log(f"{library.name}-own-{name}", settings) as log:
            kind = np.mean(
                [has_digit(a) == has_digit(q["answers"][0]) for a, q in zip(replies, asked)]
            ).item()
            scores = graded(log, label, asked, replies, kind=kind)
        rows.append({"who": label} | with_intervals(scores) | {"of the right kind": kind})
        figures.update({f"{name}_{k}": s.mean for k, s in scores.items()})

    row(
        "rule",
        "a rule: the first number or name",
        [next(named(s, q["question"]), "") for q, s in zip(asked, right)],
    )
    row("untrained", "week 6's model as it is", [say(q, s) for q, s in zip(asked, right)])
    task = Instructions(talks, held_out, template, model.config.block_size, f"sentences-{len(talks)}")
    torch.manual_seed(settings.train.seed)
    add_lora(model, LoRAConfig(r=32, lora_alpha=64.0, target_modules=("all-linear",))).to(work.device)
    config = replace(settings.train, block_size=task.block_size)
    with work.log(f"{library.name}-own-training", settings) as log:
        folder = work.checkpoints / "own"
        trainer = Trainer(model, task, config, log, folder, device=work.device, description="own")
        log.finish(
            examples=len(talks),
            **{part: len(chosen) for part, chosen in parts.items()},
            **trainer.fit(settings.resume),
        )
    model = trainer.take_best().eval()
    row("without", "trained, without a sentence", [say(q, "") for q in asked])
    row("retrieved", "trained, with the nearest sentence", [say(q, nearest(q)) for q in asked])
    row("right", "trained, with the right sentence", [say(q, s) for q, s in zip(asked, right)])
    reader = make_reader(settings, work.device)
    as_chunk = lambda text: Chunk("", text.partition(". ")[0], (), text.partition(". ")[2])
    row(
        "smollm2",
        "SmolLM2, with the right sentence",
        [reader.read(q["question"], [as_chunk(s)]).text for q, s in zip(asked, right)],
    )
    print(
        f"\n{len(talks)} examples; {len(asked)} questions on {len(parts['tested'])} documents that none of"
        " them is from\n" + table(rows)
    )
    return figures


def sentence_of(library: Library, question: dict) -> str:
    """The sentence that the answer stands in, under its headings; where none holds it word for word, the
    first of the right passage.
    """
    texts = library.right(question).window_texts()
    return next((text for text in texts if holds_answer(text, question["answers"])), texts[0])


def talk_on(sentence: str, question: str, answer: str) -> Conversation:
    """A sentence and a question, and the answer."""
    return [
        {"role": "user", "content": f"{sentence}\n{question}".strip()},
        {"role": "assistant", "content": answer},
    ]


def talks_on(sentence: str, question: str, answer: str) -> Iterator[Conversation]:
    """The question as it is and with other numbers, in the sentence and in the answer alike: what is in the
    sentence is to be learned, not what is true.
    """
    for copy in range(8 if re.search(r"\d", answer) else 1):
        other = {
            digits: digits if copy == 0 else str(random.randint(1, 99))
            for digits in set(re.findall(r"\d+", sentence))
        }
        changed = lambda text, other=other: re.sub(r"\d+", lambda m: other.get(m[0], m[0]), text)
        yield talk_on(changed(sentence), changed(question), changed(answer))


NAMED = r"\d[\d:.,]*\d|\d+|(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*"
"""A number, or a name that does not begin a sentence."""


def named(sentence: str, question: str) -> Iterator[str]:
    """The sentence's numbers and names that the question does not have: a baseline takes the first."""
    asked = normalise(question)
    return (
        found for found in re.findall(NAMED, sentence.partition(". ")[2]) if normalise(found) not in asked
    )


def gaps(chunk: Chunk) -> Iterator[Conversation]:
    """Questions that need nobody to write them: a number or a name of a sentence is asked for by the words
    round it.
    """
    for text, (begin, end) in zip(chunk.window_texts(), chunk.windows):
        said = chunk.text[begin:end]
        for found in re.finditer(NAMED, said):
            before, after = said[: found.start()].split()[-4:], said[found.end() :].split()[:4]
            yield from talks_on(text, " ".join([*before, "what", *after]).rstrip(".;:,") + "?", found[0])


# ---- the index


def study_index(settings: Settings, work: Workspace) -> dict[str, float]:
    """Stores side by side on real embeddings: recall@10 with Flat as the truth, milliseconds for a question,
    bytes for a vector.
    """
    vectors = line_vectors(settings, work.device)
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
            recall = np.mean(
                [recall_at([i for i in f if i >= 0], t, 10) for f, t in zip(found, truth)]
            ).item()
            name = f"{kind}-{effort}" if effort else kind
            with work.log(f"index-{name}", settings) as log:
                rows.append(
                    log.finish(
                        name=name,
                        vectors=len(kept),
                        recall=recall,
                        milliseconds=1000 * float(np.median(times)),
                        bytes=size,
                        build_seconds=building,
                    )
                )
    print(
        "\n"
        + table(
            [
                {k: row[k] for k in ("name", "recall", "milliseconds", "bytes", "build_seconds")}
                for row in rows
            ]
        )
    )
    return {f"{row['name']}_recall": row["recall"] for row in rows}


def line_vectors(settings: Settings, device: torch.device) -> np.ndarray:
    """MiniLM's vectors of the lines of Shakespeare's plays, as many as are wanted, kept for the next time:
    float32 [n, 384].
    """
    path = (
        output_root() / "checkpoints" / "11_rag" / settings.preset / f"lines-{settings.vectors}.safetensors"
    )
    if path.exists():
        return load_file(path)["lines"].numpy()
    wanted = play_lines()[: settings.vectors + 200]
    if len(wanted) < settings.vectors + 200:
        raise ValueError(
            f"vectors={settings.vectors}: the plays give {len(wanted)} different texts, 200 of which ask:"
            " choose fewer"
        )
    print(f"embedding {len(wanted):,} texts once, which takes minutes on a CPU")
    vectors = np.random.default_rng(0).permutation(MiniLM(device, batch_size=256).embed(wanted))
    write_atomically(path, save({"lines": torch.from_numpy(vectors)}))
    return vectors


def play_lines() -> list[str]:
    """All lines of 37 plays, each once, and then all pairs of neighbours."""
    lines = list(
        dict.fromkeys(line for line in read_text("shakespeare")[1].splitlines() if len(line.split()) > 3)
    )
    return list(dict.fromkeys([*lines, *(f"{a} {b}" for a, b in zip(lines, lines[1:]))]))


# ---- plots


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs = {name: run for name, run in read_runs(logs).items() if run.summary}
    plots = []
    for data, title in (("handbook", "the handbook"), ("python", "Python's reference")):
        pick = lambda prefix, names, data=data: [
            runs[key].summary for n in names if (key := f"{data}-{prefix}-{n}") in runs
        ]
        every = "all-" if f"{data}-all-answer-right" in runs else ""
        own = ("rule", "untrained", "without", "retrieved", "right", "smollm2")
        for name, rows, keys, what in (
            ("finding", pick("find", RETRIEVERS), RANKING_METRICS, "Finding the right section in"),
            (
                "windows",
                pick("windows", [w.replace(" ", "-") for w in WINDOWS]),
                RANKING_METRICS,
                "What is embedded by itself:",
            ),
            ("answers", pick(f"{every}answer", CONDITIONS), tuple(MEASURES), "SmolLM2's answers from"),
            ("own", pick("own", own), tuple(MEASURES), "Answers from one sentence of"),
        ):
            if rows:
                plots.append(grouped(out / f"{data}_{name}.png", rows, keys, f"{what} {title}"))
        if f"{data}-{every}abstain" in runs:
            plots.append(
                save_figure(abstention_figure(runs[f"{data}-{every}abstain"]), out / f"{data}_abstention.png")
            )
    if "handbook-example" in runs:
        plots.append(
            save_figure(example_figure(runs["handbook-example"].artifacts), out / "handbook_example.png")
        )
    if stores := [run.summary for name, run in runs.items() if name.startswith("index-")]:
        plots.append(save_figure(index_figure(stores), out / "index.png"))
    return plots


def grouped(path: Path, rows: Sequence[dict], keys: Sequence[str], title: str) -> Path:
    """Bars in groups, with their intervals."""
    fig, ax = figure(10, 5.2)
    width = 0.84 / len(rows)
    for i, (row, colour) in enumerate(zip(rows, COLOURS)):
        values = np.array([[row[key], row[f"{key}_low"], row[f"{key}_high"]] for key in keys])
        at = np.arange(len(keys)) + (i - (len(rows) - 1) / 2) * width
        errors = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
        ax.bar(
            at,
            values[:, 0],
            width,
            yerr=errors,
            color=colour,
            edgecolor="white",
            label=row["name"],
            capsize=2,
            ecolor="#444444",
        )
        for x, (value, _, high) in zip(at, values):
            ax.annotate(
                f"{value:.2f}",
                (x, high),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8 if len(rows) < 5 else 7,
            )
    names = {
        "exact": "exact match",
        "f1": "token F1",
        "holds": "the right one is in it",
        "mrr": "MRR",
        "ndcg@10": "nDCG@10",
    }
    asked = f"{rows[0]['questions']} questions, " if "questions" in rows[0] else ""
    ax.set(
        title=f"{title} ({asked}95 % intervals)",
        xticks=range(len(keys)),
        xticklabels=[names.get(k, k) for k in keys],
    )
    ax.set_ylim(0, min(1.08, 1.12 * max(row[f"{key}_high"] for row in rows for key in keys)))
    ax.set(ylabel="share of questions, or mean", xlabel="measure")
    ax.grid(False, axis="x")
    fig.legend(
        *ax.get_legend_handles_labels(),
        frameon=False,
        ncols=len(rows) if len(rows) < 5 else 3,
        loc="outside lower center",
    )
    return save_figure(fig, path)


def abstention_figure(run: LoggedRun) -> Any:
    """How two signals lie where there is an answer and where there is none."""
    fig, axes = figure(11, 4.2, ncols=2)
    labels = {
        "score": "the passage's score (cosine)",
        "gain": "the answer's gain (nats per token; -1 or less: none was given)",
    }
    for ax, (key, label) in zip(axes, labels.items()):
        sides = [[max(v, -1) for v in run.artifacts[key][side]] for side in ("answerable", "unanswerable")]
        edges = np.linspace(min(map(min, sides)), max(map(max, sides)), 21)
        for values, name, colour in zip(sides, ("there is an answer", "there is none"), COLOURS):
            look = dict(alpha=0.6) if name == "there is an answer" else dict(histtype="step", linewidth=2.5)
            ax.hist(
                values,
                edges,
                weights=np.full(len(values), 1 / len(values)),
                color=colour,
                label=f"{name} ({len(values)})",
                **look,
            )
        ax.axvline(
            run.summary[f"{key}_threshold"],
            color="#555555",
            linestyle="--",
            label="threshold: less is withheld",
        )
        ax.set(
            title=f"AUC {run.summary[f'{key}_auc']:.2f} (0.5 is chance)",
            xlabel=label,
            ylabel="share of the questions",
        )
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    fig.suptitle("Do two signals tell questions with an answer from those without?")
    return fig


def example_figure(seen: dict[str, Any]) -> Any:
    """A question on its way: the sections that are near, the sentences of the nearest, the answer."""
    wrapped = [textwrap.fill(text, 62) for text, _ in seen["sentences"]]
    fig, (left, right) = figure(
        15, 2.8 + 0.26 * sum(text.count("\n") + 1.6 for text in wrapped), ncols=2, width_ratios=(1, 1)
    )
    for ax, names, scores, title in (
        (
            left,
            [textwrap.fill(cite, 30) for cite, _ in seen["hits"]],
            [s for _, s in seen["hits"]],
            "1. The nearest sections",
        ),
        (right, wrapped, [s for _, s in seen["sentences"]], "2. The nearest one's sentences"),
    ):
        best = int(np.argmax(scores))
        ax.barh(
            range(len(names)),
            scores,
            color=[COLOURS[0] if i == best else COLOURS[4] for i in range(len(names))],
        )
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.invert_yaxis()
        for i, score in enumerate(scores):
            ax.annotate(
                f"{score:.2f}",
                (max(score, 0), i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        ax.margins(x=0.14)
        ax.grid(False, axis="y")
        ax.set(title=title, xlabel="cosine with the question")
    fig.suptitle(f"{seen['question']}", fontsize=14, fontweight="bold")
    fig.supxlabel(f"3. SmolLM2 answers: {seen['answer']}   [{'; '.join(seen['sources'])}]", fontsize=13)
    return fig


def index_figure(stores: Sequence[dict]) -> Any:
    """Recall against time, and what a vector takes."""
    fig, (ax, size) = figure(12, 4.8, ncols=2, width_ratios=(2, 1))
    kinds = {
        kind: sorted((s for s in stores if s["name"].split("-")[0] == kind), key=lambda s: s["milliseconds"])
        for kind in EFFORTS
    }
    what = {"flat": "Flat", "pq": "PQ", "ivf": "IVF, cells searched", "hnsw": "HNSW, candidates kept"}
    for colour, marker, (kind, rows) in zip(COLOURS, "osD^", kinds.items()):
        ax.plot(
            [s["milliseconds"] for s in rows],
            [s["recall"] for s in rows],
            marker=marker,
            color=colour,
            label=what[kind],
        )
        for s in rows if len(rows) > 1 else []:
            ax.annotate(
                s["name"].partition("-")[2],
                (s["milliseconds"], s["recall"]),
                xytext=(6, -13),
                textcoords="offset points",
                fontsize=9,
            )
    ax.set(
        xscale="log",
        xlabel="milliseconds for a question, one at a time",
        ylabel="recall@10 (Flat is the truth)",
    )
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.margins(y=0.1)
    ax.set_title(f"{stores[0]['vectors']:,} vectors of 384 numbers")
    ax.legend(frameon=False, loc="lower right")
    values = [rows[0]["bytes"] for rows in kinds.values() if rows]
    size.bar([what[k].split(",")[0] for k, rows in kinds.items() if rows], values, color=COLOURS)
    for i, value in enumerate(values):
        size.annotate(f"{value:,.0f}", (i, value), xytext=(0, 3), textcoords="offset points", ha="center")
    size.set(title="What a vector takes", ylabel="bytes, ids included", xlabel="store")
    return fig


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
