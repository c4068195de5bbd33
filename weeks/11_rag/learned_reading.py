"""Week 11's study of week 6's model, which learns to answer from one sentence: by the copying task, and by
examples from the handbook's own pages.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from copying import made_up, row_to_copy
from library import Library, make_reader, open_library, own_model
from measures import grade_answers, sentence_scores, with_intervals
from sentences import gaps, has_digit, named, sentence_of, talk_on, talks_on
from shared.adapters.conversations import Conversation
from shared.adapters.instructions import Instructions, answer, template_for
from shared.course.workspace import Workspace
from shared.devices import device_of
from shared.models.gpt import GPT
from shared.models.names import model_label, run_slug
from shared.retrieval.documents import Chunk
from shared.retrieval.index import Index
from shared.retrieval.quoting import ROOM, SpanForm, ends_of_quotes, write_span
from shared.runtime import RunLog, table
from shared.training import Trainer

if TYPE_CHECKING:
    from run import Settings


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
    """Week 6's model learns to answer from a sentence, by a span of it. It is asked about one half of the
    documents, learns from most of the other half, and is kept as it was best on the rest.
    """
    library = open_library(settings, work.device)
    parts = Parts.of(library)
    asked = questions_on(library, parts.tested)
    if settings.preset == "smoke":
        asked = asked[:2]
    right = [sentence_of(library, question) for question in asked]
    nearest = [nearest_sentence(library.index, question["question"]) for question in asked]
    answers = AnswerTable(library, asked, settings, work)
    by_rule = [next(named(sentence, q["question"]), "") for q, sentence in zip(asked, right)]
    answers.add("rule", "a rule: the first number or name", by_rule)
    base = own_model(settings).to(work.device)
    answers.add("untrained", "week 6's model as it is", quotes_from(base, asked, right))
    chance = Random(settings.train.seed)
    examples = talks_from(library, parts.learned, chance)
    facts = [copied(talk_on(*made_up(chance))) for _ in range(settings.facts)]
    validation = questions_on(library, parts.validation) or asked
    held_out = [copied(talk_on(sentence_of(library, q), q["question"], q["answers"][0])) for q in validation]
    rows = [row_to_copy(chance) for _ in range(settings.rows)]
    repeats = [copied(talk_on(row, "Copy.", row)) for row in rows]
    apart = max(1, min(len(repeats), len(facts)) // 80)

    def learned(base: GPT, name: str, talks: list[Conversation], held_out: list[Conversation]) -> GPT:
        with work.log(f"{library.name}-own-{name}-training", settings) as log:
            return learn(base, (talks, held_out), log, settings, work)

    def answered(model: GPT, name: str, label: str) -> None:
        answers.add(name, label, quotes_from(model, asked, right))
        free = written_from(model, asked, right)
        answers.add(f"{name}-written", f"{label}; free to write", free)

    answered(learned(base, "examples", examples, held_out), "examples", "trained on the pages' examples")
    copier = learned(base, "copying", repeats[apart:], repeats[:apart])
    model = learned(copier, "copied", examples, held_out)
    answered(model, "copied", "trained to copy, then on the pages' examples")
    with_facts = learned(copier, "facts", examples + facts[apart:], facts[:apart])
    answered(with_facts, "facts", "trained to copy, then on made-up facts and the examples")
    label = "trained to copy, then on the pages' examples, with the nearest sentence"
    answers.add("retrieved", label, quotes_from(model, asked, nearest))
    reader = make_reader(settings, work.device)
    read = [reader.read(q["question"], [as_chunk(sentence)]).text for q, sentence in zip(asked, right)]
    answers.add(run_slug(settings.model), f"{model_label(settings.model)}, with the right sentence", read)
    print(
        f"\n{len(examples)} examples, {len(facts)} made-up facts, {len(repeats)} rows to copy; {len(asked)}"
        f" questions on {len(parts.tested)} documents that none of them is from\n" + table(answers.rows)
    )
    return answers.metrics


# ---- what is learned


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
    return [copied(talk) for talk in talks]


def copied(talk: Conversation) -> Conversation:
    """With a space before the answer, as in the sentence: so both have the same tokens, and one can be copied
    from the other.
    """
    question, reply = talk
    return [question, {**reply, "content": f" {reply['content']}"}]


def learn(
    base: GPT,
    talks: tuple[list[Conversation], list[Conversation]],
    log: RunLog,
    settings: "Settings",
    work: Workspace,
) -> GPT:
    """A copy of the model, of which all weights are trained, as it was best on what is held out.

    talks: what is learned, and what is held out.
    """
    model = deepcopy(base)
    template, block_size = template_for(model.tokenizer), model.config.block_size
    task = Instructions(*talks, template, block_size, f"sentences-{len(talks[0])}", truncate=True)
    config = replace(settings.train, block_size=block_size)
    print(f"{log.folder.name}: {config.in_words()}")
    trainer = Trainer(
        model, task, config, log, work.checkpoints / log.folder.name, device=work.device, description="own"
    )
    summary = trainer.fit(settings.resume)
    log.finish(examples=len(talks[0]), held_out=len(talks[1]), **summary)
    return trainer.take_best().eval()


# ---- what is answered


def quotes_from(model: GPT, asked: Sequence[dict], sentences: Sequence[str]) -> list[str]:
    """What week 6's model answers to each question from a sentence of its own: a span of it."""
    pairs = tqdm(list(zip(asked, sentences)), desc="quoted", leave=False)
    return [quote(model, sentence, question["question"]) for question, sentence in pairs]


@torch.inference_mode()
def quote(model: GPT, sentence: str, question: str) -> str:
    """The span of the sentence, without its headings, that the model writes after the question. Of a prompt
    that leaves no room for an answer, the end is read.
    """
    _, _, text = sentence.partition(". ")
    form = SpanForm(text, model.tokenizer, ends_of_quotes(model.tokenizer))
    ids = template_for(model.tokenizer).prompt(talk_on(sentence, question, "?")[:1])
    ids = ids[ROOM - model.config.block_size :]
    cache = model.new_cache(max_length=len(ids) + ROOM)
    logits = model(torch.tensor([ids], device=device_of(model)), cache)[0, -1].float()
    write_span(model, form, logits, cache)
    start, end = form.place or (0, 0)
    return text[start:end]


def written_from(model: GPT, asked: Sequence[dict], sentences: Sequence[str]) -> list[str]:
    """The same in any words, in at most 24 tokens."""
    template = template_for(model.tokenizer)
    questions = [talk_on(sentence, q["question"], "?")[:1] for q, sentence in zip(asked, sentences)]
    return [answer(model, template, question, 24).strip() for question in questions]


def nearest_sentence(index: Index, question: str) -> str:
    """Of the best chunk the sentence that is nearest to the question."""
    chunk = index.search(question, 1)[0].chunk
    return max(sentence_scores(index, question, chunk), key=lambda pair: pair[1])[0]


def as_chunk(sentence: str) -> Chunk:
    """A sentence under its headings as a passage for the reader."""
    headings, _, text = sentence.partition(". ")
    return Chunk("", headings, (), text)
