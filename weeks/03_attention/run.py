"""Week 3: attention against the fixed window, at equal parameters and equal steps.

python weeks/03_attention/run.py --preset laptop
# with your own MultiHeadAttention in it, once it is solved
python weeks/03_attention/run.py --preset laptop --mine
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from figures import draw
from shared.commandline import cli
from shared.course.exercise.building import computed_by
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import Corpus, load_corpus
from shared.devices import pick_device
from shared.evaluation import known_words
from shared.models.attention import AttentionLM, AttentionLMConfig, attention_maps
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.sampling import generate
from shared.training import TrainConfig, Trainer

PHRASE = "ROMEO:\nIt is the east, and Juliet is the sun."


@dataclass(frozen=True)
class Settings(WeekSettings):
    ANSWERS_IN: ClassVar = ("run",)

    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 64
    n_hidden: int = 256
    train: TrainConfig = TrainConfig(
        steps=1500,
        batch_size=64,
        block_size=64,
        optimizer="muon",
        lr=3e-3,
        warmup_steps=50,
        final_lr=0.05,
        weight_decay=0.01,
        eval_every=250,
    )
    sample_tokens: int = 2000
    """Of the text that the trained model writes."""


PRESETS = {
    "smoke": Settings(
        preset="smoke",
        n_layer=2,
        n_head=2,
        n_embd=16,
        n_hidden=32,
        sample_tokens=200,
        train=TrainConfig(
            steps=40, batch_size=8, block_size=48, optimizer="muon", lr=3e-3, eval_every=20, eval_windows=20
        ),
    ),
    "laptop": Settings(preset="laptop"),
    "gpu": Settings(preset="gpu"),
}


def main(settings: Settings) -> dict[str, float]:
    """Trains both models alike, and keeps what the attention heads look at. Returns the week's figures."""
    device = pick_device(settings.device)
    corpus = load_corpus(settings.data, block_size=settings.train.block_size)
    work = Workspace(__file__, settings, corpus.name, device)
    tokenizer = corpus.tokenizer
    train = settings.train
    config = AttentionLMConfig(
        tokenizer.vocab_size,
        train.block_size,
        settings.n_layer,
        settings.n_head,
        settings.n_embd,
        settings.n_hidden,
    )

    torch.manual_seed(train.seed)
    model = AttentionLM(config)
    window = equal_mlp(model, tokenizer.vocab_size)
    hers = work.mine("MultiHeadAttention", None)
    if hers is not None:
        for layer in model.layers:
            computed_by(layer, hers(settings.n_embd, settings.n_head))
    results = {}
    for name, candidate in (("attention", model), ("window-mlp", window)):
        with work.log(name, settings) as log:
            folder = work.checkpoints / name
            trainer = Trainer(candidate, corpus, train, log, folder, device=device, description=name)
            results[name] = log.finish(**trainer.fit(settings.resume))
            if name == "attention":
                model.cpu()
                text = tokenizer.decode(list(generate(model, corpus.start, settings.sample_tokens, seed=1)))
                words = known_words(text, tokenizer.decode(corpus.train.tolist()))
                phrase = tokenizer.decode(corpus.val[: train.block_size].tolist())
                if set(PHRASE) <= set(tokenizer.chars):
                    phrase = PHRASE[: train.block_size]
                log.artifact(
                    sample=text[:400], known_words=words, tokens=phrase, attention=look(model, corpus, phrase)
                )

    print(
        f"\nA sample of the attention model's text ({words:.0%} of its words occur in the text it"
        f" learned):\n{text[:300]}"
    )
    ours, mlp = results["attention"], results["window-mlp"]
    return work.finish(
        {
            "bits_per_byte": ours["val_bits_per_byte"],
            "val_loss": ours["val_loss"],
            "window_mlp_val_loss": mlp["val_loss"],
            "accuracy": ours["val_accuracy"],
            "first_loss": ours["first_loss"],
            "ln_vocab_size": math.log(tokenizer.vocab_size),
            "known_words": words,
            "parameters": ours["parameters"],
            "window_mlp_parameters": mlp["parameters"],
            "train_seconds": ours["seconds"],
        },
        draw,
    )


def equal_mlp(model: AttentionLM, vocab_size: int, window: int = 8) -> WindowMLP:
    """Week 2's model with as many parameters as `model`, or the nearest number below, by the width of its
    hidden layer.
    """
    budget = sum(p.numel() for p in model.parameters())
    n_embd = 32
    fixed = (vocab_size + 1 + window) * n_embd + vocab_size  # embeddings and the output's bias
    n_hidden = (budget - fixed) // (window * n_embd + 1 + vocab_size)
    return WindowMLP(WindowMLPConfig(vocab_size, window, n_embd, max(1, n_hidden)))


def look(model: AttentionLM, corpus: Corpus, phrase: str) -> list:
    """Attention weights on a phrase: a list of layers, of heads, of rows."""
    idx = torch.tensor([corpus.tokenizer.encode(phrase)])
    return [layer[0] for layer in attention_maps(model, idx)]


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
