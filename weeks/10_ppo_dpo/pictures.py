"""Week 10's plots of what the notebook has at hand. Each function takes data and returns a figure."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor

from shared.course.report import COLOURS, LINES, MARKERS, figure


def best_policies_figure(reward: Tensor, policies: Mapping[str, Tensor]) -> Figure:
    """The probabilities of a few answers under several policies, side by side.

    reward, and each of `policies`: [answers].
    """
    fig, ax = figure(8, 4)
    width = 0.8 / len(policies)
    for i, (label, probabilities) in enumerate(policies.items()):
        places = [answer + width * (i + 0.5) - 0.4 for answer in range(len(reward))]
        colour = COLOURS[(7, 0, 1, 5)[i % 4]]
        ax.bar(places, probabilities.tolist(), width, color=colour, label=label)
    names = [f"answer {answer}\nreward {r:g}" for answer, r in enumerate(reward.tolist())]
    ax.set_xticks(range(len(reward)), names)
    ax.set(title="The best policy, for three prices of leaving the reference", ylabel="probability")
    ax.legend(frameon=False)
    return fig


def clipped_gains_figure(ratio: Tensor, gains: Mapping[float, Tensor]) -> Figure:
    """What a token gains by the ratio of its probabilities, for some advantages; pale, without the clip.

    ratio, and each of `gains`: [points]; the keys are the advantages.
    """
    fig, axes = figure(10, 3.6, ncols=len(gains), squeeze=False)
    for ax, (advantage, values) in zip(axes[0], gains.items()):
        plain = dict(color=COLOURS[7], linestyle=LINES[1], label="without the clip")
        ax.plot(ratio.tolist(), (ratio * advantage).tolist(), **plain)
        ax.plot(ratio.tolist(), values.tolist(), color=COLOURS[0], linewidth=2.2, label="with the clip")
        ax.axvline(1, color="#555555", linewidth=0.8)
        kind = "good" if advantage > 0 else "bad"
        ax.set(
            title=f"a {kind} token (advantage {advantage:+g})".replace("-", "−"),
            xlabel="probability now / when drawn",
            ylabel="gain",
        )
    axes[0, 0].legend(frameon=False)
    return fig


def credit_figure(advantages: Mapping[float, Sequence[float]]) -> Figure:
    """The advantage of each token where only the last one earns something, for several lambdas."""
    fig, ax = figure(8, 3.6)
    for i, (lam, values) in enumerate(advantages.items()):
        look = dict(color=COLOURS[i], marker=MARKERS[i], linestyle=LINES[i])
        ax.plot(range(len(values)), values, label=f"λ = {lam:g}", **look)
    ax.set_xticks(range(0, len(values), 2))
    ax.set(title="A reward of 1 at the last token: who gets the credit?", xlabel="token", ylabel="advantage")
    ax.legend(frameon=False)
    return fig


def while_learning_figure(shares: Mapping[str, Sequence[float]], smooth: int = 5) -> Figure:
    """Shares of the answers that were drawn, step by step: pale each step, dark the mean of some steps."""
    fig, ax = figure(8, 3.8)
    for i, (name, values) in enumerate(shares.items()):
        percent = [100 * value for value in values]
        ax.plot(range(1, len(percent) + 1), percent, color=COLOURS[i], alpha=0.3)
        means = [sum(percent[k - smooth : k]) / smooth for k in range(smooth, len(percent) + 1)]
        look = dict(color=COLOURS[i], linestyle=LINES[i], linewidth=2.2)
        ax.plot(range(smooth, len(percent) + 1), means, label=name, **look)
    ax.set(title="Answers drawn while it learns", xlabel="step", ylabel="% of the answers", ylim=(0, 100))
    ax.legend(frameon=False, loc="upper left")
    return fig


def passed_figure(results: Mapping[str, Mapping[str, float]]) -> Figure:
    """pass@1 and pass@8 of several policies, as bars with their numbers."""
    fig, ax = figure(9, 0.9 + 0.62 * len(results))
    names = list(results)
    for i, key in enumerate(("pass_at_1", "pass_at_8")):
        places = [row + 0.38 * i for row in range(len(names))]
        values = [100 * results[name][key] for name in names]
        label = f"pass@{key.rpartition('_')[2]}"
        bars = ax.barh(places, values, 0.36, color=COLOURS[(0, 4)[i]], label=label)
        ax.bar_label(bars, fmt="%.0f", padding=3, fontsize=9)
    ax.set_yticks([row + 0.19 for row in range(len(names))], names)
    ax.invert_yaxis()
    ax.set(title="Held-out problems solved", xlabel="%", xlim=(0, 110))
    ax.grid(axis="y", visible=False)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return fig
