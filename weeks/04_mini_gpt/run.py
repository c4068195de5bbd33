"""Week 4: a mini-GPT, by two recipes: the classic one (GPT-2's) and a modern one (Llama's blocks, Muon).

The best loss in five minutes is the headline; studies compare the recipes and their ingredients.

    # the headline; with --mine, computed by the GPT that you wrote
    python weeks/04_mini_gpt/run.py --preset laptop
    # classic against modern at one size, to a fixed loss
    python weeks/04_mini_gpt/run.py --preset laptop --study speedrun
    # a row for each ingredient of the modern recipe
    python weeks/04_mini_gpt/run.py --preset laptop --study ablation
    # the headline with more seeds
    python weeks/04_mini_gpt/run.py --preset laptop --study seeds
    # the headline's checkpoint, writing with the KV cache and without
    python weeks/04_mini_gpt/run.py --preset laptop --study cache
    # the modern recipe's model in texts longer than those that it was trained on
    python weeks/04_mini_gpt/run.py --preset laptop --study length
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch

from figures import draw
from own import with_own_code
from shared.commandline import cli
from shared.course.exercise import Week
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import load_corpus
from shared.devices import pick_device
from shared.evaluation import known_words
from shared.models.attention import attention_maps
from shared.models.gpt import GPT, GPTConfig
from shared.sampling import generate
from shared.training import TrainConfig
from studies import EVALUATIONS, STUDIES, TRIALS, WINDOWS, Recipe, train

TARGET = 1.886  # what nanoGPT's CPU recipe reaches on tinyshakespeare
PHRASE = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


# nanoGPT's model, with AdamW's rate and schedule tuned for this target as the modern recipe's were. Both are
# computed by PyTorch alone: recipes are compared here, not what kernels in C bring to each.
CLASSIC = Recipe(
    GPTConfig.preset("nano"),
    TrainConfig(
        steps=1200,
        batch_size=12,
        block_size=64,
        lr=4e-3,
        schedule="linear",
        warmup_steps=50,
        final_lr=0.0,
        beta2=0.99,
        eval_every=100,
        checkpoint_every=2500,
        fused=False,
    ),
)
MODERN = Recipe(
    GPTConfig.preset("mini", n_layer=4, block_size=64),
    TrainConfig(
        steps=205,
        batch_size=12,
        block_size=64,
        optimizer="muon",
        lr=0.012,
        muon_lr=0.02,
        muon_momentum=0.9,
        schedule="linear",
        warmup_steps=10,
        final_lr=0.0,
        weight_decay=0.0,
        beta2=0.95,
        grad_clip=0.0,
        eval_every=10,
        checkpoint_every=1000,
        fused=False,
    ),
)


@dataclass(frozen=True)
class Settings(WeekSettings):
    ANSWERS_IN: ClassVar = ("run",)

    model: GPTConfig = GPTConfig.preset("mini", block_size=256)
    """The headline's model; its vocabulary is the text's."""
    train: TrainConfig = TrainConfig(
        steps=3600,
        batch_size=3,
        block_size=256,
        optimizer="muon",
        lr=0.006,
        muon_lr=0.02,
        muon_momentum=0.9,
        schedule="linear",
        warmup_steps=30,
        final_lr=0.0,
        weight_decay=0.05,
        beta2=0.95,
        grad_clip=0.0,
        eval_every=900,
        checkpoint_every=900,
    )
    classic: Recipe = CLASSIC
    """For --study speedrun."""
    modern: Recipe = MODERN
    """For --study speedrun and --study ablation."""
    target: float = TARGET
    """The validation loss that --study speedrun waits for."""
    trials: int = 6
    """How many settings of each recipe --study speedrun tries, at most 6."""
    seeds: tuple[int, ...] = (1, 2)
    """For --study seeds and --study speedrun, beside the headline's own."""
    sample_tokens: int = 2000
    """Of the text that the trained model writes."""
    study: Literal["speedrun", "ablation", "seeds", "cache", "length"] | None = None

    READ_BY: ClassVar = {
        "run": ("model", "train", "resume", "sample_tokens"),
        "speedrun": ("classic", "modern", "target", "trials", "seeds", "resume"),
        "ablation": ("modern", "resume"),
        "seeds": ("model", "train", "seeds", "resume"),
        "cache": (),
        "length": ("modern", "resume"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.trials <= len(TRIALS):
            raise ValueError(f"trials={self.trials}: must be from 1 to {len(TRIALS)}")

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        for group in ("", "classic.", "modern."):
            idle[f"{group}model.vocab_size"] = "it is the text's"
        if self.study == "seeds":
            idle["train.seed"] = "--seeds gives them"
        if self.study == "speedrun":
            for recipe in ("classic", "modern"):
                idle[f"{recipe}.train.eval_every"] = f"it is measured {EVALUATIONS} times"
                idle[f"{recipe}.train.eval_windows"] = f"it is measured on {WINDOWS} windows"
        if self.study in ("ablation", "length"):
            idle["modern.train.eval_every"] = "it is measured at the end"
        return idle


def smoke() -> Settings:
    """The settings that only show that everything runs."""
    tiny = dict(n_layer=2, n_head=2, n_embd=16, block_size=32)
    short = dict(steps=30, batch_size=4, block_size=32, warmup_steps=3)
    often = dict(eval_every=10, eval_windows=20, checkpoint_every=10)

    def shrink(recipe: Recipe) -> Recipe:
        return Recipe(replace(recipe.model, **tiny), replace(recipe.train, **short, **often))

    s = Settings()
    headline = shrink(Recipe(s.model, s.train))
    return replace(
        s,
        preset="smoke",
        model=headline.model,
        train=headline.train,
        classic=shrink(s.classic),
        modern=shrink(s.modern),
        target=3.5,
        trials=2,
        seeds=(1,),
        sample_tokens=200,
    )


PRESETS = {
    "smoke": smoke(),
    "laptop": Settings(),
    "gpu": Settings(
        preset="gpu",
        model=GPTConfig.preset("mini", n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2),
        train=replace(
            Settings().train, steps=3000, batch_size=64, block_size=256, eval_every=250, checkpoint_every=250
        ),
    ),
}


def main(settings: Settings) -> dict[str, float]:
    """Trains the headline model, or runs a study. Returns the week's figures."""
    device = pick_device(settings.device)
    corpus = load_corpus(settings.data, block_size=settings.train.block_size)
    work = Workspace(__file__, settings, corpus.name, device)
    if settings.study:
        return STUDIES[settings.study](settings, corpus, work)
    tokenizer = corpus.tokenizer
    with work.log("headline", settings) as log:
        recipe = Recipe(settings.model, settings.train)
        own = own_code(work)
        result = train(recipe, corpus, work, log, "GPT", resume=settings.resume, prepare=own)
        model = GPT.from_checkpoint(work.checkpoints / "headline" / "best", "cpu")
        ids = generate(model, corpus.start, settings.sample_tokens, temperature=0.8, seed=1)
        text = tokenizer.decode(list(ids))
        words = known_words(text, tokenizer.decode(corpus.train.tolist()))
        phrase = tokenizer.encode(PHRASE) if set(PHRASE) <= set(tokenizer.chars) else corpus.val.tolist()
        prompt = phrase[: model.config.block_size // 2]
        maps = [m[0] for m in attention_maps(model, torch.tensor([prompt]))]
        log.artifact(sample=text[:600], known_words=words, attention=maps, tokens=tokenizer.decode(prompt))
        log.finish(**result, known_words=words)

    print(
        f"\nA sample of the GPT's text ({words:.0%} of its words occur in the text it learned):\n{text[:400]}"
    )
    return work.finish(
        {
            "bits_per_byte": result["best_val_bits_per_byte"],
            "val_loss": result["best_val_loss"],
            "accuracy": result["best_val_accuracy"],
            "perplexity": result["best_val_perplexity"],
            "first_loss": result["first_loss"],
            "ln_vocab_size": math.log(tokenizer.vocab_size),
            "known_words": words,
            "parameters": result["parameters"],
            "train_seconds": result["seconds"],
            "wall_seconds": result["wall_seconds"],
        },
        draw,
    )


def own_code(work: Workspace) -> Callable[[GPT], GPT] | None:
    """With --mine: what makes a model compute with the learner's code, once her `MiniGPT` is solved."""
    gpt = work.mine("MiniGPT", None)
    if gpt is None:
        return None
    exercises = Week(4).exercises
    block = work.mine("Block", exercises["Block"].reference)
    rotate = work.mine("rotate", exercises["rotate"].reference)
    return partial(with_own_code, gpt=gpt, block=block, rotate=rotate)


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
