"""Week 4's longer studies, which `--study NAME` runs."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from figures import ABLATIONS, draw
from shared.course.report import read_runs
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import RunLog, clock, table
from shared.sampling import generate
from shared.training import Callback, TrainConfig, Trainer
from shared.training.optim import Muon, build_optimizers

if TYPE_CHECKING:
    from run import Settings


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained."""

    model: GPTConfig
    train: TrainConfig


def new_model(recipe: Recipe, corpus: Corpus) -> GPT:
    """The recipe's model for this text, initialized from the recipe's seed."""
    torch.manual_seed(recipe.train.seed)
    block_size = max(recipe.model.block_size, recipe.train.block_size)
    return GPT(replace(recipe.model, vocab_size=corpus.tokenizer.vocab_size, block_size=block_size))


def train(
    recipe: Recipe,
    corpus: Corpus,
    work: Workspace,
    log: RunLog,
    name: str,
    *,
    resume: bool = False,
    prepare: Callable[[GPT], GPT] | None = None,
) -> dict[str, float]:
    """Trains one recipe; its summary.

    prepare: what is done to the new model first. `wall_seconds` in the summary counts everything from the
    first step to the last evaluation, also of a run that was interrupted and resumed.
    """
    model = new_model(recipe, corpus)
    if prepare is not None:
        model = prepare(model)
    folder = work.checkpoints / log.folder.name
    trainer = Trainer(model, corpus, recipe.train, log, folder, device=work.device, description=name)
    return {**trainer.fit(resume), "wall_seconds": trainer.wall_seconds}


def study_cache(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
    """Greedy characters per second with the KV cache and without, from the headline's checkpoint.

    The text must be the same.
    """
    model = GPT.from_checkpoint(work.checkpoints / "headline" / "best", "cpu")
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


TRIALS = ((1.0, 1.0), (2.0, 0.75), (1.5, 0.875), (2.0, 1.0), (1.0, 0.75), (0.5, 1.0))
"""The search of the speedrun, the same for both recipes: learning rates and steps, as multiples of theirs."""
EVALUATIONS = 16
"""How often a run of the speedrun is measured, at even distances."""
WINDOWS = 218
"""On how much of the validation split: an eighth of tinyshakespeare's windows, spread evenly."""


class CPUTime(Callback):
    """Counts what the steps cost in CPU time, which other programs on the machine change little."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def on_step_start(self, trainer: Trainer) -> None:
        self._started = time.process_time()

    def on_step(self, trainer: Trainer) -> None:
        self.seconds += time.process_time() - self._started

    def state(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def restore(self, state: dict[str, float]) -> None:
        self.seconds = state["seconds"]


def flops_per_step(model: GPT, config: TrainConfig) -> int:
    """Floating-point operations of a training step, with what Muon needs to orthogonalize its matrices.

    A product of [a, b] and [b, c] counts 2abc. One Newton-Schulz step on a matrix [m, n], m the shorter side,
    takes products of [m, n] and [n, m], of [m, m] and [m, m], and of [m, m] and [m, n].
    """
    flops = config.tokens_per_step * model.flops_per_token(config.block_size)
    for optimizer in build_optimizers(model, config.optimizer, config.lr):
        if isinstance(optimizer, Muon):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    m, n = sorted(parameter.shape)
                    flops += group["ns_steps"] * (4 * m * m * n + 2 * m**3)
    return flops


def tried(recipe: Recipe, rate: float, length: float) -> Recipe:
    """The recipe with its learning rates and its number of steps multiplied."""
    steps = round(recipe.train.steps * length)
    changed = replace(
        recipe.train,
        lr=recipe.train.lr * rate,
        muon_lr=recipe.train.muon_lr * rate,
        steps=steps,
        warmup_steps=min(recipe.train.warmup_steps, steps),
        eval_every=max(1, steps // EVALUATIONS),
        eval_windows=WINDOWS,
    )
    return Recipe(recipe.model, changed)


def run_to_target(
    recipe: Recipe, settings: "Settings", corpus: Corpus, work: Workspace, run: str, **more: Any
) -> dict[str, Any]:
    """Trains to the end; its summary, with where the validation loss first was at most the target.

    more: further entries of the summary. Seconds are those of the steps: evaluation is not on the clock.
    """
    with work.log(run, settings) as log:
        model = new_model(recipe, corpus)
        folder = work.checkpoints / run
        spent = CPUTime()
        trainer = Trainer(
            model,
            corpus,
            recipe.train,
            log,
            folder,
            device=work.device,
            description=run.replace("-", " "),
            callbacks=[spent],
        )
        result = trainer.fit(settings.resume)
        good_enough = [row for row in log.rows() if row.get("val_loss", math.inf) <= settings.target]
        reached = {}
        if good_enough:
            step = good_enough[0]["step"]
            reached = {
                "target_step": step,
                "target_seconds": good_enough[0]["seconds"],
                "target_cpu_seconds": spent.seconds * step / recipe.train.steps,
                "target_tokens": step * recipe.train.tokens_per_step,
                "target_flops": step * flops_per_step(model, recipe.train),
            }
        summary = {**result, "target": settings.target, "lr": recipe.train.lr, **reached, **more}
        if recipe.train.optimizer == "muon":
            summary["muon_lr"] = recipe.train.muon_lr
        return log.finish(**summary)


def best_trial(trials: Mapping[Any, Mapping[str, Any]], name: str) -> Any:
    """The trial that reached the target in the fewest steps. Raises ValueError where none did."""
    reached = {trial: summary for trial, summary in trials.items() if "target_step" in summary}
    if not reached:
        lowest = min(summary["val_loss"] for summary in trials.values())
        raise ValueError(
            f"no setting of the recipe {name} reached the target: the lowest loss was {lowest:.3f}. Give more"
            f" steps (--{name}.train.steps), or a higher --target"
        )
    return min(reached, key=lambda trial: (reached[trial]["target_step"], reached[trial]["val_loss"]))


def study_speedrun(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
    """Both recipes at about one model size, until the validation loss is at most the target.

    First the same small search for both, at one seed; then the best setting of each from further seeds. The
    two take turns, so that what else the machine does meets both alike.
    """
    recipes = {"classic": settings.classic, "modern": settings.modern}
    trials: dict[str, dict[tuple[float, float], dict[str, Any]]] = {name: {} for name in recipes}
    for number, (rate, length) in enumerate(TRIALS[: settings.trials], 1):
        for name, recipe in recipes.items():
            trials[name][rate, length] = run_to_target(
                tried(recipe, rate, length),
                settings,
                corpus,
                work,
                f"trial-{name}-{number}",
                rate=rate,
                length=length,
            )
    best = {name: best_trial(trials[name], name) for name in recipes}
    runs = {name: [trials[name][best[name]]] for name in recipes}
    for name in recipes:
        number = list(trials[name]).index(best[name]) + 1
        keep_again(f"trial-{name}-{number}", name, settings, work)
    for seed in settings.seeds:
        for name, recipe in recipes.items():
            chosen = tried(recipe, *best[name])
            seeded = Recipe(chosen.model, replace(chosen.train, seed=seed))
            runs[name].append(run_to_target(seeded, settings, corpus, work, f"{name}-seed-{seed}", seed=seed))
    with work.log("speedrun", settings) as log:
        summary = log.finish(**recipe_ratios(runs), trials=settings.trials)
    draw(work.logs, work.reports)
    rows = [
        {"recipe": name, **{k: run.get(f"target_{k}") for k in ("step", "seconds", "flops")}}
        for name in runs
        for run in runs[name]
    ]
    print(f"\nTo a validation loss of {settings.target}:\n{table(rows)}")
    print(
        f"\nmodern needs {summary['steps_ratio']:.1f} times fewer steps, {summary['flops_ratio']:.1f} times"
        f" fewer operations and {summary['ratio']:.1f} times less time"
    )
    return summary


def keep_again(run: str, name: str, settings: "Settings", work: Workspace) -> None:
    """Keeps a finished run's log under a second name: the best trial is the first of the seeds."""
    trial = read_runs(work.logs)[run]
    with work.log(name, settings) as log:
        log.rewind(-1)
        for row in trial.rows:
            log.log(**row)
        log.finish(**trial.summary)


MEASURES = {
    "ratio": "target_seconds",
    "cpu_ratio": "target_cpu_seconds",
    "steps_ratio": "target_step",
    "tokens_ratio": "target_tokens",
    "flops_ratio": "target_flops",
}
"""What the speedrun compares, by the names of its figures."""


def recipe_ratios(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Classic's mean over the seeds divided by modern's, in each measure, and the least and greatest ratio of
    two runs of one seed. A seed counts where both reached the target; ValueError where there is none.
    """
    pairs = [
        (classic, modern)
        for classic, modern in zip(runs["classic"], runs["modern"])
        if "target_step" in classic and "target_step" in modern
    ]
    if not pairs:
        raise ValueError("from no seed did both recipes reach the target: more steps, or a higher --target")
    figures: dict[str, float] = {"pairs": len(pairs)}
    for name, measure in MEASURES.items():
        figures[name] = sum(c[measure] for c, _ in pairs) / sum(m[measure] for _, m in pairs)
        ratios = [c[measure] / m[measure] for c, m in pairs]
        figures |= {f"{name}_least": min(ratios), f"{name}_most": max(ratios)}
    return figures


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


SCALE = 8
"""How many times longer the texts of the length study are than those that the model was trained on."""


def scaled_speeds(head_dim: int, theta: float, trained: int) -> dict[str, Tensor]:
    """How fast each pair of channels turns, in radians a position, for texts SCALE times as long.

    NTK scaling makes theta larger, so that the slowest pair turns as far in the long text as it did in the
    short one (bloc97, 2023). YaRN (Peng et al., 2023) slows pairs down by SCALE that turn less than once in
    the trained length, leaves those that turn 32 times or more, and takes a mean between; its change of the
    softmax's temperature is left out. Its bounds are made for long texts: here the upper one is 4 turns.
    """
    half = head_dim // 2
    usual = theta ** (-torch.arange(half) / half)
    ntk = (theta * SCALE ** (head_dim / (head_dim - 2))) ** (-torch.arange(half) / half)
    turns = trained * usual / (2 * math.pi)
    kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
    return {"as trained": usual, "NTK": ntk, "YaRN": usual * kept + usual / SCALE * (1 - kept)}


@torch.no_grad()
def losses_by_position(model: GPT, tokens: np.ndarray, speeds: Tensor, length: int, windows: int) -> Tensor:
    """The loss at each position of windows of `length` tokens, read whole: [windows, length].

    model: one with RoPE; it is left as it was. speeds: those of its pairs of channels, in radians a position.
    """
    longer = GPT(replace(model.config, block_size=length)).eval()
    longer.load_state_dict(model.state_dict())
    angle = torch.outer(torch.arange(length).float(), speeds)
    longer.rotaries[0].cos = torch.cat([angle.cos(), angle.cos()], dim=-1)
    longer.rotaries[0].sin = torch.cat([-angle.sin(), angle.sin()], dim=-1)
    rows = []
    for start in range(0, windows * length, length):
        text = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
        logits = longer(text[None, :-1])[0]
        rows.append(torch.nn.functional.cross_entropy(logits, text[1:], reduction="none"))
    return torch.stack(rows)


def mean_by_range(losses: Tensor, trained: int) -> dict[str, float]:
    """The mean loss in ranges of positions that double, by the range's name; the first two end inside of the
    trained length. losses: [windows, length].
    """
    by_position = losses.mean(0)
    edges = [0, trained // 2]
    while edges[-1] < len(by_position):
        edges.append(2 * edges[-1])
    return {f"{a}-{b - 1}": by_position[a:b].mean().item() for a, b in zip(edges, edges[1:])}


def study_length(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
    """The modern recipe's model in texts longer than those that it was trained on, with RoPE as it is and
    scaled.
    """
    trained = settings.modern.model.block_size
    length = SCALE * trained
    windows = min(50, (len(corpus.val) - 1) // length)
    if windows < 1:
        raise ValueError(f"the validation split has {len(corpus.val)} tokens, and {length + 1} are needed")
    with work.log("length", settings) as log:
        once = replace(settings.modern.train, eval_every=settings.modern.train.steps)
        train(Recipe(settings.modern.model, once), corpus, work, log, "modern", resume=settings.resume)
        model = GPT.from_checkpoint(work.checkpoints / "length" / "best", "cpu")
        config = model.config
        losses = {
            name: mean_by_range(losses_by_position(model, corpus.val, speeds, length, windows), trained)
            for name, speeds in scaled_speeds(config.head_dim, config.rope_theta, trained).items()
        }
        log.artifact(losses=losses)
        log.finish(trained_on=trained, length=length, windows=windows)
    summary = {}
    for name, by_range in losses.items():
        figures = {f"loss_{where.replace('-', '_')}": loss for where, loss in by_range.items()}
        with work.log(f"length-{name.replace(' ', '-')}", settings) as log:
            log.finish(**figures)
        summary |= {f"{name.replace(' ', '_')}_{figure}": loss for figure, loss in figures.items()}
    print("\n" + table([{"RoPE": name, **by_range} for name, by_range in losses.items()]))
    return summary


STUDIES = {
    "speedrun": study_speedrun,
    "ablation": study_ablation,
    "seeds": study_seeds,
    "cache": study_cache,
    "length": study_length,
}
