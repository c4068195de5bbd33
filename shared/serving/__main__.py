"""Week 12. Serves a model from the command line.

    python -m shared.serving --page                    # your model of week 6, else of week 4, else SmolLM2; with a chat page
    python -m shared.serving --page --model smollm2 --documents weeks/11_rag/handbook
    python -m shared.serving --model checkpoints/04_mini_gpt/laptop/tinyshakespeare/headline/best --port 8001
    python -m shared.serving --model smollm2 --quantize int8 --adapters pirate=checkpoints/pirate

SIGTERM or Ctrl-C: no new texts are taken, those being written are finished within `--grace` seconds; a second
one stops at once.
"""

import asyncio
import hashlib
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import uvicorn
from fastapi import FastAPI

from shared.adapters.files import load_adapter
from shared.assets import cache_folder
from shared.commandline import errors_for_people, parse_args
from shared.course.workspace import output_root
from shared.models.gpt import GPT
from shared.models.pretrained import load_model
from shared.quantization.modules import num_bytes, quantize
from shared.runtime import pick_device
from shared.serving.api import create_app, describe_size
from shared.serving.engine import Engine, same_bits_in_every_row
from shared.serving.gate import Limits
from shared.tokenizers import Tokenizer, gpt2_tokenizer

if TYPE_CHECKING:
    from shared.retrieval.index import Index

SMALL = 40_000_000
"""Bytes of a model below which a product is over before a second core has begun: with one of 5 MB, one thread
is as fast as two, and leaves the other core to HTTP.
"""


@dataclass(frozen=True)
class Settings:
    """A server for one model and its adapters."""

    model: str = "own"
    """"own" (the checkpoint of week 6, else of week 4, else smollm2), "smollm2", a checkpoint's folder
    (quantized or not), or a Hugging Face model's folder or hub name.
    """
    name: str | None = None
    """What clients call it; the last part of --model if not given."""
    quantize: Literal["int8", "int4", "nf4"] | None = None
    """Round its weights first."""
    group_size: int | None = None
    """As in shared.quantization."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters, NAME=FOLDER each; clients ask for one as for a model."""
    page: bool = False
    """With a chat page at the server's address."""
    documents: str | None = None
    """A folder of documents (or one of them) that the page can answer from."""
    host: str = "127.0.0.1"
    """0.0.0.0 lets other machines in: then set a key."""
    port: int = 8000
    """0 takes any that is free."""
    api_key_variable: str = "LLM_WEEKS_API_KEY"
    """The environment variable with the key that clients must send; where it is not set, none is asked for.
    """
    api_key_file: str | None = None
    """A file with the key instead, such as a Docker secret."""
    slots: int = 8
    """Texts that are written at a time."""
    queue: int = 64
    """Requests that may wait."""
    max_length: int | None = None
    """Tokens of a prompt and its text; none: the model's block_size."""
    chunk: int = 32
    """Tokens of a prompt that are read at a time."""
    threads: int | None = None
    """Cores that compute; none: one for a small model, all for others."""
    grace: float = 30
    """Seconds for what is being written, after SIGTERM."""
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        problems = [f"adapters: {a!r} is not NAME=FOLDER" for a in self.adapters if not all(a.partition("="))]
        if not 0 <= self.port < 2**16:
            problems.append(f"port={self.port}: must be from 0 to 65535")
        if self.documents and not self.page:
            problems.append(f"documents={self.documents}: only the page answers from documents; add --page")
        if self.threads is not None and self.threads < 1:
            problems.append(f"threads={self.threads}: must be at least 1")
        if self.grace < 0:
            problems.append(f"grace={self.grace}: must be at least 0")
        if problems:
            raise ValueError("; ".join(problems))


class Server(uvicorn.Server):
    """Goes on listening after the first signal, so that those who ask hear that it shuts down, until its
    texts are finished or `grace` is over.
    """

    def __init__(self, config: uvicorn.Config, served: Engine, grace: float):
        super().__init__(config)
        self._served, self._grace = served, grace
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._deadline is not None:
            self.should_exit = self.force_exit = True
            return
        self._deadline = time.monotonic() + self._grace
        self._served.drain()
        print(
            f"{signal.Signals(sig).name}: finishing {self._served.busy + self._served.waiting} texts",
            file=sys.stderr,
            flush=True,
        )

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and not self.should_exit:
            late = time.monotonic() > self._deadline
            if late:
                await asyncio.to_thread(self._served.close)
            self.should_exit = late or self._served.wait_idle(0)
        return await super().on_tick(counter)


def own_checkpoint() -> tuple[str, Path] | None:
    """The newest week whose checkpoint is there, and the folder: a smoke run's only where there is no other.
    None if there is none.
    """
    root = output_root() / "checkpoints"
    found = [
        (topic, path)
        for topic, run in (("04_mini_gpt", "headline"), ("06_gpt2", "gpt2"))
        for path in (root / topic).glob(f"*/*/{run}/best")
    ]
    return max(
        found, key=lambda pair: ("smoke" not in pair[1].parts, pair[0], pair[1].stat().st_mtime), default=None
    )


def served_model(settings: Settings) -> tuple[GPT, Tokenizer]:
    """The model, quantized and with its adapters, and its tokenizer."""
    device = pick_device(settings.device)
    model = load_model(settings.model, device)
    if model.tokenizer is None:
        raise ValueError(
            f"{settings.model} comes without a tokenizer of ours: its ids cannot be turned into text"
        )
    if settings.quantize:
        quantize(model, settings.quantize, settings.group_size)
    for adapter in settings.adapters:
        name, _, path = adapter.partition("=")
        load_adapter(path, model, name)
    return model, model.tokenizer


def wanted_key(settings: Settings) -> str | None:
    """The key that clients must send, None where none is asked for. Raises ValueError for one that is empty:
    somebody meant there to be one.
    """
    if settings.api_key_file is None:
        where, key = settings.api_key_variable, os.environ.get(settings.api_key_variable)
    else:
        where = settings.api_key_file
        try:
            key = Path(where).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the API key cannot be read from {where}:"
                f" {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
            ) from None
    if key is not None and not key.strip():
        raise ValueError(
            f"{where} holds an empty API key: put a key there, or take the setting away for a server"
            " without one"
        )
    return key and key.strip()


def index_of(documents: str, device: torch.device | str = "cpu") -> "Index":
    """The documents of a folder, as week 11 cuts and embeds them. The index is kept in the cache: the next
    start embeds only what has changed.
    """
    try:
        from shared.retrieval.documents import chunk_documents, load_documents
        from shared.retrieval.embedders import MiniLM
        from shared.retrieval.index import Index
    except ImportError as error:
        raise ValueError(
            f"--documents needs the package {error.name}, which is not installed: pip install"
            " 'llm-weeks[rag]'"
        ) from None
    chunks = chunk_documents(load_documents(documents).documents, gpt2_tokenizer())
    said, path = (
        f"documents: {len({chunk.source for chunk in chunks})} files of {documents}, {len(chunks)} passages",
        Path(documents).resolve(),
    )
    try:
        cache = cache_folder()
    except ValueError as error:
        print(f"{said}, being embedded; the index is not kept: {error}", flush=True)
        index = Index(MiniLM(device))
        index.add(chunks)
        return index
    folder = cache / "indexes" / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    print(f"{said}; index in {folder}", flush=True)
    return Index.kept(folder, MiniLM(device), chunks)[0]


def make_app(settings: Settings) -> FastAPI:
    """The app, its engine waiting for requests; with `--page`, the page too."""
    name, source = os.path.basename(os.path.normpath(settings.model)), settings.model
    if source == "own":
        name, source = own_checkpoint() or ("smollm2", "smollm2")
        print(
            (
                "no checkpoint of weeks 4 and 6 yet: SmolLM2 instead"
                if name == "smollm2"
                else f"your own model: {source}"
            ),
            flush=True,
        )
    name, api_key = settings.name or name, wanted_key(settings)
    model, tokenizer = served_model(replace(settings, model=str(source)))
    index = index_of(settings.documents, pick_device(settings.device)) if settings.documents else None
    if threads := settings.threads or (1 if num_bytes(model) < SMALL else None):
        torch.set_num_threads(threads)
    app = create_app(
        model,
        tokenizer,
        name,
        settings.slots,
        settings.max_length,
        settings.chunk,
        settings.queue,
        settings.limits,
        api_key,
    )
    if settings.page:
        from shared.serving.page import add_page  # Gradio takes seconds to import

        add_page(app, index)
    print(
        f"model: {name} ({describe_size(model)}); threads: {torch.get_num_threads()}; API key:"
        f" {'asked for' if api_key else 'none'}; {'page and API' if settings.page else 'API'} at the address"
        " below"
    )
    return app


def main(settings: Settings) -> None:
    """Serves until a signal comes."""
    same_bits_in_every_row()
    # In a thread that ends: OpenMP keeps helpers for every thread that has computed, and where there are more
    # of them than cores, none waits awake for the next product any more. A step of a small model takes more
    # than twice as long then.
    with ThreadPoolExecutor(1) as maker:
        app = maker.submit(make_app, settings).result()
    config = uvicorn.Config(app, settings.host, settings.port, access_log=False, timeout_graceful_shutdown=5)
    try:
        Server(config, app.state.engine, settings.grace).run()
    finally:
        # a second signal leaves the app's own shutdown out, and Python aborts where a thread computes while
        # it ends
        app.state.engine.close()


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
