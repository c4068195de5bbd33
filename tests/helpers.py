"""What several test files share."""

import random
import threading
import unicodedata
from collections.abc import Callable
from contextlib import contextmanager

import torch
import uvicorn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def synthetic_text(words: int = 3000) -> str:
    """Thirty words in random order: about 17,000 characters in which there is something to learn."""
    draw = random.Random(7)
    known = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 8))) for _ in range(30)]
    return " ".join(draw.choice(known) + draw.choice(["", "", "", ",", ".\n"]) for _ in range(words))


@contextmanager
def serving(app, **options):
    """Serves `app` on a free port; yields its address. options: more of uvicorn's."""
    config = uvicorn.Config(app, "127.0.0.1", 0, log_level="error", timeout_graceful_shutdown=5, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random values in every parameter, in place.

    They are large enough that attention is far from uniform and that no norm or bias is at its neutral value.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(0.15 * noise if p.dim() >= 2 else p + 0.15 * noise)
    return model.eval()


ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cs", "Cn")]
EVERYTHING = [*ASSIGNED, "\uffff", "\U0010ffff", "\u0378"]
WORDS = ["the", " the", "hello", "ROMEO:", " antidisestablishmentarianism", "naïve"]
CONTRACTIONS = ["don't", "I'LL", "'ve", "'S"]
ALPHABETS = {
    "any code point": EVERYTHING,
    "ASCII": [chr(c) for c in range(128)],
    "controls": [c for c in EVERYTHING[:0x3000] if unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp")],
    "combining": [c for c in EVERYTHING[:0x2000] if unicodedata.category(c) in ("Mn", "Mc")] + list("aeiou"),
    "emoji": [chr(c) for c in range(0x1F300, 0x1FAFF)] + ["\u200d", "\ufe0f", "\U0001f3fd"],
    "scripts": list("аящĀßſΩחשعربी中文字ひカ한글ไทย"),
    "digits": list("0123456789٣५²½Ⅷ"),
    "signs": list("'\".,;:!?-—()[]{}<>@#$%^&*_+=|\\/~`£€"),
    "words": WORDS + CONTRACTIONS,
    "spaces": [" ", "  ", " " * 7, " " * 40, "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\x1c", "\x85"],
}


def fuzz(count: int, seed: int) -> list[str]:
    """Random strings of up to 24 parts, each drawn from one to four of the alphabets."""
    draw = random.Random(seed)
    names = list(ALPHABETS)
    strings = []
    for _ in range(count):
        mixed = [ALPHABETS[name] for name in draw.choices(names, k=draw.randint(1, 4))]
        strings.append("".join(draw.choice(draw.choice(mixed)) for _ in range(draw.randint(0, 24))))
    return strings


class _Made(TorchDispatchMode):
    """Inside, counts the bytes of tensors that get memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {_pointer(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and _pointer(tensor) not in known:
                self.sizes.append(tensor.nbytes)
        return result


def _pointer(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


def made(work: Callable[[], object]) -> list[int]:
    """The bytes of each tensor that `work()` makes anew."""
    with _Made() as counted:
        work()
    return counted.sizes
