"""Week 11's --ask and --interactive: answers that are quoted, with their sources, for people."""

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from library import make_quoter, make_reader, open_library
from shared.devices import pick_device
from shared.retrieval.rag import RAG, Reply

if TYPE_CHECKING:
    from run import Settings


def converse(settings: "Settings") -> dict[str, float]:
    """Answers one question, or one after the other, with sources. Nothing is measured."""
    rag = open_rag(settings)
    if settings.ask:
        print_reply(rag.ask(settings.ask), settings.verbose)
        return {}
    print("Type a question and press Enter; an empty line ends.")
    earlier: list[str] = []
    while question := next_question():
        try:
            print_reply(rag.ask(question, earlier), settings.verbose)
            earlier.append(question)
        except ValueError as error:
            print(f"error: {error}")
    return {}


def open_rag(settings: "Settings") -> RAG:
    """What answers: a quoter, or with `--generate` a reader. Files that are left out are said on stderr."""
    say = print if settings.verbose else keep_quiet
    device = pick_device(settings.device, say)
    index = open_library(settings, device, say, partial(print, file=sys.stderr)).index
    whole = replace(settings, blocks=None)  # with fewer, what it answers makes no sense
    if settings.generate:
        reader = make_reader(whole, device, say)
    else:
        reader = make_quoter(whole, device)
    return RAG(index, reader, settings.k, settings.by, least_score=settings.min_score)


def keep_quiet(_: str) -> None:
    """Says nothing."""


def next_question() -> str:
    """What is typed; "" where the input ends."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def print_reply(reply: Reply, verbose: bool = False) -> None:
    """An answer, as it is written; then each source, and under it the sentences that the answer rests on."""
    for piece in reply:
        print(piece, end="", flush=True)
    print()
    for number, source in enumerate(reply.evidence, 1):
        score = f" (score {source.score:.2f})" if verbose else ""
        print(f"  [{number}] {source.chunk.cite}{score}")
        for quote in source.quotes:
            print(f'      "{" ".join(quote.split())}"')
    if verbose and reply.question:
        print(f"searched: {reply.question}")
    if verbose and reply.nearest is not None and reply.abstained:
        print(f"nearest: {reply.nearest.chunk.place} (score {reply.nearest.score:.2f})")
