"""Week 5's plots, drawn from its logs alone."""

from pathlib import Path

from shared.course.report import COLOURS, Curve, curves, figure, read_runs, reference_for, save_figure
from shared.course.style import style
from shared.runtime import ROOT


@style()
def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs, reference = read_runs(logs), reference_for(logs)
    plots = []
    if "bpe" in runs:
        week_4 = read_runs(ROOT / "logs" / "04_mini_gpt" / "reference" / logs.name)
        lines = [Curve(runs["bpe"], "tokens (this week)", "val_bits_per_byte")]
        if "headline" in week_4:
            lines.append(
                Curve(week_4["headline"], "characters (week 4, the course's run)", "val_bits_per_byte")
            )
        plots.append(
            curves(
                out / "loss.png",
                lines,
                "The same model on tokens and on characters",
                x="seconds",
                xlabel="seconds of training",
                ylabel="bits per byte of held-out text",
                reference=(
                    [Curve(reference["bpe"], "tokens", "val_bits_per_byte")] if "bpe" in reference else ()
                ),
            )
        )
        plots.append(draw_compression(runs["bpe"].artifacts["compression"], out))
    studied = [r.summary for n, r in runs.items() if n.startswith("vocab-") and r.summary]
    if studied and runs["chars"].summary:
        plots.append(draw_vocabularies(studied, runs["chars"].summary, out))
    return plots


def draw_compression(measured: dict[str, list[float]], out: Path) -> Path:
    """How much text a token stands for, by vocabulary size."""
    fig, ax = figure()
    xs, ys = measured["sizes"], measured["bytes_per_token"]
    ax.plot(xs, ys, color=COLOURS[0], marker="o", linewidth=2)
    for x, y in zip(xs, ys):
        ax.annotate(f"{y:.2f}", (x, y), xytext=(-4, 8), textcoords="offset points", fontsize=9, ha="right")
    ax.set_xscale("log", base=2)
    ax.set_xticks(xs, xs)
    ax.set(
        title="What a larger vocabulary saves",
        xlabel="vocabulary (tokens, logarithmic)",
        ylabel="bytes of held-out text per token",
    )
    ax.margins(x=0.12, y=0.15)
    return save_figure(fig, out / "compression.png")


def draw_vocabularies(studied: list[dict], chars: dict, out: Path) -> Path:
    """Bits per byte by vocabulary size, at equal compute."""
    fig, ax = figure()
    points = sorted((s["vocab_size"], s["val_bits_per_byte"]) for s in studied)
    ax.plot(*zip(*points), color=COLOURS[0], marker="o", linewidth=2, label="byte-pair encoding")
    for x, y in points:
        ax.annotate(
            f"{y:.3f}",
            (x, y),
            xytext=(0, 9),
            textcoords="offset points",
            fontsize=9,
            ha="center",
            bbox=dict(facecolor="white", edgecolor="none", pad=1),
        )
    level = chars["val_bits_per_byte"]
    ax.axhline(
        level,
        color=COLOURS[1],
        linestyle="--",
        linewidth=2,
        label=f"{chars['vocab_size']} characters: {level:.3f}",
    )
    ax.set_xscale("log", base=2)
    ax.set_xticks([x for x, _ in points], [x for x, _ in points])
    ax.set(
        title="Vocabulary size, at equal compute",
        xlabel="vocabulary (tokens, logarithmic)",
        ylabel="bits per byte of held-out text",
    )
    ax.margins(x=0.1, y=0.2)
    ax.legend(frameon=False)
    return save_figure(fig, out / "vocab.png")
