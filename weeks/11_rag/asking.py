"""Week 11's --ask and --interactive: answers with sources, for people."""

from typing import TYPE_CHECKING

import torch

from library import make_reader, open_library
from shared.retrieval.rag import RAG, Reply

if TYPE_CHECKING:
    from run import Settings


def converse(settings: "Settings", device: torch.device) -> dict[str, float]:
    """Answers one question, or one after the other, with sources. Nothing is measured."""
    index = open_library(settings, device).index
    rag = RAG(index, make_reader(settings, device), settings.k, settings.by, min_score=settings.min_score)
    if settings.ask:
        print_reply(rag.ask(settings.ask))
        return {}
    print("Type a question and press Enter; an empty line ends.")
    while question := next_question():
        try:
            print_reply(rag.ask(question))
        except ValueError as error:
            print(f"error: {error}")
    return {}


def next_question() -> str:
    """What is typed; "" where the input ends."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def print_reply(reply: Reply) -> None:
    """An answer, as it is written, and then its sources."""
    for piece in reply:
        print(piece, end="", flush=True)
    print("".join(f"\n  [{number}] {source}" for number, source in enumerate(reply.sources, 1)))
