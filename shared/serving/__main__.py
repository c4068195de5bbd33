"""Week 12. Serves a model from the command line.

    python -m shared.serving --page     # your model of week 6, else of week 4, else SmolLM2; with a chat page
    python -m shared.serving --page --model smollm2 --documents weeks/11_rag/handbook
    python -m shared.serving --model checkpoints/04_mini_gpt/laptop/tinyshakespeare/headline/best --port 8001
    python -m shared.serving --model smollm2 --quantize int8 --adapters pirate=checkpoints/pirate
    python -m shared.serving chat --model smollm2      # no server: a conversation in this terminal

SIGTERM or Ctrl-C: no new texts are taken, those being written are finished within `--grace` seconds; a second
one stops at once.
"""

import asyncio
import codecs
import hashlib
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from shared.assets import cache_folder
from shared.checks import Checks
from shared.commandline import errors_for_people, parse_args
from shared.devices import pick_device
from shared.extras import needs
from shared.models.gpt import GPT
from shared.models.names import OwnModelName
from shared.quantization.modules import num_bytes
from shared.serving import chat
from shared.serving.api import CompletionServer, describe_size
from shared.serving.chat import ChatSettings, chat_in_terminal
from shared.serving.connections import punctual
from shared.serving.engine import Engine
from shared.serving.gate import Limits
from shared.serving.loading import Scheme, load_served
from shared.serving.reading import same_bits_in_every_row
from shared.serving.sites import SiteRules
from shared.tokenizers import Tokenizer, gpt2_tokenizer
from shared.training.own_model import name_and_source

if TYPE_CHECKING:
    from shared.retrieval.embedders import Embedder
    from shared.retrieval.index import Index

with needs("serve"):
    import uvicorn

SMALL_MODEL = 40_000_000
"""Bytes of a model whose matrix products are over before a second core has begun. With a model of 5 MB one
thread is as fast as two, and leaves the other core to HTTP.
"""


@dataclass(frozen=True)
class Settings:
    """A server for one model and its adapters."""

    model: OwnModelName = "own"
    name: str | None = None
    """What clients call it; the last part of --model if not given."""
    quantize: Scheme = "none"
    """Round its weights first; auto: to 8 bits on a CPU, where they are read faster."""
    group_size: int | None = None
    """As in shared.quantization."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters, NAME=FOLDER each; clients ask for one as for a model."""
    page: bool = False
    """With a chat page at the server's address."""
    documents: str | None = None
    """A folder of documents (or one of them) that the page can answer from, and the API: a chat names the
    folder as its `collection`.
    """
    embeddings: Literal["minilm", "own"] | None = None
    """What answers /v1/embeddings: MiniLM, or the mean of the served model's own last hidden states."""
    host: str = "127.0.0.1"
    """0.0.0.0 lets other machines in: then set a key."""
    port: int = 8000
    """0 takes any that is free."""
    api_key_variable: str = "LLM_WEEKS_API_KEY"
    """The environment variable with the key that clients must send; not set: none is asked for."""
    api_key_file: str | None = None
    """A file with the key instead, such as a Docker secret."""
    hosts: tuple[str, ...] = ()
    """Names, beside localhost and IP addresses, by which a server without a key may be called."""
    origins: tuple[str, ...] = ()
    """Web sites whose pages may use the API, such as https://chat.example.org; none: only its own page."""
    slots: int = 8
    """Texts that are written at a time."""
    queue: int = 64
    """Requests that may wait."""
    max_length: int | None = None
    """Tokens of a prompt and its text; none: the model's block_size."""
    chunk: int = 32
    """Tokens of a prompt that are read at a time."""
    speculate: bool = True
    """Write a text that is alone in fewer steps where it repeats what stands in it; it stays the same."""
    threads: int | None = None
    """Cores that compute; none: one for a small model, all for others."""
    grace: float = 30
    """Seconds for what is being written, after SIGTERM."""
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        checks = Checks(self)
        for adapter in self.adapters:
            name, _, folder = adapter.partition("=")
            checks.require(bool(name and folder), f"adapters: {adapter!r} is not NAME=FOLDER")
        checks.between(0, 2**16 - 1, "port")
        checks.require(
            self.embeddings != "own" or not self.adapters,
            "embeddings=own: not beside adapters, which the model wears for one text and not for the next;"
            " take --embeddings minilm",
        )
        try:
            SiteRules(self.hosts, self.origins, has_key=False)
        except ValueError as error:
            checks.require(False, str(error))
        checks.at_least(1, "threads")
        checks.at_least(0, "grace")
        checks.finish()


class GracefulServer(uvicorn.Server):
    """After the first signal it still listens, so that clients are told that it shuts down, until the engine
    has finished its texts or `grace` seconds are over.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float):
        super().__init__(config)
        self._engine = engine
        self._grace = grace
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called by uvicorn for a signal."""
        if self._deadline is not None:
            self.should_exit = True
            self.force_exit = True
            return
        self._deadline = time.monotonic() + self._grace
        self._engine.drain()
        texts = self._engine.busy + self._engine.waiting
        print(f"{signal.Signals(sig).name}: finishing {texts} texts", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn several times a second. Returns whether to stop."""
        if self._deadline is not None and not self.should_exit:
            late = time.monotonic() > self._deadline
            if late:
                await asyncio.to_thread(self._engine.close)
            self.should_exit = late or self._engine.wait_idle(0)
        return await super().on_tick(counter)


def wanted_key(settings: Settings) -> str | None:
    """The key that clients must send, None where none is asked for.

    Raises ValueError for an empty key: whoever sets one does not mean a server that is open to all.
    """
    if settings.api_key_file is None:
        source = settings.api_key_variable
        key = os.environ.get(source)
    else:
        source = settings.api_key_file
        key = _read_key(source)
    if key is None:
        return None
    if not key.strip():
        raise ValueError(
            f"{source} holds an empty API key: put a key there, or take the setting away for a server"
            " without one"
        )
    return key.strip()


def _read_key(path: str) -> str:
    try:
        data = Path(path).read_bytes()
        # Editors and shells of Windows put a byte order mark before a text, and PowerShell writes UTF-16.
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except OSError as error:
        reason = error.strerror or str(error)
    raise ValueError(f"the API key cannot be read from {path}: {reason}")


def index_of(documents: str, device: torch.device | str = "cpu") -> "Index":
    """The documents of a folder, as week 11 cuts and embeds them.

    The index is kept in the cache: the next start embeds only what has changed.
    """
    try:
        from shared.retrieval.documents import chunk_documents, load_documents
        from shared.retrieval.embedders import MiniLM
        from shared.retrieval.index import Index
    except ImportError as error:
        raise ValueError(f"--documents: {error}") from None
    chunks = chunk_documents(load_documents(documents).documents, gpt2_tokenizer())
    files = len({chunk.source for chunk in chunks})
    size = f"documents: {files} files of {documents}, {len(chunks)} passages"
    try:
        cache = cache_folder()
    except ValueError as error:
        print(f"{size}, being embedded; the index is not kept: {error}", flush=True)
        index = Index(MiniLM(device))
        index.add(chunks)
        return index
    path = Path(documents).resolve()
    folder = cache / "indexes" / f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
    print(f"{size}; index in {folder}", flush=True)
    index, _ = Index.kept(folder, MiniLM(device), chunks)
    return index


def collection_name(documents: str) -> str:
    """What clients call the documents of a folder, or of a file: its name without the suffix."""
    return Path(documents).resolve().stem


def embedders_of(settings: Settings, name: str, model: GPT, tokenizer: Tokenizer) -> dict[str, "Embedder"]:
    """What `--embeddings` asks for, by the names that clients use. name: of the served model."""
    if settings.embeddings is None:
        return {}
    try:
        from shared.retrieval.embedders import HiddenStates, MiniLM
    except ImportError as error:
        raise ValueError(f"--embeddings: {error}") from None
    if settings.embeddings == "own":
        return {name: HiddenStates(model, tokenizer, name)}
    return {MiniLM.name: MiniLM(pick_device(settings.device))}


def make_server(settings: Settings) -> CompletionServer:
    """The server, its engine waiting for requests; with `--page`, the page too."""
    name, source = name_and_source(settings.model)
    name = settings.name or name
    api_key = wanted_key(settings)
    model, tokenizer = load_served(
        source,
        scheme=settings.quantize,
        group_size=settings.group_size,
        adapters=settings.adapters,
        device=settings.device,
    )
    index = index_of(settings.documents, pick_device(settings.device)) if settings.documents else None
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    elif num_bytes(model) < SMALL_MODEL:
        torch.set_num_threads(1)
    engine = Engine(
        model,
        settings.slots,
        max_length=settings.max_length,
        chunk=settings.chunk,
        queue=settings.queue,
        speculate=settings.speculate,
    )
    server = CompletionServer(
        engine,
        tokenizer,
        name=name,
        limits=settings.limits,
        api_key=api_key,
        hosts=settings.hosts,
        origins=settings.origins,
        embedders=embedders_of(settings, name, model, tokenizer),
        collections={} if index is None else {collection_name(settings.documents or ""): index},
    )
    if settings.page:
        from shared.serving.page import add_page  # Gradio takes seconds to import

        add_page(server, index)
    print(
        f"model: {name} ({describe_size(model)}); threads: {torch.get_num_threads()}; API key:"
        f" {'asked for' if api_key else 'none'}; {'page and API' if settings.page else 'API'} at the address"
        " below"
    )
    return server


def main(settings: Settings) -> None:
    """Serves until a signal comes."""
    same_bits_in_every_row()
    # In a thread that ends: OpenMP keeps helper threads for every thread that has computed. Where there are
    # more of them than cores, they no longer wait actively for the next product, and a step of a small model
    # takes more than twice as long.
    with ThreadPoolExecutor(1) as maker:
        server = maker.submit(make_server, settings).result()
    config = uvicorn.Config(
        server.app,
        settings.host,
        settings.port,
        http=punctual(settings.limits),
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    try:
        GracefulServer(config, server.engine, settings.grace).run()
    finally:
        # A second signal skips the app's own shutdown, and Python aborts where a thread computes at its exit.
        server.engine.close()


if __name__ == "__main__":
    with errors_for_people():
        if sys.argv[1:2] == ["chat"]:
            chat_in_terminal(parse_args(ChatSettings, sys.argv[2:], chat.__doc__))
        else:
            main(parse_args(Settings, sys.argv[1:], __doc__))
