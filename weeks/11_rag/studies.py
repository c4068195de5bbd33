"""Week 11's studies: every question, what to embed, the learner's own model, and what an index costs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import nn

from domain import study_domain
from library import Library, home, kept_folder, make_reader, open_library, own_model
from measures import grade_answers, measure_answers, ranking, sentence_scores, with_bounds, with_intervals
from names import EFFORTS, WINDOWS
from reading import study_quotes
from sentences import gaps, has_digit, named, sentence_of, talk_on, talks_on
from shared.adapters import LoRAConfig, add_lora
from shared.adapters.conversations import Conversation
from shared.adapters.instructions import Instructions, answer, template_for
from shared.assets import SUM_BYTES, is_whole, write_with_sum
from shared.course.workspace import Workspace
from shared.data.corpus import read_text
from shared.retrieval.documents import Chunk
from shared.retrieval.embedders import MiniLM
from shared.retrieval.index import Index
from shared.retrieval.ranking import bootstrap, rank_scores, recall_at
from shared.retrieval.splitting import split
from shared.retrieval.stores import VectorStore, make_store
from shared.runtime import RunLog, clock, table
from shared.tokenizers import gpt2_tokenizer
from shared.tokenizers.base import Tokenizer
from shared.training import Trainer
from talking import study_followups

if TYPE_CHECKING:
    from run import Settings

ASKING_VECTORS = 200
"""So many of the lines ask for the others."""


def study_answers(settings: "Settings", work: Workspace) -> dict[str, float]:
    """Every question is answered."""
    library = open_library(settings, work.device)
    every = settings if settings.preset == "smoke" else replace(settings, questions=None)
    reader = make_reader(settings, work.device, settings.smol_blocks)
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


# ---- the learner's own model


@dataclass(frozen=True)
class Parts:
    """The documents, divided: their names."""

    tested: list[str]
    validation: list[str]
    learned: list[str]

    @classmethod
    def of(cls, library: Library) -> "Parts":
        """Every second document is asked about; of the others most are learned from."""
        sources = sorted({chunk.source for chunk in library.chunks})
        tested, validation = sources[1::2], sources[::8]
        return cls(tested, validation, [s for s in sources if s not in tested and s not in validation])


class AnswerTable:
    """Answers of several models to the same questions: for each a log, a row of a table, and metrics."""

    def __init__(self, library: Library, asked: Sequence[dict], settings: "Settings", work: Workspace):
        self.library, self.asked = library, asked
        self.settings, self.work = settings, work
        self.rows: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}

    def add(self, name: str, label: str, replies: Sequence[str]) -> None:
        """Grades the replies. name: of the run in the logs. label: the same for people."""
        with self.work.log(f"{self.library.name}-own-{name}", self.settings) as log:
            right_kind = [
                has_digit(reply) == has_digit(question["answers"][0])
                for reply, question in zip(replies, self.asked)
            ]
            kind = np.mean(right_kind).item()
            scores = grade_answers(log, label, self.asked, replies, kind=kind)
        self.rows.append({"who": label} | with_intervals(scores) | {"of the right kind": kind})
        self.metrics |= {f"{name}_{key}": score.mean for key, score in scores.items()}


def study_own(settings: "Settings", work: Workspace) -> dict[str, float]:
    """Week 6's model learns, by LoRA, to answer from a sentence. It is asked about one half of the documents,
    learns from most of the other half, and is kept as it was best on the rest.
    """
    library = open_library(settings, work.device)
    parts = Parts.of(library)
    talks = talks_from(library, parts.learned, Random(settings.train.seed))
    asked = questions_on(library, parts.tested)
    if settings.preset == "smoke":
        asked = asked[:2]
    right = [sentence_of(library, question) for question in asked]
    answers = AnswerTable(library, asked, settings, work)
    by_rule = [next(named(sentence, q["question"]), "") for q, sentence in zip(asked, right)]
    answers.add("rule", "a rule: the first number or name", by_rule)
    model = own_model(settings).to(work.device)
    answers.add("untrained", "week 6's model as it is", answers_from(model, asked, right))
    validation = questions_on(library, parts.validation) or asked
    held_out = [talk_on(sentence_of(library, q), q["question"], q["answers"][0]) for q in validation]
    template, block_size = template_for(model.tokenizer), model.config.block_size
    task = Instructions(talks, held_out, template, block_size, f"sentences-{len(talks)}")
    with work.log(f"{library.name}-own-training", settings) as log:
        model, summary = train_adapters(model, task, log, settings, work)
        sizes = {part: len(documents) for part, documents in asdict(parts).items()}
        log.finish(examples=len(talks), **sizes, **summary)
    answers.add("without", "trained, without a sentence", answers_from(model, asked, [""] * len(asked)))
    nearest = [nearest_sentence(library.index, question["question"]) for question in asked]
    answers.add("retrieved", "trained, with the nearest sentence", answers_from(model, asked, nearest))
    answers.add("right", "trained, with the right sentence", answers_from(model, asked, right))
    reader = make_reader(settings, work.device, settings.smol_blocks)
    read = [reader.read(q["question"], [as_chunk(sentence)]).text for q, sentence in zip(asked, right)]
    answers.add("smollm2", "SmolLM2, with the right sentence", read)
    print(
        f"\n{len(talks)} examples; {len(asked)} questions on {len(parts.tested)} documents that none of"
        " them is from\n" + table(answers.rows)
    )
    return answers.metrics


def questions_on(library: Library, sources: Sequence[str]) -> list[dict[str, Any]]:
    """The questions that these documents answer."""
    return [question for question in library.asked if question["document"] in sources]


def talks_from(library: Library, sources: Sequence[str], chance: Random) -> list[Conversation]:
    """Examples from these documents: the questions on them, and gaps in their sentences."""
    talks: list[Conversation] = []
    for q in questions_on(library, sources):
        talks += talks_on(sentence_of(library, q), q["question"], q["answers"][0], chance)
    for chunk in library.chunks:
        if chunk.source in sources:
            talks += gaps(chunk, chance)
    return talks


def train_adapters(
    model: nn.Module, task: Instructions, log: RunLog, settings: "Settings", work: Workspace
) -> tuple[nn.Module, dict[str, float]]:
    """The model as it was best on what is held out, with adapters, and the training's summary."""
    torch.manual_seed(settings.train.seed)
    add_lora(model, LoRAConfig(r=32, lora_alpha=64.0, target_modules=("all-linear",))).to(work.device)
    config = replace(settings.train, block_size=task.block_size)
    print(f"own: {config.in_words()}")
    folder = work.checkpoints / "own"
    trainer = Trainer(model, task, config, log, folder, device=work.device, description="own")
    summary = trainer.fit(settings.resume)
    return trainer.take_best().eval(), summary


def answers_from(model: nn.Module, asked: Sequence[dict], sentences: Sequence[str]) -> list[str]:
    """What week 6's model answers to each question from a sentence of its own, in at most 24 tokens."""
    template = template_for(model.tokenizer)
    questions = [talk_on(sentence, q["question"], "?")[:1] for q, sentence in zip(asked, sentences)]
    return [answer(model, template, question, 24) for question in questions]


def nearest_sentence(index: Index, question: str) -> str:
    """Of the best chunk the sentence that is nearest to the question."""
    chunk = index.search(question, 1)[0].chunk
    return max(sentence_scores(index, question, chunk), key=lambda pair: pair[1])[0]


def as_chunk(sentence: str) -> Chunk:
    """A sentence under its headings as a passage for the reader."""
    headings, _, text = sentence.partition(". ")
    return Chunk("", headings, (), text)


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
    "quotes": study_quotes,
    "domain": study_domain,
    "followups": study_followups,
}
