"""Week 1: the bigram model, by counting and by gradient descent.

python weeks/01_bigram/run.py --preset laptop
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from figures import draw
from shared.commandline import cli
from shared.course.exercise.building import computed_by
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import Corpus, load_corpus
from shared.devices import pick_device
from shared.evaluation import evaluate, known_words
from shared.models.bigram import BigramConfig, BigramModel, bigram_probabilities, count_bigrams
from shared.sampling import generate
from shared.training import TrainConfig, Trainer


@dataclass(frozen=True)
class Settings(WeekSettings):
    ANSWERS_IN: ClassVar = ("run",)

    smoothing: float = 1.0
    """Added to every count, so that a pair never seen stays possible."""
    train: TrainConfig = TrainConfig(
        steps=1500,
        batch_size=64,
        block_size=64,
        lr=0.1,
        schedule="linear",
        final_lr=0.0,
        weight_decay=0.0,
        grad_clip=0.0,
        eval_every=100,
    )
    sample_tokens: int = 2000
    """Of the text that the trained model writes."""


PRESETS = {
    "smoke": Settings(
        preset="smoke",
        train=TrainConfig(
            steps=60, batch_size=16, block_size=32, lr=0.1, weight_decay=0.0, eval_every=20, eval_windows=50
        ),
        sample_tokens=200,
    ),
    "laptop": Settings(preset="laptop"),
    "gpu": Settings(preset="gpu"),
}


def main(settings: Settings) -> dict[str, float]:
    """Counts, trains, compares, samples. Returns the week's figures."""
    device = pick_device(settings.device)
    corpus = load_corpus(settings.data, block_size=settings.train.block_size)
    work = Workspace(__file__, settings, corpus.name, device)
    tokenizer = corpus.tokenizer
    train = settings.train

    with work.log("counts", settings) as log:
        counts = work.mine("count_pairs", count_bigrams)(corpus.train, tokenizer.vocab_size)
        probabilities = work.mine("row_probabilities", bigram_probabilities)(counts, settings.smoothing)
        counted = BigramModel.from_probabilities(probabilities)
        result = evaluate(counted, corpus.val, train.block_size, corpus.token_bytes)
        log.artifact(counts=counts, chars=tokenizer.chars, sample=sample_text(counted, corpus))
        by_counting = log.finish(**result.as_metrics(), pairs_never_seen=int((counts == 0).sum()))

    with work.log("network", settings) as log:
        model = BigramModel(BigramConfig(tokenizer.vocab_size))
        hers = work.mine("Bigram", None)
        if hers is not None:
            computed_by(model, hers(tokenizer.vocab_size))
        folder = work.checkpoints / "network"
        trainer = Trainer(model, corpus, train, log, folder, device=device, description="bigram network")
        by_training = log.finish(**trainer.fit(settings.resume))
        text = sample_text(model, corpus, settings.sample_tokens)
        words = known_words(text, tokenizer.decode(corpus.train.tolist()))
        log.artifact(sample=text[:400], known_words=words)

    print(
        f"\nA sample of the bigram's text ({words:.0%} of its words occur in the text it"
        f" learned):\n{text[:300]}"
    )
    return work.finish(
        {
            "bits_per_byte": by_training["val_bits_per_byte"],
            "val_loss": by_training["val_loss"],
            "counts_val_loss": by_counting["val_loss"],
            "network_minus_counts": by_training["val_loss"] - by_counting["val_loss"],
            "first_loss": by_training["first_loss"],
            "ln_vocab_size": math.log(tokenizer.vocab_size),
            "accuracy": by_training["val_accuracy"],
            "known_words": words,
        },
        draw,
    )


def sample_text(model: BigramModel, corpus: Corpus, length: int = 300) -> str:
    return corpus.tokenizer.decode(list(generate(model, corpus.start, length, seed=1)))


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
