"""Week 11: retrieval. A folder of documents that no model has read about, found in four ways and answered
from.

    # how well it finds, and how well it answers; with SmolLM2, or with another model in all that reads
    python weeks/11_rag/run.py --preset laptop
    python weeks/11_rag/run.py --preset laptop --study answers --model gemma3-270m
    # the same, with your own search by words and your own fusion of rankings
    python weeks/11_rag/run.py --preset laptop --mine
    python weeks/11_rag/run.py --ask "When does the last ferry leave?"
    # your own documents, question after question
    python weeks/11_rag/run.py --data path/to/folder --interactive
    # the same measurements on Python's language reference
    python weeks/11_rag/run.py --data python
    # every question, not a sample
    python weeks/11_rag/run.py --study answers
    # what to embed, chosen on one half of the handbook, measured on the other
    python weeks/11_rag/run.py --study windows
    # recall against latency and bytes, 100,000 vectors
    python weeks/11_rag/run.py --study index
    # week 6's model learns to answer from a sentence
    python weeks/11_rag/run.py --study own
    # sentences ranked anew, answers that quote
    python weeks/11_rag/run.py --study quotes
    # how many passages or sentences to look at
    python weeks/11_rag/run.py --study depths --questions 80
    # questions about the world are refused
    python weeks/11_rag/run.py --study domain
    # "And for how long?"
    python weeks/11_rag/run.py --study followups
"""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from asking import converse
from figures import draw
from library import open_library
from measures import measure_library
from shared.checks import Checks
from shared.commandline import cli
from shared.course.workspace import WeekSettings, Workspace
from shared.devices import pick_device
from shared.models.names import ModelName
from shared.retrieval.stores import STORES
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, open_corpus
from studies import STUDIES

FINDING = ("documents", "size", "overlap", "window", "embedder", "store", "index", "data")
MODEL = ("model", "blocks")
WRITING = ("max_new_tokens", "min_gain")
ANSWERING = (*MODEL, *WRITING)


@dataclass(frozen=True)
class Settings(WeekSettings):
    ANSWERS_IN: ClassVar = ("run",)

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
    min_score: float | None = None
    """Questions whose best passage has a lower score are refused. None: MiniLM's threshold for --ask and
    --interactive (`--study domain`), and none where answers are measured.
    """
    min_gain: float | None = None
    """Answers that the passage makes less likely than this, in nats per token, are not given."""
    model: ModelName = "smollm2"
    blocks: int | None = None
    """Of --model only the first so many blocks, to see in seconds that everything runs; None takes all. So do
    --ask and --interactive.
    """
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
        steps=700,
        batch_size=8,
        block_size=256,
        lr=2e-3,
        schedule="linear",
        final_lr=0.0,
        warmup_steps=40,
        weight_decay=0.0,
        eval_every=100,
        checkpoint_every=100,
    )
    """How week 6's model learns to answer, for --study own."""
    rows: int = 8000
    """Rows of things that it learns to copy first, for --study own."""
    facts: int = 12_000
    """Questions on made-up facts, for --study own."""
    ask: str | None = None
    """Answer this and end: the answer, its source, the quoted sentence."""
    generate: bool = False
    """For --ask and --interactive: the model writes the answer from the best passages, and quotes nothing."""
    verbose: bool = False
    """For --ask and --interactive: with settings, scores and what was searched."""
    interactive: bool = False
    """Answer what is typed, until an empty line."""
    sentences: int = 5
    """So many of the nearest sentences are ranked anew before the answer is quoted."""
    study: Literal["answers", "windows", "index", "own", "quotes", "depths", "domain", "followups"] | None = (
        None
    )

    READ_BY: ClassVar = {
        "run": (*FINDING, *ANSWERING, "by", "k", "min_score", "questions", "illustrated"),
        "answers": (*FINDING, *ANSWERING, "by", "k", "min_score", "questions"),
        "windows": FINDING,
        "quotes": (*FINDING, *MODEL, "sentences"),
        "depths": (*FINDING, *ANSWERING, "by", "questions"),
        "domain": FINDING,
        "followups": (*FINDING, *MODEL),
        "index": ("vectors",),
        "own": (*FINDING, *ANSWERING, "train", "rows", "facts", "resume"),
    }

    def idle(self) -> dict[str, str]:
        if self.ask or self.interactive:
            why = "--ask and --interactive measure nothing"
            read = {*FINDING, *MODEL, "min_score", "device", "ask", "interactive", "generate", "verbose"}
            read |= {*WRITING, "by", "k"} if self.generate else {"sentences"}
            if self.embedder == "own":
                read.add("text")
            idle = {field.name: why for field in fields(self) if field.name not in read}
            if not self.generate:
                idle |= dict.fromkeys((*WRITING, "by", "k"), "the answer is quoted: it is for --generate")
        else:
            idle = super().idle()
            idle |= dict.fromkeys(("generate", "verbose"), "it is for --ask and --interactive")
        if self.ask:
            idle["interactive"] = "--ask answers one question and ends"
        if self.study == "answers" and self.preset != "smoke":
            idle["questions"] = "all are answered"
        if self.study == "own":
            idle["train.block_size"] = "it is the model's"
            idle["train.eval_windows"] = "all that is held out is measured"
        return idle

    @property
    def quiet(self) -> bool:
        """Whether only answers are printed."""
        return bool(self.ask or self.interactive) and not self.verbose

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = Checks(self)
        stores = ", ".join(STORES)
        checks.require(self.store in STORES, f"no store is called {self.store!r}; there are: {stores}")
        checks.at_least(1, "documents", "k", "max_new_tokens", "questions", "sentences")
        checks.at_least(256, "vectors")  # from which pq learns its 256 codes
        checks.finish()


PRESETS = {
    "smoke": Settings(
        preset="smoke",
        documents=3,
        questions=2,
        vectors=256,
        rows=8,
        facts=8,
        max_new_tokens=8,
        blocks=1,
        illustrated="Which dogs are exempt?",
        train=replace(Settings().train, steps=3, eval_every=2, checkpoint_every=2, warmup_steps=1),
    ),
    "laptop": Settings(),
    "gpu": Settings(preset="gpu", questions=None, vectors=190_000),
}


def main(settings: Settings) -> dict[str, float]:
    """Measures retrieval and answers; or answers what is asked; or runs a study. Returns the metrics."""
    if settings.ask or settings.interactive:
        return converse(settings)
    device = pick_device(settings.device)
    if settings.data not in ("handbook", "python"):
        raise ValueError(
            f"there are no questions with known answers on {settings.data}: use --ask or --interactive"
        )
    text = open_corpus(replace(BASE_PRESETS[settings.preset], data=settings.text)).name
    work = Workspace(__file__, settings, text, device)
    if settings.study:
        metrics = STUDIES[settings.study](settings, work)
    else:
        metrics = measure_library(settings, work, open_library(settings, device))
    if settings.study or settings.data != "handbook" or settings.model != "smollm2":
        draw(work.logs, work.reports)
        return metrics
    return work.finish(metrics, draw)


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
