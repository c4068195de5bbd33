"""Week 4's longer studies, which `--study NAME` runs."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from figures import ABLATIONS, draw
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import RunLog, clock, table
from shared.sampling import generate
from shared.training import TrainConfig, Trainer

if TYPE_CHECKING:
    from run import Settings


@dataclass(frozen=True)
class Recipe:
    model: GPTConfig
    train: TrainConfig


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


def study_cache(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
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


def study_speedrun(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
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


def study_ablation(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
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


def study_seeds(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
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
