"""What speculative decoding is worth: tokens for each forward pass, and time beside plain writing of the same
prompts, in turns, in one run.

    python benchmarks/speculation.py
    python benchmarks/speculation.py --quantize int8 --group-size 64 --k 4
    python benchmarks/speculation.py --model big --draft small        # a draft in the text's place
    python benchmarks/speculation.py --engine --temperature 0.8       # as the server writes one text

Four kinds of prompts: questions of week 11 with the passage that answers them, as `shared.retrieval.rag` asks
them; questions to an assistant; questions after a long text that they have nothing to do with; and code or a
text that the assistant is to write again. The texts must be the same with and without.
"""

import statistics
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

import shared.quantization.decoder  # noqa: F401 (reads with a GPT on a CPU)
from shared.checks import Checks
from shared.commandline import errors_for_people, parse_args
from shared.devices import device_name, device_of, pick_device
from shared.models.chat import chat_prompt
from shared.models.gpt import GPT
from shared.models.names import ModelName
from shared.models.pretrained import load_model
from shared.quantization import quantize
from shared.retrieval.documents import chunk_documents, load_documents
from shared.retrieval.rag import Reader, compose
from shared.retrieval.ranking import holds_answer
from shared.runtime import ROOT, clock, read_jsonl, table
from shared.sampling import Draft, Lookup, generate
from shared.sampling.speculation import Speculation
from shared.serving.engine import Engine
from shared.serving.generation import Request, Token
from shared.tokenizers.base import ends_of, tokenizer_of

WEEK_11 = ROOT / "weeks" / "11_rag"
QUESTIONS = (
    "Why is the sky blue?",
    "Give me three tips for sleeping better.",
    "What is the difference between a lake and a pond?",
    "Write a short poem about a lighthouse.",
)
LONG = 4000
"""Characters of a text that has nothing to do with the question after it."""
REWRITING = (
    """Write this function again with a docstring:

def mean(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(values)""",
    """Rename the variable x to price in this code:

x = 100
if x > 50:
    x = x - 10
elif x > 20:
    x = x - 5
else:
    x = x - 1
print(x)""",
    """Correct the spelling in this text:

The ship saled north for nine days before anyone on bord saw land, and when they did
it was not the coast that their maps had promissed.""",
    """Add one more record to this list:

[{"name": "Ada", "age": 36, "city": "London"},
 {"name": "Grace", "age": 45, "city": "New York"},
 {"name": "Alan", "age": 41, "city": "Manchester"}]""",
)


@dataclass(frozen=True)
class Settings:
    """Times writing with and without speculation."""

    model: ModelName = "smollm2"
    draft: ModelName | None = None
    """A model with the same vocabulary that proposes; none: what stands in the text already."""
    quantize: str | None = None
    """int8, int4 or nf4; none keeps the weights in fp32."""
    group_size: int | None = None
    k: int = 8
    """Tokens that are proposed at a time."""
    longest: int = 3
    shortest: int = 2
    tokens: int = 64
    """New ones for a prompt; an answer from a passage has 32 at most."""
    questions: int = 12
    turns: int = 3
    temperature: float = 0
    """0 is greedy."""
    engine: bool = False
    """Through the server's engine, which looks up as it does by default; else by `generate`."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "k", "tokens", "questions", "turns")
        checks.at_least(0, "temperature")
        checks.require(
            self.draft is None or not (self.engine or self.temperature),
            "draft: by `generate` and greedy only, where the text is the same",
        )
        checks.finish()


@dataclass(frozen=True)
class Task:
    """A prompt, and how its text ends."""

    ids: list[int]
    new: int
    ends: Collection[int]


def loaded(name: str, settings: Settings) -> GPT:
    """The model in fp32, or quantized."""
    model = load_model(name, device=pick_device("auto"), dtype=torch.float32)
    return quantize(model, settings.quantize, settings.group_size) if settings.quantize else model


def tasks_of(model: GPT, settings: Settings) -> dict[str, list[Task]]:
    """Prompts by kind."""
    tokenizer = tokenizer_of(model)
    reader = Reader(model)
    documents = load_documents(WEEK_11 / "handbook").documents
    chunks = chunk_documents(documents, tokenizer)
    asked = [question for question in read_jsonl(WEEK_11 / "questions.jsonl") if question["answers"]]
    answers = []
    for question in asked[:: max(1, len(asked) // settings.questions)][: settings.questions]:
        document = [chunk for chunk in chunks if chunk.source == question["document"]]
        passage = next(chunk for chunk in document if holds_answer(chunk.text, question["answers"]))
        prompt = compose(question["question"], [passage], tokenizer, reader.budget)
        answers.append(Task(prompt.ids, reader.max_new_tokens, reader.ends))
    ends = ends_of(tokenizer)
    long = ["\n\n".join(section.text for section in document.sections)[:LONG] for document in documents]

    def chats(texts: Sequence[str]) -> list[Task]:
        prompts = [chat_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
        return [Task(ids, settings.tokens, ends) for ids in prompts]

    return {
        "answers from a passage": answers,
        "questions": chats(QUESTIONS),
        "questions after a text": chats([f"{text}\n\n{asked}" for text, asked in zip(long, QUESTIONS)]),
        "writing it again": chats(REWRITING),
    }


class Writer(Protocol):
    """Writes texts with and without speculation."""

    def write(self, task: Task, seed: int, speculate: bool) -> tuple[list[int], float, float]:
        """The new tokens, and the seconds up to the first of them and after it."""
        ...

    def per_step(self) -> tuple[float, float]:
        """Tokens that were written in a step with speculation, and tokens that were proposed in it."""
        ...


class InLibrary(Writer):
    """By `generate`."""

    def __init__(self, model: GPT, speculate: Speculation, temperature: float):
        self._model = model
        self._speculate = speculate
        self._temperature = temperature

    def write(self, task: Task, seed: int, speculate: bool) -> tuple[list[int], float, float]:
        started = clock()
        drawn = generate(
            self._model,
            task.ids,
            task.new,
            self._temperature,
            stop=sorted(task.ends),
            seed=seed,
            speculate=self._speculate if speculate else None,
        )
        text = []
        first = started
        for token in drawn:
            if not text:
                first = clock()
            text.append(token)
        return text, first - started, clock() - first

    def per_step(self) -> tuple[float, float]:
        return self._speculate.tokens_per_step, self._speculate.proposed / self._speculate.steps


class InEngine(Writer):
    """By the server's engine, with no other text beside."""

    def __init__(self, model: GPT, longest: int, temperature: float):
        self._engines = {
            speculate: Engine(model, 1, max_length=longest, speculate=speculate, start=False)
            for speculate in (False, True)
        }
        self._temperature = temperature

    def write(self, task: Task, seed: int, speculate: bool) -> tuple[list[int], float, float]:
        engine = self._engines[speculate]
        text: list[int] = []
        times = [clock()]

        def listen(token: Token | None) -> None:
            times.append(clock())
            if token is not None:
                text.append(token.id)

        stop = sorted(task.ends)
        engine.submit(
            Request(task.ids, task.new, temperature=self._temperature, stop=stop, seed=seed), listen
        )
        while engine.step():
            pass
        return text, times[1] - times[0], times[-1] - times[1]

    def per_step(self) -> tuple[float, float]:
        engine = self._engines[True]
        steps = engine.generated_tokens - engine.accepted_tokens
        return engine.generated_tokens / steps, engine.proposed_tokens / steps


def measured(writer: Writer, tasks: list[Task], turns: int) -> dict[str, object]:
    """A row of the table. Raises ValueError for a text that is another one with speculation."""
    whole, writing = [], []
    tokens = 0
    writer.write(tasks[0], 0, True)  # what is only done once
    for turn in range(turns):
        plain = [0.0, 0.0]
        fast = [0.0, 0.0]
        for number, task in enumerate(tasks):
            seed = turn * len(tasks) + number
            expected, *plain_seconds = writer.write(task, seed, False)
            text, *seconds = writer.write(task, seed, True)
            if text != expected:
                raise ValueError(f"with speculation the text is another one: {text} and {expected}")
            tokens += len(text)
            plain = [a + b for a, b in zip(plain, plain_seconds)]
            fast = [a + b for a, b in zip(fast, seconds)]
        whole.append(sum(plain) / sum(fast))
        writing.append(plain[1] / fast[1])
    per_step, proposed = writer.per_step()
    return {
        "texts": len(tasks),
        "tokens": tokens // turns,
        "tokens/step": per_step,
        "proposed/step": proposed,
        "times as fast": statistics.median(whole),
        "after the prompt": f"{statistics.median(writing):.2f} ({min(writing):.2f} to {max(writing):.2f})",
    }


def main(settings: Settings) -> None:
    """Prints a table."""
    model = loaded(settings.model, settings)
    draft = loaded(settings.draft, settings) if settings.draft else None

    def writer(tasks: list[Task]) -> Writer:
        if settings.engine:
            longest = max(len(task.ids) + task.new for task in tasks)
            return InEngine(model, longest, settings.temperature)
        if draft is not None:
            return InLibrary(model, Draft(draft, settings.k), settings.temperature)
        lookup = Lookup(settings.k, longest=settings.longest, shortest=settings.shortest)
        return InLibrary(model, lookup, settings.temperature)

    rows = []
    for kind, tasks in tasks_of(model, settings).items():
        rows.append({"prompts": kind} | measured(writer(tasks), tasks, settings.turns))
    row = {"model": settings.quantize or "fp32", "temperature": settings.temperature, "turns": settings.turns}
    print("; ".join([device_name(device_of(model)), *(f"{name} {value}" for name, value in row.items())]))
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
