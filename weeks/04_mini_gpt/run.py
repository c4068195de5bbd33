"""Week 4: a mini-GPT, by two recipes: the classic one (GPT-2's) and a modern one (Llama's blocks, Muon).

python weeks/04_mini_gpt/run.py --preset laptop                     # the headline: the best loss in five minutes
python weeks/04_mini_gpt/run.py --preset laptop --study speedrun    # classic against modern at one size, to a fixed loss
python weeks/04_mini_gpt/run.py --preset laptop --study ablation    # a row for each ingredient of the modern recipe
python weeks/04_mini_gpt/run.py --preset laptop --study seeds       # the headline with more seeds
python weeks/04_mini_gpt/run.py --preset laptop --study cache       # the headline's checkpoint, writing with the KV cache and without
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from figures import ABLATIONS, draw

from shared.commandline import cli
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import Corpus, load_corpus
from shared.evaluation import known_words
from shared.models.attention import attention_maps
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import RunLog, clock, pick_device, table
from shared.sampling import generate
from shared.training import TrainConfig, Trainer

TARGET = 1.886  # what nanoGPT's CPU recipe reaches on tinyshakespeare
PHRASE = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


@dataclass(frozen=True)
class Recipe:
    model: GPTConfig
    train: TrainConfig


CLASSIC = Recipe(
    GPTConfig.preset("nano"),
    TrainConfig(
        steps=2500,
        batch_size=12,
        block_size=64,
        lr=1e-3,
        warmup_steps=100,
        final_lr=0.1,
        beta2=0.99,
        eval_every=100,
        checkpoint_every=2500,
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
    ),
)


@dataclass(frozen=True)
class Settings(WeekSettings):
    model: GPTConfig = GPTConfig.preset("mini")
    """The headline's model; its vocabulary is the text's."""
    train: TrainConfig = TrainConfig(
        steps=2600,
        batch_size=6,
        block_size=128,
        optimizer="muon",
        lr=0.006,
        muon_lr=0.02,
        muon_momentum=0.9,
        schedule="linear",
        warmup_steps=30,
        final_lr=0.0,
        weight_decay=0.0,
        beta2=0.95,
        grad_clip=0.0,
        eval_every=520,
        checkpoint_every=520,
    )
    classic: Recipe = CLASSIC
    """For --study speedrun."""
    modern: Recipe = MODERN
    """For --study speedrun and --study ablation."""
    target: float = TARGET
    """The validation loss that --study speedrun waits for."""
    seeds: tuple[int, ...] = (1, 2)
    """For --study seeds, beside the headline's own."""
    study: Literal["speedrun", "ablation", "seeds", "cache"] | None = None


def smoke() -> Settings:
    tiny = dict(n_layer=2, n_head=2, n_embd=16, block_size=32)
    short = dict(steps=30, batch_size=4, block_size=32, eval_every=10, eval_windows=20, checkpoint_every=10)
    s = Settings()
    shrink = lambda recipe: Recipe(replace(recipe.model, **tiny), replace(recipe.train, **short))
    return replace(
        s,
        preset="smoke",
        model=replace(s.model, **tiny),
        train=replace(s.train, **short),
        classic=shrink(s.classic),
        modern=shrink(s.modern),
        target=4.1,
        seeds=(1,),
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
        return {
            "speedrun": study_speedrun,
            "ablation": study_ablation,
            "seeds": study_seeds,
            "cache": study_cache,
        }[settings.study](settings, corpus, work)

    tokenizer = corpus.tokenizer
    with work.log("headline", settings) as log:
        result = train(Recipe(settings.model, settings.train), corpus, work, log, "GPT", settings.resume)
        model = GPT.from_checkpoint(work.checkpoints / "headline" / "best")
        ids = generate(model, corpus.start, 2000, temperature=0.8, seed=1)
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


def train(
    recipe: Recipe, corpus: Corpus, work: Workspace, log: RunLog, name: str, resume: bool = False
) -> dict[str, float]:
    """Trains one recipe; its summary, with `wall_seconds` for everything from the first step to the last
    evaluation.
    """
    started = clock()
    torch.manual_seed(recipe.train.seed)
    model = GPT(
        replace(
            recipe.model,
            vocab_size=corpus.tokenizer.vocab_size,
            block_size=max(recipe.model.block_size, recipe.train.block_size),
        )
    )
    folder = work.checkpoints / log.folder.name
    trainer = Trainer(model, corpus, recipe.train, log, folder, device=work.device, description=name)
    return {**trainer.fit(resume), "wall_seconds": clock() - started}


def study_cache(settings: Settings, corpus: Corpus, work: Workspace) -> dict[str, float]:
    """Greedy characters per second with the KV cache and without, from the headline's checkpoint. The text
    must be the same.
    """
    model = GPT.from_checkpoint(work.checkpoints / "headline" / "best")
    prompt = corpus.val[: model.config.block_size // 8].tolist()
    speed, drawn = {}, []
    for use_cache in (True, False):
        list(
            generate(model, prompt, 4, temperature=0, use_cache=use_cache)
        )  # the first calls set up what later ones reuse
        started = clock()
        drawn.append(
            list(
                generate(
                    model, prompt, model.config.block_size - len(prompt), temperature=0, use_cache=use_cache
                )
            )
        )
        speed["tokens_per_second_cached" if use_cache else "tokens_per_second_uncached"] = len(drawn[-1]) / (
            clock() - started
        )
    assert drawn[0] == drawn[1], "the KV cache changed the text"
    with work.log("cache", settings) as log:
        print("\n" + table([log.finish(**speed)]))
    return speed


def study_speedrun(settings: Settings, corpus: Corpus, work: Workspace) -> dict[str, float]:
    """Both recipes at one model size, until the whole validation split's loss is at most the target.
    Evaluation is not on the clock.
    """
    rows, reached = [], {}
    for name, recipe in (("classic", settings.classic), ("modern", settings.modern)):
        with work.log(name, settings) as log:
            result = train(recipe, corpus, work, log, name, settings.resume)
            row = next((r for r in log.rows() if r.get("val_loss", math.inf) <= settings.target), None)
            reached[name] = row["seconds"] if row else None
            at = {
                "target": settings.target,
                "target_step": row and row["step"],
                "target_seconds": row and row["seconds"],
            }
            log.finish(**result, **at)
        rows.append(
            {
                "recipe": name,
                "step": at["target_step"],
                "seconds": at["target_seconds"],
                "last loss": result["val_loss"],
            }
        )
    print(f"\nTo a validation loss of {settings.target}:\n{table(rows)}")
    draw(work.logs, work.reports)
    missed = [name for name, seconds in reached.items() if seconds is None]
    if missed:
        print(f"{' and '.join(missed)} did not get there: more steps, or a higher --target")
        return {}
    ratio = reached["classic"] / reached["modern"]
    with work.log("speedrun", settings) as log:
        log.finish(ratio=ratio, **{f"{n}_seconds": s for n, s in reached.items()})
    print(f"\nmodern is {ratio:.1f} times faster")
    return {"ratio": ratio, **reached}


def study_ablation(settings: Settings, corpus: Corpus, work: Workspace) -> dict[str, float]:
    """The modern recipe with one ingredient exchanged for the classic one at a time, at the same number of
    steps.
    """
    losses = {}
    for name, (model, how) in ABLATIONS.items():
        with work.log("ablation-" + name.replace(",", "").replace(" ", "-"), settings) as log:
            recipe = Recipe(
                replace(settings.modern.model, **model),
                replace(settings.modern.train, eval_every=settings.modern.train.steps, **how),
            )
            result = log.finish(**train(recipe, corpus, work, log, name, settings.resume), name=name)
            losses[name] = result["val_loss"]
    print(
        "\n"
        + table(
            [{"recipe": n, "validation loss": v, "worse by": v - losses["modern"]} for n, v in losses.items()]
        )
    )
    draw(work.logs, work.reports)
    return losses


def study_seeds(settings: Settings, corpus: Corpus, work: Workspace) -> dict[str, float]:
    """The headline again, from other seeds."""
    losses = {}
    for seed in settings.seeds:
        with work.log(f"seed-{seed}", settings) as log:
            recipe = Recipe(settings.model, replace(settings.train, seed=seed))
            losses[f"seed_{seed}"] = log.finish(
                **train(recipe, corpus, work, log, f"seed {seed}", settings.resume)
            )["best_val_loss"]
    draw(work.logs, work.reports)
    return losses


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
