"""Week 5: the GPT of week 4 reads tokens instead of characters.

Its tokenizer is trained first, on the same text.

    python weeks/05_bpe/run.py --preset laptop
    # characters and vocabularies of several sizes, at equal compute
    python weeks/05_bpe/run.py --preset laptop --study vocab
    # with your own train_bpe and BPE, as far as they are solved
    python weeks/05_bpe/run.py --preset laptop --mine

With --mine your `train_bpe` learns the merges, and your `BPE` decodes what the model writes; the course's
tokenizer does these merges on the text, for its speed. A `train_bpe` that counts all pairs anew for each
merge takes about a minute at the laptop preset, and a few seconds at the smoke preset.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from figures import draw
from shared.commandline import cli
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import TokenDataset, load_corpus, read_text, split_text
from shared.devices import pick_device
from shared.evaluation import known_words
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import clock
from shared.sampling import generate
from shared.tokenizers import BPETokenizer
from shared.training import TrainConfig
from studies import STUDIES, fit

SENTENCE = "To be, or not to be, that is the question: 1234567 antidisestablishmentarians and naïve 😀."


@dataclass(frozen=True)
class Settings(WeekSettings):
    ANSWERS_IN: ClassVar = ("run",)

    vocab_size: int = 1024
    """Of the tokenizer, the 256 bytes among them."""
    model: GPTConfig = GPTConfig.preset("mini")
    """Week 4's; its vocabulary is the tokenizer's."""
    train: TrainConfig = TrainConfig(
        steps=3600,
        batch_size=6,
        block_size=128,
        optimizer="muon",
        lr=0.006,
        muon_lr=0.02,
        muon_momentum=0.9,
        schedule="linear",
        warmup_steps=30,
        final_lr=0.0,
        weight_decay=0.2,
        beta2=0.95,
        grad_clip=0.0,
        eval_every=600,
        checkpoint_every=600,
    )
    vocab_sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Of the plot of compression, for which the text must have pairs enough; and for --study vocab, beside
    the text's characters.
    """
    study_steps: int = 700
    """For --study vocab: how many steps the model on characters gets; the others get as much compute."""
    sample_tokens: int = 1000
    """Of the text that the trained model writes."""
    study: Literal["vocab"] | None = None

    READ_BY: ClassVar = {
        "run": ("vocab_size", "sample_tokens"),
        "vocab": ("study_steps",),
    }

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        idle["model.vocab_size"] = "it is the tokenizer's"
        if self.study:
            idle["train.steps"] = "--study-steps gives them"
            idle["train.weight_decay"] = "runs so short have none"
            idle |= dict.fromkeys(("train.eval_every", "train.checkpoint_every"), "done at the end only")
        return idle


def smoke() -> Settings:
    """The settings that only show that everything runs."""
    s = Settings()
    return replace(
        s,
        preset="smoke",
        vocab_size=280,
        vocab_sizes=(256, 270),
        study_steps=20,
        sample_tokens=100,
        model=replace(s.model, n_layer=2, n_head=2, n_embd=16, block_size=32),
        train=replace(
            s.train,
            steps=30,
            batch_size=4,
            block_size=32,
            eval_every=10,
            eval_windows=20,
            checkpoint_every=10,
        ),
    )


PRESETS = {
    "smoke": smoke(),
    "laptop": Settings(),
    "gpu": Settings(
        preset="gpu",
        data="shakespeare",
        vocab_size=2048,
        model=GPTConfig.preset("mini", n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2),
        train=replace(
            Settings().train, steps=3000, batch_size=64, block_size=256, eval_every=250, checkpoint_every=250
        ),
    ),
}


def main(settings: Settings) -> dict[str, float]:
    """Trains a tokenizer on the training text and a model on its tokens, or runs the study.

    Returns the week's metrics.
    """
    device = pick_device(settings.device)
    name, text = read_text(settings.data)
    work = Workspace(__file__, settings, name, device)
    if settings.study:
        return STUDIES[settings.study](settings, text, work)
    train_text, val_text = split_text(text)
    held_out = np.frombuffer(val_text.encode(), np.uint8)
    TokenDataset(held_out, settings.train.block_size)  # what is too short for bytes is too short for tokens
    measured = compression(train_text, val_text, settings.vocab_sizes)
    started = clock()
    tokenizer = learned_tokenizer(train_text, settings.vocab_size, work.mine("train_bpe", None))
    tokenizer_seconds = clock() - started
    corpus = load_corpus(settings.data, tokenizer, settings.train.block_size)
    bytes_per_token = len(held_out) / len(corpus.val)
    print(
        f"tokenizer: {tokenizer.vocab_size} tokens in {tokenizer_seconds:.1f} s; {bytes_per_token:.2f} bytes"
        " of held-out text a token"
    )
    reader = work.mine("BPE", BPETokenizer)(tokenizer.merges)
    with work.log("bpe", settings) as log:
        result = fit(settings.model, settings.train, corpus, work, log, resume=settings.resume)
        model = GPT.from_checkpoint(work.checkpoints / "bpe" / "best", "cpu")
        ids = generate(model, corpus.start, settings.sample_tokens, temperature=0.8, seed=1)
        sample = reader.decode(list(ids))
        words = known_words(sample, train_text)
        tokens = [reader.decode([i]) for i in reader.encode(SENTENCE)]
        log.artifact(sample=sample[:1000], sentence=SENTENCE, tokens=tokens)
        log.artifact(compression=measured)
        log.finish(
            **result,
            known_words=words,
            bytes_per_token=bytes_per_token,
            vocab_size=tokenizer.vocab_size,
            tokenizer_seconds=tokenizer_seconds,
        )
    print(f"\nA sample of the GPT's text ({words:.0%} of its words occur in the text it learned):")
    print(sample[:400])
    return work.finish(
        {
            "bits_per_byte": result["best_val_bits_per_byte"],
            "val_loss": result["best_val_loss"],
            "accuracy": result["best_val_accuracy"],
            "perplexity": result["best_val_perplexity"],
            "bytes_per_token": bytes_per_token,
            "vocab_size": tokenizer.vocab_size,
            "first_loss": result["first_loss"],
            "ln_vocab_size": math.log(tokenizer.vocab_size),
            "known_words": words,
            "parameters": result["parameters"],
            "tokenizer_seconds": tokenizer_seconds,
            "train_seconds": result["seconds"],
            "wall_seconds": result["wall_seconds"],
        },
        draw,
    )


def learned_tokenizer(text: str, vocab_size: int, train_bpe: Callable | None) -> BPETokenizer:
    """A tokenizer with the merges that `train_bpe`, the learner's, finds in a text; None: the course's."""
    if train_bpe is None:
        return BPETokenizer.train(text, vocab_size)
    print(f"your train_bpe learns {vocab_size - 256:,} merges from {len(text):,} characters ...", flush=True)
    return BPETokenizer(train_bpe(text, vocab_size))


def compression(train_text: str, val_text: str, sizes: tuple[int, ...]) -> dict[str, list[float]]:
    """Bytes of held-out text per token, by vocabulary size.

    The first merges of a large tokenizer are those of a small one, so one training does.
    """
    merges = BPETokenizer.train(train_text, max(sizes)).merges
    text_bytes = len(val_text.encode())
    ratios = []
    for size in sizes:
        tokenizer = BPETokenizer(merges[: size - 256])
        ratios.append(text_bytes / len(tokenizer.encode(val_text)))
    return {"sizes": list(sizes), "bytes_per_token": ratios}


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
