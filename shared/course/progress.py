"""Week 0. The progress page: twelve weeks at a glance, your figures beside the course's, every plot, and what
the models write.

`python -m shared.course.report` makes it: `reports/index.html` with your runs in it, and `reports/README.md`,
the course's own, for reading where the repository is hosted. `python -m shared.course status` says the same
in the terminal, in short.
"""

import ast
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from shared.course.exercise import Week
from shared.course.workspace import TOPICS, output_root, week_results, weeks
from shared.runtime import ROOT, write_atomically

NAMES = dict(
    zip(
        TOPICS,
        (
            "bigram",
            "MLP",
            "attention",
            "mini-GPT",
            "BPE",
            "GPT-2",
            "AMP",
            "quantization",
            "LoRA",
            "PPO and DPO",
            "RAG",
            "deploy",
        ),
    )
)
FIGURES_SHOWN = 6
WORDS = {
    "val_loss": "validation loss (nats per token)",
    "counts_val_loss": "validation loss by counting",
    "network_minus_counts": "network's loss less counting's",
    "ln_vocab_size": "ln(vocabulary size)",
    "bigram_val_loss": "validation loss of the bigram",
    "window_mlp_val_loss": "validation loss of the fixed window",
    "accuracy": "next token right, share",
    "first_loss_naive": "first loss, naive first values",
    "first_loss_scaled": "first loss, scaled first values",
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
    "reward_model_accuracy": "reward model: right on held-out pairs",
    "base_reward": "exclamations in an answer, before",
    "base_kl": "KL to week 6's model, before",
    "base_learned": "reward model's reward, before",
    "base_known_words": "words known from the text, before",
    "ppo_reward": "exclamations in an answer, PPO",
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
SPOKEN = {
    "01_bigram": "network",
    "04_mini_gpt": "headline",
    "06_gpt2": "gpt2",
    "08_quantization": "int4",
    "09_lora": "course-lora-8",
    "10_ppo_dpo": "dpo",
    "11_rag": "handbook-example",
    "12_deploy": "own-pytorch",
}
"""Of weeks with several runs, the one whose text is shown."""


@dataclass(frozen=True)
class Runs:
    """A week's runs by one owner."""

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
        """(name, yours, the course's) for the week's first figures."""
        shown = (self.mine or self.course).metrics if self.mine or self.course else {}
        value = lambda runs, name: _number(runs.metrics[name]) if runs and name in runs.metrics else ""
        rows = [
            (WORDS.get(name) or name.replace("_", " "), value(self.mine, name), value(self.course, name))
            for name in list(shown)[:FIGURES_SHOWN]
        ]
        seconds = lambda runs: f"{runs.seconds:,.0f}" if runs else ""
        return rows + ([("seconds", seconds(self.mine), seconds(self.course))] if rows else [])


def collect(mine: bool = True) -> list[WeekReport]:
    """Every week, from its logs. mine: with the learner's runs and exercises."""
    reports = []
    for topic in weeks():
        docstring = ast.get_docstring(
            ast.parse((ROOT / "weeks" / topic / "run.py").read_text(encoding="utf-8"))
        )
        first_paragraph = " ".join(docstring.partition("\n\n")[0].split())
        about = first_paragraph.partition(": ")[2]
        week = Week(int(topic[:2]))
        yours = _runs(topic, "mine") if mine else None
        course = (
            (yours and _runs(topic, "reference", yours.data))
            or _runs(topic, "reference", "tinyshakespeare")
            or _runs(topic, "reference")
        )
        reports.append(
            WeekReport(
                topic,
                about[0].upper() + about[1:],
                len(week.solved()) if mine else 0,
                len(week.exercises),
                yours,
                course,
            )
        )
    return reports


def _runs(topic: str, owner: str, data: str | None = None) -> Runs | None:
    found = week_results(topic, owner, data)
    if not found:
        return None
    if owner == "mine":
        logs = output_root() / "logs" / topic / "mine" / found["preset"] / found["data"]
        plots = output_root() / "reports" / topic / "mine"
    else:
        logs = ROOT / "logs" / topic / "reference" / found["data"]
        plots = ROOT / "reports" / topic
        other = plots / found["data"]
        plots = other if other.is_dir() else plots
    return Runs(
        found["preset"],
        found["data"],
        found["seconds"],
        found["metrics"],
        tuple(sorted(plots.glob("*.png"))),
        _sample(topic, logs),
    )


def _sample(topic: str, logs: Path) -> str | None:
    """What the week's model wrote, from the artifacts of its run."""
    files = (
        [logs / SPOKEN[topic] / "artifacts.json"]
        if topic in SPOKEN
        else sorted(logs.glob("*/artifacts.json"))
    )
    for kept in (json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()):
        if "sample" in kept:
            return kept["sample"].strip()[:400]
        if "samples" in kept:  # (prompt, what the model went on with)
            return "".join(kept["samples"][0])
        if "talk" in kept:  # (question, answer), or (question, answer before, answer after)
            question, *answers = kept["talk"][0]
            names = ("answer",) if len(answers) == 1 else ("before", "after")
            return "\n\n".join(
                f"{name}: {text}" for name, text in zip(("question", *names), (question, *answers))
            )
        if "text" in kept:
            return kept["text"].strip()
        if "question" in kept:
            return "\n\n".join(f"{name}: {kept[name]}" for name in ("question", "answer") if name in kept)
    return None


def _words(path: Path) -> str:
    return path.stem.replace("_", " ")


# ---- the learner's page

CSS = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --done: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 3rem 0 .2rem; } p { margin: .3rem 0 1rem; }
.soft { color: var(--soft); } a { color: var(--done); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:nth-child(4) { white-space: normal; } th { color: var(--soft); font-weight: 600; font-size: .85rem; } .number { text-align: right; }
.bar { display: inline-block; width: 5rem; height: .55rem; background: var(--line); border-radius: .3rem; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--done); }
figure { margin: 0 0 1.2rem; } figure img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: .4rem; }
figcaption { color: var(--soft); font-size: .9rem; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); margin: 1rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; border-radius: .4rem; padding: .8rem 1rem; font-size: .9rem; margin: 0; }
summary { cursor: pointer; color: var(--done); margin: .6rem 0; }
@media (max-width: 40rem) { .bar { display: none; } table { font-size: .78rem; } th { font-size: .72rem; } th, td { white-space: normal; padding-right: .3rem; } }
"""


def html_page(reports: list[WeekReport], folder: Path) -> str:
    """The page, to be kept in `folder`: one file without scripts; plots are linked from where they lie."""
    link = lambda path: escape(Path(os.path.relpath(path, folder)).as_posix())
    done, solved, exercises = (
        sum(r.mine is not None for r in reports),
        sum(r.solved for r in reports),
        sum(r.exercises for r in reports),
    )
    parts = [
        "<h1>A language model from nothing</h1>",
        (
            f"<p>{done} of {len(reports)} weeks run, {solved} of {exercises} exercises solved. "
            '<span class="soft">Made from the logs by <code>python -m shared.course.report</code>.</span></p>'
        ),
    ]
    ladders = [
        p
        for p in (output_root() / "reports" / "mine" / "ladder.png", ROOT / "reports" / "ladder.png")
        if p.exists()
    ]
    if ladders:
        parts.append(_figure(link(ladders[0]), "Bits per byte of the same held-out text, week by week"))
    rows = []
    for r in reports:
        name, yours, course = (r.figures() or [("", "", "")])[0]
        bar = (
            f'<span class="bar"><i style="width:{100 * r.solved / max(1, r.exercises):.0f}%"></i></span>'
            f" {r.solved} of {r.exercises}"
        )
        cells = [f'<a href="#{r.topic}">{escape(r.title)}</a>', _run_as(r), bar, escape(name)]
        numbers = "".join(f'<td class="number">{escape(v)}</td>' for v in (yours, course))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + numbers + "</tr>")
    heads = (
        '<th>week</th><th>run</th><th>exercises</th><th>figure</th><th class="number">yours</th><th'
        ' class="number">the course\'s</th>'
    )
    parts.append(
        "<div"
        f' class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    parts += [_html_week(r, link) for r in reports]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        ' initial-scale=1"><title>Progress: a language model from nothing</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{CSS}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _run_as(r: WeekReport) -> str:
    """Smoke runs prove that a week runs: their figures are no one's achievement."""
    return (
        "not yet" if not r.mine else f"yes ({escape(r.mine.preset)})" if r.mine.preset == "smoke" else "yes"
    )


def _html_week(r: WeekReport, link: Any) -> str:
    parts = [f'<h2 id="{r.topic}">{escape(r.title)}</h2>', f'<p class="soft">{escape(r.about)}</p>']
    if not r.mine:
        parts.append(
            f"<p>Not run yet: open <code>weeks/{r.topic}/notebook.ipynb</code>, or <code>python"
            f" weeks/{r.topic}/run.py</code>.</p>"
        )
    yours = f"yours ({r.mine.preset}, {r.mine.data})" if r.mine else "yours"
    course = f"the course's ({r.course.data})" if r.course else "the course's"
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{escape(a)}</td><td'
        f' class="number">{escape(b)}</td></tr>'
        for name, a, b in r.figures()
    )
    heads = f'<th>figure</th><th class="number">{escape(yours)}</th><th class="number">{escape(course)}</th>'
    parts.append(
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    for runs, owner in ((r.mine, "Yours"), (r.course, "The course's")):
        if not runs:
            continue
        inside = (
            "<div"
            f' class="plots">{"".join(_figure(link(p), f"{owner}: {_words(p)}") for p in runs.plots)}</div>'
        )
        inside += (
            f"<p>{owner}, what the model writes:</p><pre>{escape(runs.sample)}</pre>" if runs.sample else ""
        )
        folded = owner != "Yours" and r.mine
        parts.append(
            f"<details><summary>{owner} plots and text</summary>{inside}</details>" if folded else inside
        )
    return "\n".join(parts)


def _figure(source: str, caption: str) -> str:
    return (
        f'<figure><img src="{source}" alt="{escape(caption)}"'
        f' loading="lazy"><figcaption>{escape(caption)}</figcaption></figure>'
    )


# ---- the course's page


def markdown_page(reports: Iterable[WeekReport]) -> str:
    """The course's own runs, in Markdown, for `reports/README.md`."""
    reports = list(reports)
    lines = [
        "# What the course measures",
        "",
        (
            "The course's own runs, on two cores without a GPU. `python -m shared.course.report` makes this"
            " page from `logs/`, and `index.html` beside it"
        ),
        "with your runs in it. On one page: [SUMMARY.md](SUMMARY.md).",
        "",
        "![Bits per byte of the same held-out text, week by week](ladder.png)",
        "",
        "| week | | figure | the course's | seconds | exercises |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for r in reports:
        name, _, value = (r.figures() or [("", "", "")])[0]
        link = f"[{r.title}](#{_anchor(r.title)})"
        lines.append(
            f"| {link} | {r.about} | {name} | {value} | {f'{r.course.seconds:,.0f}' if r.course else ''} |"
            f" {r.exercises} |"
        )
    for r in reports:
        lines += [
            "",
            f"## {r.title}",
            "",
            f"{r.about} [Notebook](../weeks/{r.topic}/notebook.ipynb), [log](../weeks/{r.topic}/log.md).",
            "",
        ]
        if not r.course:
            continue
        lines += [
            "| figure | the course's |",
            "| --- | ---: |",
            *(f"| {name} | {value} |" for name, _, value in r.figures()),
            "",
        ]
        lines += [
            f"![{r.title}: {_words(p)}]({p.relative_to(ROOT / 'reports').as_posix()})" for p in r.course.plots
        ]
        if r.course.sample:
            lines += ["", "What the model writes:", "", "```text", *r.course.sample.splitlines(), "```"]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


def write_page() -> Path:
    """Writes `reports/index.html`, with the learner's runs, and returns its path."""
    folder = output_root() / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.html", html_page(collect(), folder))
    return folder / "index.html"
