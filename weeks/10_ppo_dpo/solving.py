"""Week 10's main result: a small GPT that knows little more than an answer's form learns, from a verified
reward, to solve countdown problems; beside it what the same time does in other ways.
"""

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from countdown_settings import CONTROLS, DRAWING, CountdownSettings
from names import LONGER, SOLVERS
from own_update import OwnGRPO, Update
from shared import checkpoint
from shared.alignment.base_loop import AlignmentLoop
from shared.alignment.countdown import (
    END,
    TOKENIZER,
    CountdownLines,
    Problem,
    judge,
    prompt_batch,
    rewards,
    solve,
    success,
)
from shared.alignment.expert_iteration import ExpertIteration
from shared.alignment.loops import GRPO, PPO
from shared.alignment.rewards import scalar_head
from shared.alignment.shortcuts import best_fixed_form, commonest_form, follows_target
from shared.course.report import read_runs
from shared.course.workspace import Workspace
from shared.devices import device_of
from shared.models.gpt import GPT
from shared.runtime import RunLog, clock, plain, table
from shared.sampling import generate
from shared.training import Trainer

if TYPE_CHECKING:
    from run import Settings

PREFIX = "countdown"
SHOWN = 8
"""Of so many held-out problems, the first ones, an answer is kept in the log, and shown."""
CURVE_PROBLEMS = 128
CURVE_SAMPLES = 8
MEASURED_WITH = 5
"""The seed of the answers that a policy is measured by: two policies differ by what they have learned."""


def run_name(method: str, seed: int) -> str:
    """What a run is called in the logs."""
    return f"{PREFIX}-{method}-{seed}"


def is_done(name: str, method: str, settings: "Settings", work: Workspace) -> bool:
    """Whether a run is to be gone on with and is at its end already, with the settings that it reads."""
    if not settings.resume:
        return False
    run = read_runs(work.logs).get(name)
    if run is None or not run.summary:
        return False
    wanted = plain(settings.countdown)
    return all(run.run["settings"][key] == wanted[key] for key in settings_read(method))


def settings_read(method: str) -> tuple[str, ...]:
    """The names of the settings that a run reads: of the base, a control, or a method."""
    of_the_base = ("problems", "model", "base", "base_right", "held_out", "samples", "seed")
    if method == "base":
        return of_the_base
    own = ("control_steps", "control_rate") if method in CONTROLS else (method, "rows")
    return *of_the_base, *own


class LearningTime:
    """Seconds by the clock, and of the processor (all threads together), without those spent measuring.

    A resumed run counts on from what its log says last.
    """

    def __init__(self, log: RunLog):
        timed = [row for row in log.rows() if "cpu_seconds" in row]
        last = timed[-1] if timed else {"wall_seconds": 0.0, "cpu_seconds": 0.0}
        self.wall = last["wall_seconds"] - clock()
        self.cpu = last["cpu_seconds"] - time.process_time()

    def now(self) -> dict[str, float]:
        """Both, so far."""
        return {"wall_seconds": self.wall + clock(), "cpu_seconds": self.cpu + time.process_time()}

    def without(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `measure` gives, with the times before it; its own are not counted."""
        before = self.now()
        metrics = measure() | before
        after = self.now()
        self.wall -= after["wall_seconds"] - before["wall_seconds"]
        self.cpu -= after["cpu_seconds"] - before["cpu_seconds"]
        return metrics


# ---- runs


def train_base(settings: "Settings", work: Workspace, called: str = "base") -> GPT:
    """The model that all methods begin with: it has learned how answers look, from lines of which only the
    share `base_right` has an expression on purpose that solves its problem. In eval mode.
    """
    own = settings.countdown
    name = run_name(called, own.seed)
    folder = work.checkpoints / name
    if is_done(name, "base", settings, work) and (folder / "last").exists():
        return GPT.from_checkpoint(folder / "last", work.device)
    torch.manual_seed(own.seed)
    model = GPT(replace(own.model, vocab_size=len(TOKENIZER.chars)))
    with work.log(name, own) as log:
        time_of = LearningTime(log)
        task = CountdownLines(own.problems, own.base_right)
        Trainer(model, task, own.seeded(own.base), log, folder, device=work.device).fit(settings.resume)
        seconds = time_of.now()
        metrics = measure_solving(model.eval(), own, log) | measure_curve(model, own)
        problems = reported_problems(own)
        rng = random.Random(own.seed)
        guesses = [[own.problems.expression(rng, p.numbers) for _ in range(own.samples)] for p in problems]
        chance = {f"chance_{key}": value for key, value in success(problems, guesses).items()}
        sums = sum(sum(problem.numbers) == problem.target for problem in problems) / len(problems)
        metrics |= chance | fixed_forms(problems, log) | seconds | {"sums": sums}
        log.finish(**metrics, parameters=model.num_parameters())
    return model


def train_control(which: str, name: str, base: GPT, settings: "Settings", work: Workspace) -> None:
    """More supervised training from the same base: on true solutions, or on lines like the base's."""
    own = settings.countdown
    model = copy.deepcopy(base).requires_grad_()
    with work.log(name, own) as log:
        time_of = LearningTime(log)

        def measure(policy: nn.Module) -> dict[str, float]:
            return time_of.without(lambda: measure_curve(policy, own))

        task = CountdownLines(own.problems, 1.0 if which == "solutions" else own.base_right, measure)
        folder = work.checkpoints / name
        Trainer(model, task, own.control, log, folder, device=work.device).fit(settings.resume)
        seconds = time_of.now()
        lines = own.control.steps * own.control.batch_size
        log.finish(**measure_solving(model.eval(), own, log), **seconds, lines=lines)


def train_method(method: str, name: str, base: GPT, settings: "Settings", work: Workspace) -> None:
    """One of the methods that draw answers and have them judged."""
    own = settings.countdown
    policy = copy.deepcopy(base).requires_grad_()
    with work.log(name, own) as log:
        time_of = LearningTime(log)

        def measure() -> dict[str, float]:
            return time_of.without(lambda: measure_curve(policy, own))

        file = work.checkpoints / f"{name}.safetensors"
        her_update = work.mine("grpo_update", None) if method == "grpo" else None
        loop = solving_loop(method, policy, base, own, log=log, file=file, her_update=her_update)
        loop.fit(settings.resume, measure, math.ceil(loop.config.steps / own.measurements))
        seconds = time_of.now()
        metrics = measure_solving(policy, own, log)
        drawn = loop.config.steps * own.rows
        log.finish(**metrics, **seconds, answers_drawn=drawn)
        checkpoint.save(policy, work.checkpoints / name, TOKENIZER, metrics)


def solving_loop(
    method: str,
    policy: GPT,
    base: GPT,
    own: CountdownSettings,
    *,
    log: RunLog | None = None,
    file: Path | None = None,
    her_update: Update | None = None,
) -> AlignmentLoop:
    """A method's loop. All have the same problems at the same step, drawn anew for each.

    her_update: the learner's own `grpo_update`, for GRPO.
    """
    group_size = own.group_size(method)

    def prompts(step: int) -> Tensor:
        rng = random.Random(f"{own.seed}.{step}")
        problems = [own.problems.draw(rng, "train")[0] for _ in range(own.rows // group_size)]
        return prompt_batch(problems, device_of(policy))

    if method == "expert":
        return ExpertIteration(policy, prompts, rewards, own.seeded(own.expert), log=log, file=file)
    reference = copy.deepcopy(base)
    if method != "ppo":
        grpo = GRPO if her_update is None else partial(OwnGRPO, her_update)
        return grpo(policy, reference, prompts, rewards, own.seeded(getattr(own, method)), log=log, file=file)
    value = scalar_head(base, std=0, generator=Generator().manual_seed(own.seed)).requires_grad_()

    def repeated(step: int) -> Tensor:
        return prompts(step).repeat_interleave(group_size, 0)

    return PPO(policy, value, reference, repeated, rewards, config=own.seeded(own.ppo), log=log, file=file)


# ---- measuring


def reported_problems(own: CountdownSettings) -> list[Problem]:
    """Those that results are reported on, the same for all seeds. None of them is learned from."""
    return own.problems.problems("test", own.held_out, MEASURED_WITH)


def measure_curve(policy: nn.Module, own: CountdownSettings) -> dict[str, float]:
    """pass@k on the problems that settings are chosen on, which are not reported."""
    count = min(CURVE_PROBLEMS, own.held_out)
    problems = own.problems.problems("tune", count, MEASURED_WITH)
    was_training = policy.training
    answers = solve(policy.eval(), problems, CURVE_SAMPLES, own.problems.answer_tokens, MEASURED_WITH)
    policy.train(was_training)
    return {f"tune_{key}": value for key, value in success(problems, answers).items()}


def measure_solving(policy: nn.Module, own: CountdownSettings, log: RunLog) -> dict[str, float]:
    """What is reported: pass@1 and pass@8 on held-out problems, the shares of answers that do nothing but add
    and that are of the commonest form, and whether the likeliest answers change with the target. Some answers
    are kept in the log.
    """
    problems = reported_problems(own)
    answers = solve(policy, problems, own.samples, own.problems.answer_tokens, MEASURED_WITH)
    kept = [(p.prompt, shown_answer(policy, p, drawn, own)) for p, drawn in zip(problems[:SHOWN], answers)]
    log.artifact(samples=kept)
    adding = [set(answer) <= set("0123456789+") for drawn in answers for answer in drawn]
    return success(problems, answers) | {
        "adding": sum(adding) / len(adding),
        "commonest": commonest_form(problems, answers),
        "follows_target": follows_target(policy, problems, own.problems.answer_tokens),
    }


def fixed_forms(problems: Sequence[Problem], log: RunLog) -> dict[str, float]:
    """The baseline of who looks at no target: the share that the best fixed forms solve, one for each number
    of numbers. The forms are kept in the log.
    """
    best = best_fixed_form(problems)
    log.artifact(fixed_forms={size: form for size, (form, _) in best.items()})
    shares = {f"fixed_of_{size}": share for size, (_, share) in best.items()}
    return shares | {"fixed": sum(best[len(problem.numbers)][1] for problem in problems) / len(problems)}


def shown_answer(policy: nn.Module, problem: Problem, drawn: Sequence[str], own: CountdownSettings) -> str:
    """A policy's likeliest answer, what it is worth, and how many of those that were drawn are right."""
    prompt = TOKENIZER.encode(problem.prompt)
    likeliest = generate(policy, prompt, own.problems.answer_tokens, temperature=0, stop=[END])
    right = sum(judge(problem, answer).right for answer in drawn)
    return f"{described(problem, TOKENIZER.decode(list(likeliest)))} ({right} of {len(drawn)} drawn)"


def described(problem: Problem, answer: str) -> str:
    """An answer as people read it: with its value, and whether that is right."""
    judgement = judge(problem, answer)
    value = "" if judgement.value is None else f" = {judgement.value}"
    return f"{answer}{value}, {judgement.outcome.value}"


# ---- the week's run and its studies


def learn_countdown(settings: "Settings", work: Workspace) -> dict[str, float]:
    """The base; more supervised training for the same time; expert iteration; GRPO. The week's metrics."""
    own = settings.countdown
    runs = ("solutions", "expert", "grpo")
    train_all(runs, settings, work)
    names = {method: run_name(method, own.seed) for method in ("base", *runs)}
    summaries = {method: read_runs(work.logs)[name].summary for method, name in names.items()}
    show_success(summaries)
    show_answers({name: names[name] for name in ("base", "grpo", "expert", "solutions")}, work)
    keys = ("pass_at_1", "pass_at_8")
    metrics = {f"{name}_{key}": summaries[name][key] for name in ("base", *reversed(runs)) for key in keys}
    return metrics | {"cpu_seconds": sum(row["cpu_seconds"] for row in summaries.values())}


def train_all(methods: tuple[str, ...], settings: "Settings", work: Workspace) -> None:
    """The base, and from it each of these methods and controls, all with the seed of the settings."""
    base = train_base(settings, work)
    for method in methods:
        name = run_name(method, settings.countdown.seed)
        print(f"{SOLVERS[method]}, seed {settings.countdown.seed}", flush=True)
        if not is_done(name, method, settings, work):
            train = train_control if method in CONTROLS else train_method
            train(method, name, base, settings, work)


def study_methods(settings: "Settings", work: Workspace) -> dict[str, float]:
    """All methods and both controls, each with several seeds, of which the base is one as well."""
    own = settings.countdown
    for seed in own.seeds:
        train_all((*CONTROLS, *DRAWING), replace(settings, countdown=replace(own, seed=seed)), work)
    runs = read_runs(work.logs)
    metrics = {}
    for method in ("base", *CONTROLS, *DRAWING):
        rows = [runs[run_name(method, seed)].summary for seed in own.seeds]
        with work.log(f"{PREFIX}-{method}", own) as log:
            metrics[method] = log.finish(**over_seeds(rows))
    show_success(metrics)
    return {f"{method}_pass_at_1": row["pass_at_1"] for method, row in metrics.items()}


def study_form(settings: "Settings", work: Workspace) -> dict[str, float]:
    """A base that has seen no true solution on purpose, and GRPO from it: one seed."""
    own = replace(settings.countdown, base_right=0.0)
    changed = replace(settings, countdown=own)
    base = train_base(changed, work, "form_only")
    name = run_name("form_only_grpo", own.seed)
    if not is_done(name, "grpo", changed, work):
        train_method("grpo", name, base, changed, work)
    runs = read_runs(work.logs)
    names = {"base": run_name("form_only", own.seed), "grpo": name}
    rows = {method: runs[name].summary for method, name in names.items()}
    show_success(rows)
    return {f"{method}_pass_at_1": row["pass_at_1"] for method, row in rows.items()}


def study_longer(settings: "Settings", work: Workspace) -> dict[str, float]:
    """Does RL catch up with more time? Several seeds of the control, expert iteration and GRPO, with `longer`
    times their steps; and one of GRPO from a base without any true solution.
    """
    own = settings.countdown
    of_method: dict[str, list[str]] = {}
    for seed in own.seeds:
        at_seed = replace(settings, countdown=replace(own, seed=seed))
        base = train_base(at_seed, work)
        for method in ("form", "expert", "grpo"):
            name = run_name(LONGER + method, seed)
            train_longer(method, name, base, at_seed, work)
            of_method.setdefault(method, []).append(name)
    without = replace(settings, countdown=replace(own, seed=own.seeds[0], base_right=0.0))
    name = run_name(LONGER + "form_only_grpo", own.seeds[0])
    train_longer("grpo", name, train_base(without, work, "form_only"), without, work)
    runs = read_runs(work.logs)
    metrics = {}
    for method, names in of_method.items():
        with work.log(f"{PREFIX}-{LONGER}{method}", own) as log:
            metrics[method] = log.finish(**over_seeds([runs[name].summary for name in names]))
    show_success(metrics)
    print(f"GRPO from a base of form only: pass@1 {runs[name].summary['pass_at_1']:.1%}")
    return {f"{method}_pass_at_1": row["pass_at_1"] for method, row in metrics.items()}


def train_longer(method: str, name: str, base: GPT, settings: "Settings", work: Workspace) -> None:
    """A method or control with `longer` times its steps, where it isn't done already."""
    changed = replace(settings, countdown=settings.countdown.taking_longer())
    print(f"{name}, {settings.countdown.longer} times the steps", flush=True)
    if not is_done(name, method, changed, work):
        train = train_control if method in CONTROLS else train_method
        train(method, name, base, changed, work)


def over_seeds(rows: list[dict[str, float]]) -> dict[str, float]:
    """Each metric's mean, and its lowest and highest value."""
    summary: dict[str, float] = {"seeds": len(rows)}
    for key in rows[0]:
        values = [row[key] for row in rows]
        summary[key] = sum(values) / len(values)
        summary |= {f"{key}_low": min(values), f"{key}_high": max(values)}
    return summary


def study_learning_rates(settings: "Settings", work: Workspace) -> dict[str, float]:
    """Each method at the same number of learning rates, with one seed and fewer steps, judged on problems
    that are neither learned from nor reported. RLOO takes Dr. GRPO's: their gradients differ by a factor.
    """
    base = train_base(settings, work)
    own = settings.countdown
    found: dict[str, float] = {}
    for method in ("solutions", *(method for method in DRAWING if method != "rloo")):
        for rate in own.control_rates if method in CONTROLS else own.rates:
            name = f"{PREFIX}-rate-{method}-{rate:g}"
            changed = replace(settings, countdown=own.with_rate(method, rate))
            if not is_done(name, method, changed, work):
                train = train_control if method in CONTROLS else train_method
                train(method, name, base, changed, work)
            key = f"{method}_{rate:g}"
            found[key] = read_runs(work.logs)[name].rows[-1]["tune_pass_at_1"]
            print(f"{SOLVERS[method]}, learning rate {rate:g}: {found[key]:.1%}", flush=True)
    with work.log(f"{PREFIX}-rates", own) as log:
        return log.finish(**found)


def show_success(rows: dict[str, dict[str, float]]) -> None:
    """Prints the table for people."""
    cells = [
        {
            "": SOLVERS[method],
            "pass@1": f"{row['pass_at_1']:.1%}",
            "pass@8": f"{row['pass_at_8']:.1%}",
            "in form": f"{row['in_form']:.1%}",
            "commonest form": f"{row['commonest']:.1%}",
            "follows the target": f"{row['follows_target']:.1%}",
            "answers drawn": row.get("answers_drawn", 0),
            "s": row["wall_seconds"],
        }
        for method, row in rows.items()
    ]
    print("\n" + table(cells))


def show_answers(names: dict[str, str], work: Workspace) -> None:
    """Prints the first held-out problems, each with every policy's likeliest answer and what it is worth, and
    keeps that in the log.
    """
    runs = read_runs(work.logs)
    samples = {method: runs[name].artifacts["samples"] for method, name in names.items()}
    lines = []
    for i, (prompt, _) in enumerate(samples["base"]):
        lines.append(prompt)
        lines += [f"    {SOLVERS[method] + ':':<24}{own[i][1]}" for method, own in samples.items()]
    text = "\n".join(lines)
    print("\n" + text)
    with work.log(f"{PREFIX}-answers", work.settings) as log:
        log.artifact(text=text)
        log.finish(problems=len(samples["base"]))


SOLVING: dict[str | None, Callable[["Settings", Workspace], dict[str, float]]] = {
    None: learn_countdown,
    "methods": study_methods,
    "rates": study_learning_rates,
    "form": study_form,
    "longer": study_longer,
}
"""The week's run, and its studies of the same."""
