"""Week 10's study of exclamations: preferences, a reward model, and PPO, GRPO and DPO at the same budget."""

from typing import TYPE_CHECKING

from figures import draw, write_aligned_card
from names import METHODS, NAMES
from policies import SAMPLES, align, measure_policy, show_policies
from preferences import Start
from shared.course.report import read_runs
from shared.course.workspace import Workspace
from shared.runtime import write_atomically

if TYPE_CHECKING:
    from run import Settings


def study_exclaim(settings: "Settings", start: Start, work: Workspace) -> dict[str, float]:
    """The three methods, each from week 6's model; one of the policies is kept, with its card."""
    with work.log("base", settings) as log:
        rows = {"base": log.finish(**measure_policy(start.base, start, settings, log))}
    for method in METHODS:
        rows[method] = align(method, method, settings, start, work)
    show_policies(rows)
    show_samples(work)
    metrics = {"reward_model_accuracy": read_runs(work.logs)["reward"].summary["held_out_accuracy"]}
    for name, row in rows.items():
        metrics |= {f"{name}_{key}": row[key] for key in ("reward", "kl", "learned", "known_words")}
    draw(work.logs, work.reports)
    kept = work.checkpoints / settings.keep
    card = write_aligned_card(work.logs, work.reports, settings, kept)
    write_atomically(kept / "README.md", card.read_text(encoding="utf-8"))
    print(f"kept: {kept}, with its model card ({card.name})")
    return metrics


def show_samples(work: Workspace) -> None:
    """Prints some held-out prompts, each with all policies' answers, a line break as a slash."""
    runs = read_runs(work.logs)
    samples = {name: runs[name].artifacts["samples"] for name in ("base", *METHODS)}
    for i in range(SAMPLES):
        prompt = samples["base"][i][0]
        print(f"\n{prompt.strip()} ...")
        for name, own in samples.items():
            answer = own[i][1].replace("\n", " / ")
            print(f"  [{NAMES[name]}] {answer}")
