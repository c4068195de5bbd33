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
    """A model and how it is trained."""

    model: GPTConfig
    train: TrainConfig


def train(
    recipe: Recipe, corpus: Corpus, work: Workspace, log: RunLog, name: str, *, resume: bool = False
) -> dict[str, float]:
    """Trains one recipe; its summary.

    `wall_seconds` in it counts everything from the first step to the last evaluation.
    """
    started = clock()
    torch.manual_seed(recipe.train.seed)
    block_size = max(recipe.model.block_size, recipe.train.block_size)
    config = replace(recipe.model, vocab_size=corpus.tokenizer.vocab_size, block_size=block_size)
    model = GPT(config)
    folder = work.checkpoints / log.folder.name
    trainer = Trainer(model, corpus, recipe.train, log, folder, device=work.device, description=name)
    return {**trainer.fit(resume), "wall_seconds": clock() - started}


def study_cache(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
    """Greedy characters per second with the KV cache and without, from the headline's checkpoint.

    The text must be the same.
    """
    model = GPT.from_checkpoint(work.checkpoints / "headline" / "best")
    prompt = corpus.val[: model.config.block_size // 8].tolist()
    room = model.config.block_size - len(prompt)
    speed = {}
    texts = []
    for use_cache, name in ((True, "cached"), (False, "uncached")):
        # The first calls set up what later ones reuse.
        list(generate(model, prompt, 4, temperature=0, use_cache=use_cache))
        started = clock()
        texts.append(list(generate(model, prompt, room, temperature=0, use_cache=use_cache)))
        speed[f"tokens_per_second_{name}"] = room / (clock() - started)
    assert texts[0] == texts[1], "the KV cache changed the text"
    with work.log("cache", settings) as log:
        print("\n" + table([log.finish(**speed)]))
    return speed


def study_speedrun(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
    """Both recipes at one model size, until the whole validation split's loss is at most the target.

    Evaluation is not on the clock.
    """
    rows = []
    reached = {}
    for name, recipe in (("classic", settings.classic), ("modern", settings.modern)):
        with work.log(name, settings) as log:
            result = train(recipe, corpus, work, log, name, resume=settings.resume)
            good_enough = [row for row in log.rows() if row.get("val_loss", math.inf) <= settings.target]
            step, seconds = None, None
            if good_enough:
                step = good_enough[0]["step"]
                seconds = good_enough[0]["seconds"]
            reached[name] = seconds
            log.finish(**result, target=settings.target, target_step=step, target_seconds=seconds)
        rows.append({"recipe": name, "step": step, "seconds": seconds, "last loss": result["val_loss"]})
    print(f"\nTo a validation loss of {settings.target}:\n{table(rows)}")
    draw(work.logs, work.reports)
    missed = [name for name, seconds in reached.items() if seconds is None]
    if missed:
        print(f"{' and '.join(missed)} did not get there: more steps, or a higher --target")
        return {}
    ratio = reached["classic"] / reached["modern"]
    with work.log("speedrun", settings) as log:
        log.finish(ratio=ratio, **{f"{name}_seconds": seconds for name, seconds in reached.items()})
    print(f"\nmodern is {ratio:.1f} times faster")
    return {"ratio": ratio, **reached}


def study_ablation(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
    """The modern recipe with one ingredient at a time exchanged for the classic one, at equal steps."""
    modern = settings.modern
    losses = {}
    for name, (model, training) in ABLATIONS.items():
        with work.log("ablation-" + name.replace(",", "").replace(" ", "-"), settings) as log:
            recipe = Recipe(
                replace(modern.model, **model),
                replace(modern.train, eval_every=modern.train.steps, **training),
            )
            result = train(recipe, corpus, work, log, name, resume=settings.resume)
            losses[name] = log.finish(**result, name=name)["val_loss"]
    rows = [
        {"recipe": name, "validation loss": loss, "worse by": loss - losses["modern"]}
        for name, loss in losses.items()
    ]
    print("\n" + table(rows))
    draw(work.logs, work.reports)
    return losses


def study_seeds(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
    """The headline again, from other seeds."""
    losses = {}
    for seed in settings.seeds:
        with work.log(f"seed-{seed}", settings) as log:
            recipe = Recipe(settings.model, replace(settings.train, seed=seed))
            result = train(recipe, corpus, work, log, f"seed {seed}", resume=settings.resume)
            losses[f"seed_{seed}"] = log.finish(**result)["best_val_loss"]
    draw(work.logs, work.reports)
    return losses


STUDIES = {
    "speedrun": study_speedrun,
    "ablation": study_ablation,
    "seeds": study_seeds,
    "cache": study_cache,
}
