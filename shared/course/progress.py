"""Week 0. What the progress page says of each week: your figures beside the course's, plots, and a sample.

`python -m shared.course.report` makes the page (see shared/course/progress_page.py). `python -m shared.course
status` says the same in the terminal, in short.
"""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.course.exercise.week import exercise_names, solved_exercises
from shared.course.runs import newest_logs, output_root, week_results, weeks
from shared.runtime import ROOT, read_json

NAMES = {
    "01_bigram": "bigram",
    "02_mlp": "MLP",
    "03_attention": "attention",
    "04_mini_gpt": "mini-GPT",
    "05_bpe": "BPE",
    "06_gpt2": "GPT-2",
    "07_amp": "AMP",
    "08_quantization": "quantization",
    "09_lora": "LoRA",
    "10_ppo_dpo": "PPO and DPO",
    "11_rag": "RAG",
    "12_deploy": "deploy",
}
"""What a week is called in plots and headings."""
FIGURES_SHOWN = 6
"""Of a week, besides its seconds."""
WORDS = {
    "val_loss": "validation loss (nats per token)",
    "counts_val_loss": "validation loss by counting",
    "network_minus_counts": "network's loss less counting's",
    "ln_vocab_size": "ln(vocabulary size)",
    "bigram_val_loss": "validation loss of the bigram",
    "window_mlp_val_loss": "validation loss of the fixed window",
    "accuracy": "next token right, share",
    "first_loss_naive": "first loss, naive initialization",
    "first_loss_scaled": "first loss, scaled initialization",
    "speedup": "tokens/s, best over fp32 without tricks",
    "tokens_per_second": "tokens/s",
    "fp32_ms": "a step in fp32 (ms)",
    "bf16_ms": "a step in bf16 (ms)",
    "fp16_ms": "a step in fp16 (ms)",
    "bf16_time_over_fp32": "time of a step, bf16 over fp32",
    "kept_of_fp32": "size, as a share of fp32",
    "int8_worse": "int8: rise of the perplexity, share",
    "int8_of_fp32": "int8: size, as a share of fp32",
    "int8_perplexity": "int8: perplexity",
    "int8-groups_perplexity": "int8 in groups: perplexity",
    "best_val_loss": "loss on held-out answers (nats per token)",
    "base_loss": "the same loss before training",
    "in_form": "answers in the taught form, share",
    "text_perplexity_before": "perplexity on the old text, before",
    "text_perplexity": "perplexity on the old text, after",
    "trainable": "numbers trained",
    "base_pass_at_1": "problems solved at the first answer, the base",
    "base_pass_at_8": "one answer in eight is right, the base",
    "grpo_pass_at_1": "solved at the first answer, GRPO",
    "grpo_pass_at_8": "one in eight is right, GRPO",
    "expert_pass_at_1": "solved at the first answer, expert iteration",
    "expert_pass_at_8": "one in eight is right, expert iteration",
    "dense_recall_at_5": "right section among five",
    "bm25_recall_at_1": "BM25: recall@1",
    "bm25_recall_at_5": "BM25: recall@5",
    "bm25_recall_at_10": "BM25: recall@10",
    "bm25_mrr": "BM25: reciprocal rank, mean",
    "bm25_ndcg_at_10": "BM25: nDCG@10",
    "ratio": "tokens/s, 8 texts at once over one after another",
    "one_after_another": "tokens/s, one after another",
    "same_alone": "texts the same alone and together, share",
    "first_p50": "first token, p50 (ms)",
    "first_p95": "first token, p95 (ms)",
}
"""What figures are called where their names in the logs would not be understood."""
SAMPLED_RUNS = {
    "01_bigram": "network",
    "04_mini_gpt": "headline",
    "06_gpt2": "gpt2",
    "08_quantization": "int4",
    "09_lora": "course-lora-8",
    "10_ppo_dpo": "countdown-grpo-1",
    "11_rag": "handbook-example",
    "12_deploy": "own-pytorch",
}
"""Of weeks with several runs, the one whose sample is shown."""
SAMPLE_CHARACTERS = 400


@dataclass(frozen=True)
class Runs:
    """The newest results of a week, the learner's or the course's."""

    preset: str
    data: str
    seconds: float
    metrics: dict[str, float]
    plots: tuple[Path, ...]
    sample: str | None
    """Text by the week's model, or a question with its answer."""


@dataclass(frozen=True)
class WeekReport:
    """What the page says of a week."""

    topic: str
    about: str
    """The week in a sentence."""
    solved: int
    exercises: int
    mine: Runs | None
    course: Runs | None
    """On the learner's data where the course has it, otherwise on tinyshakespeare."""

    @property
    def title(self) -> str:
        return f"Week {int(self.topic[:2])}: {NAMES[self.topic]}"

    def figures(self) -> list[tuple[str, str, str]]:
        """(name, yours, the course's) for the week's first figures and its seconds; none without a run."""
        shown = self.mine or self.course
        if shown is None:
            return []
        rows = []
        for name in list(shown.metrics)[:FIGURES_SHOWN]:
            words = WORDS.get(name) or name.replace("_", " ")
            rows.append((words, _figure(self.mine, name), _figure(self.course, name)))
        if rows:
            rows.append(("seconds", seconds(self.mine), seconds(self.course)))
        return rows


def _figure(runs: Runs | None, name: str) -> str:
    if runs is None or name not in runs.metrics:
        return ""
    value = runs.metrics[name]
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def seconds(runs: Runs | None) -> str:
    """How long a week's runs took, as the pages show it."""
    return "" if runs is None else f"{runs.seconds:,.0f}"


def collect(mine: bool = True) -> list[WeekReport]:
    """Every week, from its logs. mine: with the learner's runs and exercises."""
    return [_week_report(topic, mine) for topic in weeks()]


def _week_report(topic: str, mine: bool) -> WeekReport:
    folder = ROOT / "weeks" / topic
    yours = _runs(topic, "mine") if mine else None
    course = _runs(topic, "reference", yours.data) if yours else None
    if course is None:
        course = _runs(topic, "reference", "tinyshakespeare") or _runs(topic, "reference")
    return WeekReport(
        topic=topic,
        about=_about(topic),
        solved=len(solved_exercises(folder)) if mine else 0,
        exercises=len(exercise_names(folder)),
        mine=yours,
        course=course,
    )


def _about(topic: str) -> str:
    """The first paragraph of a week's script, without the "Week 8: " that it begins with."""
    source = (ROOT / "weeks" / topic / "run.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    about = paragraph.partition(": ")[2]
    return about[:1].upper() + about[1:]


def _runs(topic: str, owner: str, data: str | None = None) -> Runs | None:
    results = week_results(topic, owner, data)
    if results is None:
        return None
    logs = newest_logs(topic, owner, data)
    assert logs is not None
    if owner == "mine":
        own = logs.relative_to(output_root() / "logs" / topic / "mine").parts[1:-1]  # --run-name, if any
        plots = (output_root() / "reports" / topic / "mine").joinpath(*own)
    else:
        plots = ROOT / "reports" / topic
        other_data = plots / results["data"]
        if other_data.is_dir():
            plots = other_data
    return Runs(
        preset=results["preset"],
        data=results["data"],
        seconds=results["seconds"],
        metrics=results["metrics"],
        plots=tuple(sorted(plots.glob("*.png"))),
        sample=_sample(topic, logs),
    )


def _sample(topic: str, logs: Path) -> str | None:
    """What the week's model wrote, from the artifacts of its run."""
    if topic in SAMPLED_RUNS:
        files = [logs / SAMPLED_RUNS[topic] / "artifacts.json"]
    else:
        files = sorted(logs.glob("*/artifacts.json"))
    for file in files:
        if file.exists():
            text = _written(read_json(file))
            if text is not None:
                return text
    return None


def _written(artifacts: dict[str, Any]) -> str | None:
    """The text among a run's artifacts, by whichever name its week keeps it under."""
    if "sample" in artifacts:
        return artifacts["sample"].strip()[:SAMPLE_CHARACTERS]
    if "samples" in artifacts:  # (prompt, what the model went on with)
        return "".join(artifacts["samples"][0])
    if "talk" in artifacts:  # (question, answer), or (question, answer before, answer after)
        turns = artifacts["talk"][0]
        speakers = ("question", "answer") if len(turns) == 2 else ("question", "before", "after")
        return "\n\n".join(f"{speaker}: {text}" for speaker, text in zip(speakers, turns))
    if "text" in artifacts:
        return artifacts["text"].strip()
    if "question" in artifacts:
        names = [name for name in ("question", "answer") if name in artifacts]
        return "\n\n".join(f"{name}: {artifacts[name]}" for name in names)
    return None
