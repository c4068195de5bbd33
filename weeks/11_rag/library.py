"""Week 11's documents and the questions on them, their index, and the models that find and answer."""

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from shared.checkpoint import unshared
from shared.course.runs import output_root
from shared.data.corpus import named_by_content
from shared.models.gpt import GPT
from shared.models.pretrained import load_model
from shared.quantization import quantize
from shared.retrieval.documents import Chunk, chunk_documents, load_documents
from shared.retrieval.embedders import HiddenStates, MiniLM
from shared.retrieval.index import Index
from shared.retrieval.quoting import Quoter
from shared.retrieval.rag import Reader
from shared.retrieval.ranking import holds_answer
from shared.retrieval.stores import make_store
from shared.runtime import read_jsonl, write_atomically
from shared.tokenizers import Tokenizer, gpt2_tokenizer
from shared.training.base_model import trained_base_model

if TYPE_CHECKING:
    from run import Settings

HERE = Path(__file__).parent
Place = tuple[str, str | None]
"""Where something stands: file and section; no section: anywhere in the file."""
SECTION = re.compile(r"^(\S.*)\n([*=~-])\2{2,}\n", flags=re.MULTILINE)
"""A heading in Python's reference, and the mark that underlines it."""
UNDERLINES = {"*": 1, "=": 2, "-": 3, "~": 4}
"""These marks, with the headings' levels."""


@dataclass(frozen=True)
class Library:
    """Documents, ready to be asked."""

    name: str
    chunks: list[Chunk]
    index: Index
    asked: list[dict[str, Any]]
    """Questions with their "answers" and the "document" and "section" that these stand in (no section:
    anywhere in the document).
    """
    unanswerable: list[dict[str, Any]]

    def right(self, question: dict[str, Any]) -> Chunk:
        """The passage that the answer stands in."""
        there = [chunk for chunk in self.chunks if place(chunk, question) == home(question)]
        return next((chunk for chunk in there if holds_answer(chunk.text, question["answers"])), there[0])


def home(question: dict[str, Any]) -> Place:
    """Where the answer stands."""
    return question["document"], question["section"]


def place(chunk: Chunk, question: dict[str, Any]) -> Place:
    """Where a chunk stands, as closely as the question knows."""
    if chunk.headings and question["section"]:
        return chunk.source, chunk.headings[-1]
    return chunk.source, None


def open_library(
    settings: "Settings",
    device: torch.device,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = print,
) -> Library:
    """The folder's chunks and its index, which is kept beside the checkpoints and brought up to date.

    say: told how many there are. warn: told which files are left out.
    """
    path = documents_folder(settings)
    documents = load_documents(path, warn).documents[: settings.documents]
    chunks = chunk_documents(documents, gpt2_tokenizer(), settings.size, settings.overlap, settings.window)
    name = path.resolve().name
    embedder = MiniLM(device) if settings.embedder == "minilm" else own_embedder(settings, device)
    embedder_name = re.sub(r"[^\w.]+", "-", embedder.name)
    kept_as = name
    if settings.data not in ("handbook", "python"):  # two folders of one name have an index each
        kept_as = named_by_content(name, str(path.resolve()).encode())
    usual_folder = kept_folder(settings) / f"index-{kept_as}-{embedder_name}-{settings.store}"
    folder = Path(settings.index or usual_folder)
    index, changes = Index.kept(
        folder, embedder, chunks, lambda: make_store(settings.store, embedder.dim), warn
    )
    changed = ", ".join(f"{len(sources)} {change}" for change, sources in changes.items())
    say(f"{len(documents)} documents, {len(chunks)} chunks, {len(index.store)} windows; {changed}")
    asked, unanswerable = read_questions(settings.data, chunks)
    return Library(name, chunks, index, asked, unanswerable)


def kept_folder(settings: "Settings") -> Path:
    """Where the week keeps what took long to make."""
    return output_root() / "checkpoints" / "11_rag" / settings.preset


def documents_folder(settings: "Settings") -> Path:
    """The documents of `--data`. Python's reference is written first, for the version that is running."""
    if settings.data == "handbook":
        return HERE / "handbook"
    if settings.data == "python":
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        folder = kept_folder(settings) / version / "python"
        write_python_reference(folder)
        return folder
    return Path(settings.data)


def write_python_reference(folder: Path) -> None:
    """The language reference that comes with every Python, a page of HTML for each topic: its text is not
    Markdown, where __debug__ would be debug in bold. A section that stands in several topics (most of the
    long ones repeat shorter ones) is kept in the shortest.
    """
    from pydoc_data.topics import topics

    seen = set()
    for topic, text in sorted(topics.items(), key=lambda pair: len(pair[1])):
        before, *sections = SECTION.split(text)  # of each section heading, mark and body, in turns
        written = [f"<pre>{escape(before)}</pre>"] if before.strip() else []
        for heading, mark, body in zip(sections[0::3], sections[1::3], sections[2::3]):
            words = tuple(body.split())
            if words and words in seen:
                continue
            seen.add(words)
            level = UNDERLINES[mark]
            written.append(f"<h{level}>{escape(heading)}</h{level}>\n<pre>{escape(body)}</pre>")
        if written:
            write_atomically(folder / f"{topic}.html", "\n".join(written))


def read_questions(data: str, chunks: Sequence[Chunk]) -> tuple[list[dict], list[dict]]:
    """Those that these chunks answer, and those that no document does."""
    if data == "handbook":
        questions = read_jsonl(HERE / "questions.jsonl")
    elif data == "python":
        rows = read_jsonl(HERE / "python_questions.jsonl")
        questions = [row | {"document": f"{row['topic']}.html", "section": None} for row in rows]
    else:
        return [], []
    sources = {chunk.source for chunk in chunks}
    answerable = [question for question in questions if question["document"] in sources]
    return answerable, [question for question in questions if not question["document"]]


# ---- models


def own_embedder(settings: "Settings", device: torch.device) -> HiddenStates:
    """The hidden states of week 6's model, named by its weights: trained anew, it is another embedder."""
    model = own_model(settings)
    weights = hashlib.sha256(save(unshared(model.cpu()))).hexdigest()[:8]
    name = f"week 6, {settings.preset}, {settings.text}, {weights}"
    return HiddenStates(model.to(device), model.tokenizer, name)


def own_model(settings: "Settings") -> GPT:
    """Week 6's model, trained first where it is not there."""
    return trained_base_model(settings.preset, data=settings.text, device=settings.device)[0]


def load_reading(settings: "Settings") -> tuple[GPT, Tokenizer]:
    """`--model` on the CPU in float32, and its tokenizer. A base model does here: it goes on from a text."""
    model = load_model(settings.model, "cpu", torch.float32, blocks=settings.blocks)
    if model.tokenizer is None:
        raise ValueError(f"{settings.model} has no tokenizer of ours: its ids cannot be turned into text")
    return model, model.tokenizer


def make_reader(settings: "Settings", device: torch.device, say: Callable[[str], None] = print) -> Reader:
    """`--model` as a reader; on a CPU in int8, which writes several times as fast."""
    model, tokenizer = load_reading(settings)
    if device.type == "cpu":
        quantize(model, "int8", group_size=64, say=say)
    return Reader(model.to(device), tokenizer, settings.max_new_tokens, settings.min_gain)


def make_quoter(settings: "Settings", device: torch.device, sentences: int | None = None) -> Quoter:
    """`--model` as a quoter, in float32: most of the work is reading, where int8 is no faster.

    sentences: how many are ranked anew; None: the settings'.
    """
    model, tokenizer = load_reading(settings)
    return Quoter(model.to(device), tokenizer, sentences or settings.sentences)
