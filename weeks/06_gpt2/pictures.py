"""The notebook's plots: each takes data and returns a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from shared.course.report import COLOURS, LINES, MARKERS, LoggedRun, figure


def plot_parameter_shares(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Where each model's parameters sit. shares: percent by part, by model."""
    fig, ax = figure(9, 3.6)
    left = np.zeros(len(shares))
    parts = list(next(iter(shares.values())))
    for part, colour in zip(parts, (0, 4, 1, 2, 6)):
        values = np.array([share[part] for share in shares.values()])
        label = part if values.max() > 0.5 else f"{part} (at most {values.max():.1f}, too little to see)"
        ax.barh(list(shares), values, left=left, color=COLOURS[colour], label=label)
        for y, (value, at) in enumerate(zip(values, left)):
            if value > 4:
                ax.text(
                    at + value / 2, y, f"{value:.0f}", ha="center", va="center", color="white", fontsize=10
                )
        left += values
    ax.set(title="Where the parameters sit", xlabel="percent of all parameters", xlim=(0, 100))
    ax.invert_yaxis()
    ax.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return fig


def _two_lines(ax: Axes, at: Sequence[float], lines: Mapping[str, Sequence[float]]) -> None:
    """Lines over the same places, told apart without colour too."""
    for i, (label, values) in enumerate(lines.items()):
        ax.plot(at, values, color=COLOURS[i], linestyle=LINES[i], marker=MARKERS[i], linewidth=2, label=label)
    ax.set_ylim(0, None)
    ax.legend(frameon=False)


def plot_stream_growth(
    passed: Mapping[str, Sequence[float]], depths: Sequence[int], ends: Mapping[str, Sequence[float]]
) -> Figure:
    """The residual stream's size: before each block of one model, and at the end of models of several depths,
    each with and without the scaled initialization.
    """
    fig, (left, right) = figure(11, 4, ncols=2)
    _two_lines(left, range(len(next(iter(passed.values())))), passed)
    _two_lines(right, depths, ends)
    left.set(title="GPT-2, before any training", xlabel="blocks passed", ylabel="stream (root mean square)")
    right.set(title="Models 128 wide, of several depths", xlabel="blocks in the model")
    right.set_ylabel("stream at its end (root mean square)")
    right.set_xticks(depths)
    return fig


def plot_conv1d() -> Figure:
    """One Conv1D of GPT-2's and the three linear layers that it becomes."""
    fig, ax = figure(10, 2.4)
    for i, part in enumerate("qkv"):
        for left, wide in ((3 * i, 3), (12.5 + 3.6 * i, 3)):
            ax.add_patch(Rectangle((left, 0), wide, 3, facecolor=COLOURS[i], alpha=0.35, edgecolor="black"))
            name = part if left < 9 else f"{part}ᵀ"
            ax.text(left + 1.5, 1.5, name, fontsize=16, ha="center", va="center")
    for x, y, words in ((4.5, -0.5, "outputs: 3 · n_embd"), (17.6, -0.5, "inputs: n_embd each")):
        ax.text(x, y, words, ha="center")
    for x, words in ((-0.4, "inputs: n_embd"), (12.1, "outputs: n_embd")):
        ax.text(x, 1.5, words, rotation=90, ha="right", va="center")
    ax.annotate("", (11.2, 1.5), (9.4, 1.5), arrowprops=dict(arrowstyle="->", lw=2))
    ax.set(title="One Conv1D of GPT-2's, three nn.Linear of ours", xlim=(-1.5, 23), ylim=(-1, 3.2))
    ax.set_aspect("equal")
    ax.axis("off")
    return fig


def plot_quantized_block(values: np.ndarray, numbers: np.ndarray, levels: np.ndarray) -> Figure:
    """A block of weights on its levels, with the number that is stored for each. values, numbers: [32]."""
    fig, ax = figure(9, 3.6)
    for level in levels:
        ax.axhline(level, color=COLOURS[7], linewidth=0.6)
    ax.vlines(range(len(values)), 0, values, color=COLOURS[0], linewidth=2)
    ax.plot(range(len(values)), values, "o", color=COLOURS[0])
    for i, (number, value) in enumerate(zip(numbers, values)):
        offset = (0, 7 if value > 0 else -15)
        ax.annotate(number, (i, value), xytext=offset, textcoords="offset points", ha="center", fontsize=8)
    ax.grid(False)
    ax.set(title="32 weights on 16 levels: a block of Q4_1", xlabel="weight", ylabel="value")
    ax.margins(y=0.12)
    return fig


def plot_rope_layouts() -> Figure:
    """Which channels RoPE turns together, in our order and in GGUF's."""
    fig, axes = figure(10, 2, ncols=2)
    layouts = {
        "ours and Hugging Face's: i with i + half": [(i, i + 4) for i in range(4)],
        "GGUF's: neighbours": [(2 * i, 2 * i + 1) for i in range(4)],
    }
    for ax, (title, pairs) in zip(axes, layouts.items()):
        for (a, b), colour in zip(pairs, COLOURS):
            for channel in (a, b):
                ax.add_patch(Rectangle((channel, 0), 0.9, 0.9, facecolor=colour, alpha=0.4))
                ax.text(channel + 0.45, 0.45, channel, ha="center", va="center")
            bend = -0.3 if b - a > 1 else -0.8
            style = dict(arrowstyle="-", color=colour, lw=2, connectionstyle=f"arc3,rad={bend}")
            ax.annotate("", (b + 0.45, 0.95), (a + 0.45, 0.95), arrowprops=style)
        ax.set(title=title, xlim=(-0.2, 8.1), ylim=(-0.1, 2.2))
        ax.axis("off")
    return fig


def plot_next_tokens(panels: Mapping[str, tuple[Sequence[str], Sequence[float]]]) -> Figure:
    """The likeliest next tokens. panels: (tokens, probabilities) by title."""
    fig, axes = figure(11, 3, ncols=len(panels))
    for ax, (title, (labels, values)) in zip(axes, panels.items()):
        ax.barh(range(len(labels)), values, color=COLOURS[0])
        ax.set_yticks(range(len(labels)), labels, family="monospace")
        ax.set(title=title, xlabel="probability", xlim=(0, 1))
        ax.invert_yaxis()
    return fig


def plot_answer_scores(
    texts: Sequence[str], tokens: Sequence[Sequence[str]], logprobs: Sequence[Sequence[float]]
) -> Figure:
    """What each token of each answer costs, side by side."""
    fig, axes = figure(11, 4, ncols=len(texts), sharex=True)
    longest = max(map(len, tokens))
    for ax, text, labels, values, colour in zip(axes, texts, tokens, logprobs, COLOURS):
        ax.barh(range(len(values)), values, color=colour)
        ax.set_yticks(range(len(values)), labels, family="monospace", fontsize=11)
        ax.set_ylim(longest - 0.5, -0.5)  # from the top down, and a bar as thick in all
        total = sum(values)
        ax.set_title(f"{text}\nsum {total:.1f}, {len(text)} characters: {total / len(text):.2f} each")
        ax.set_xlabel("log-probability (nats)")
    axes[0].set_ylabel("token of the answer")
    return fig


def plot_standard_errors(accuracy: float = 0.7) -> Figure:
    """How the standard error of an accuracy falls with the number of examples, and that of a difference."""
    numbers = np.array([20, 50, 100, 200, 500, 1000, 1838, 5153])
    errors = np.sqrt(accuracy * (1 - accuracy) / (numbers - 1))
    fig, ax = figure(8, 3.8)
    labels = ("one accuracy", "the difference of two models' (independent)")
    for i, (label, values) in enumerate(zip(labels, (errors, np.sqrt(2) * errors))):
        ax.loglog(
            numbers,
            values,
            color=COLOURS[i],
            linestyle=LINES[i],
            marker=MARKERS[i],
            linewidth=2,
            label=label,
        )
    ax.axhline(0.02, color=COLOURS[7], linestyle="--", label="0.02")
    whole_sets = ("1,838:\nall of PIQA", "5,153:\nall of LAMBADA")
    ax.set_xticks((20, 100, 500, *numbers[-2:]), ("20", "100", "500", *whole_sets))
    ax.set_yticks((0.005, 0.01, 0.02, 0.05, 0.1), ("0.005", "0.01", "0.02", "0.05", "0.1"))
    ax.minorticks_off()
    ax.set(title=f"How sure is an accuracy of {accuracy}?", ylim=(0.004, 0.19))
    ax.set(xlabel="examples (logarithmic)", ylabel="standard error (logarithmic)")
    ax.legend(frameon=False)
    return fig


def plot_sliding_windows(strides: Sequence[int] = (8, 4), width: int = 8) -> Figure:
    """Which tokens each window scores, for two strides."""
    fig, axes = figure(11, 2.6, ncols=len(strides))
    for ax, stride in zip(axes, strides):
        starts = range(0, 25, stride)
        for row, begin in enumerate(starts):
            seen = 0 if row == 0 else width - stride  # tokens that an earlier window has scored already
            ax.add_patch(Rectangle((begin, -row), seen, 0.8, facecolor=COLOURS[7], alpha=0.4))
            ax.add_patch(Rectangle((begin + seen, -row), width - seen, 0.8, facecolor=COLOURS[0]))
        ax.set(title=f"windows of {width}, stride {stride}", xlim=(0, 32), ylim=(-len(starts) + 0.8, 1))
        ax.set(xlabel="token of the text", yticks=[])
        ax.grid(False)
    axes[0].set_ylabel("windows\nblue: scored\ngrey: context only")
    return fig


def plot_strides(bits: Mapping[int, float]) -> Figure:
    """Bits per byte of one model on one text, by the stride of its windows of 64 tokens."""
    fig, ax = figure(8, 3.8)
    ax.plot(list(bits), list(bits.values()), color=COLOURS[0], marker="o", linewidth=2)
    for stride, value in bits.items():
        label = f"{64 // stride}× the work" if stride < 64 else "side by side"
        ax.annotate(
            label, (stride, value), xytext=(-6, 6), textcoords="offset points", ha="right", fontsize=9
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(bits), list(bits))
    ax.set(title="The same model, the same text, windows of 64 tokens")
    ax.set(xlabel="stride (tokens, logarithmic)", ylabel="bits per byte")
    ax.margins(x=0.2, y=0.15)
    return fig


def plot_packing(lengths: Sequence[int] = (4, 3, 9, 2, 8), row_length: int = 6) -> Figure:
    """Documents of these lengths, each behind its end-of-text, in rows; under each token its target."""
    stream = [(document, at) for document, n in enumerate(lengths) for at in range(-1, n)]
    names = ["<|endoftext|>" if at < 0 else f"{'ABCDE'[document]}{at}" for document, at in stream]
    rows = (len(stream) - 1) // row_length
    fig, ax = figure(8, 4)
    for place in range(rows * row_length):
        row, column = divmod(place, row_length)
        document, at = stream[place]
        colour, alpha, ink = (COLOURS[document], 0.5, "black") if at >= 0 else ("black", 1.0, "white")
        ax.add_patch(Rectangle((column, -row), 0.94, 0.62, facecolor=colour, alpha=alpha))
        middle = dict(ha="center", va="center")
        ax.text(column + 0.47, 0.31 - row, names[place], color=ink, fontsize=9, **middle)
        ax.text(column + 0.47, -0.12 - row, f"→ {names[place + 1]}", color="#555555", fontsize=8, **middle)
    title = f"Five documents, A to E: {len(stream)} tokens, {rows} rows of {row_length}, and their targets"
    ax.set(title=title, xticks=[])
    ax.set(xlim=(-0.1, row_length), ylim=(-rows + 0.7, 0.8))
    ax.set_yticks([0.31 - r for r in range(rows)], [f"row {r}" for r in range(rows)])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return fig


def plot_training_state(billions: Mapping[str, float]) -> Figure:
    """What weights, gradients and AdamW's moments take. billions: parameters by model."""
    fig, ax = figure(9, 3)
    left = np.zeros(len(billions))
    kinds = {"weights": 1, "gradients": 1, "AdamW's moments": 2}
    for colour, (kind, numbers) in zip(COLOURS, kinds.items()):
        values = 4 * numbers * np.array(list(billions.values()))
        ax.barh(list(billions), values, left=left, color=colour, label=kind)
        left += values
    for i, total in enumerate(left):
        ax.annotate(f"{total:.1f}", (total, i), xytext=(6, 0), textcoords="offset points", va="center")
    ax.set(title="What training needs before it has read a token", xlabel="GB")
    ax.margins(x=0.1)
    ax.invert_yaxis()
    ax.legend(frameon=False, loc="upper right")
    return fig


def plot_kept_activations(layers: Sequence[int], megabytes: Mapping[str, Sequence[float]]) -> Figure:
    """What the forward keeps, by the number of blocks."""
    fig, ax = figure(8, 3.8)
    _two_lines(ax, layers, megabytes)
    ax.set_title("What the forward keeps for the backward (128 wide, 4 × 64 tokens)")
    ax.set(xlabel="blocks", ylabel="megabytes")
    ax.set_xticks(layers)
    return fig


def plot_batch_memory(gigabytes: Mapping[str, Mapping[int, float]], cards: Mapping[str, float]) -> Figure:
    """The computed peak of a training step by batch size, and what cards hold.

    gigabytes: by the kind of step, then by batch size.
    """
    fig, ax = figure(9, 4.2)
    for i, (label, values) in enumerate(gigabytes.items()):
        ax.loglog(
            list(values),
            list(values.values()),
            color=COLOURS[i],
            linestyle=LINES[i],
            marker=MARKERS[i],
            linewidth=2,
            label=label,
        )
    largest = {label: (max(values), values[max(values)]) for label, values in gigabytes.items()}
    for rows, size in largest.values():
        is_on_a_line = any(abs(np.log(size / card)) < 0.1 for card in cards.values())
        offset = (7, 9 if is_on_a_line else 0)
        ax.annotate(
            f"{size:.0f} GB", (rows, size), xytext=offset, textcoords="offset points", va="center", fontsize=9
        )
    sizes = list(next(iter(gigabytes.values())))
    for card, size in cards.items():
        ax.axhline(size, color=COLOURS[7], linewidth=1)
        ax.annotate(
            card, (sizes[0], size), xytext=(0, 3), textcoords="offset points", fontsize=9, va="bottom"
        )
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_yticks((4, 8, 16, 32, 64, 128), ("4", "8", "16", "32", "64", "128"))
    ax.minorticks_off()
    ax.set(title="GPT-2 124M: a training step in memory (computed)")
    ax.set(xlabel="rows of 1,024 tokens at a time (logarithmic)", ylabel="GB (logarithmic)")
    ax.legend(frameon=False, loc="lower right")
    return fig


def plot_ddp_and_fsdp() -> Figure:
    """What each of four processes holds."""
    kinds = ("rows of the batch", "weights", "gradients", "moments")
    fig, axes = figure(11, 3.2, ncols=2)
    for ax, (title, is_whole) in zip(axes, {"DDP: whole copies": True, "FSDP: a part each": False}.items()):
        for process in range(4):
            for row, colour in enumerate((4, 0, 1, 2)):
                for part in range(4):
                    has = part == process or (is_whole and row > 0)
                    fill = COLOURS[colour] if has else "white"
                    place = (5 * process + part, -row)
                    ax.add_patch(Rectangle(place, 0.95, 0.8, facecolor=fill, edgecolor="#999999", alpha=0.8))
        ax.set(title=title, xlim=(-0.2, 19.2), ylim=(-3.1, 0.9))
        ax.set_xticks([5 * p + 2 for p in range(4)], [f"process {p}" for p in range(4)])
        ax.set_yticks([0.4 - r for r in range(4)], kinds)
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
    return fig


def plot_her_training(
    losses: Sequence[float], val_loss: float, frequencies: float, vocab_size: int
) -> Figure:
    """The loss of the training batches step by step, and that of the held-out text at the end.

    frequencies: the held-out text's loss where each token is given its share of the training text.
    """
    fig, ax = figure(8, 3.8)
    steps = np.arange(1, len(losses) + 1)
    ax.plot(steps, losses, color=COLOURS[0], linewidth=1.5, label="training batch")
    ax.plot(len(losses), val_loss, "o", color=COLOURS[1], markersize=9, label="held-out text, at the end")
    ax.axhline(np.log(vocab_size), color=COLOURS[7], linestyle="--", label=f"ln {vocab_size:,}")
    ax.axhline(frequencies, color="black", linestyle=":", label="held-out text, by frequencies alone")
    ax.set(title="Your GPT-2, your reader, your step", xlabel="step", ylabel="loss (nats per token)")
    ax.legend(frameon=False)
    return fig


def plot_week_ladder(rows: Mapping[str, float], yours: str) -> Figure:
    """Bits per byte of the held-out text, a bar a week. yours: the bar of the learner's own run."""
    fig, ax = figure(9, 0.9 + 0.45 * len(rows))
    colours = [COLOURS[1] if label == yours else COLOURS[0] for label in rows]
    ax.barh(list(rows), list(rows.values()), color=colours)
    for i, value in enumerate(rows.values()):
        ax.annotate(f"{value:.2f}", (value, i), xytext=(5, 0), textcoords="offset points", va="center")
    ax.set(title="The ladder so far", xlabel="bits per byte of the held-out text (less is better)")
    ax.margins(x=0.12)
    ax.invert_yaxis()
    return fig


def plot_three_weeks(runs: Mapping[str, LoggedRun]) -> Figure:
    """Bits per byte of the held-out text against seconds. runs: by label."""
    fig, ax = figure(8, 4.2)
    for i, (label, run) in enumerate(runs.items()):
        seconds, bits = run.series("val_bits_per_byte", "seconds")
        ax.plot(
            seconds, bits, color=COLOURS[i], marker=MARKERS[i], linestyle=LINES[i], linewidth=2, label=label
        )
    ax.set(title="Three weeks, one held-out text", xlabel="seconds of training")
    ax.set_ylabel("bits per byte of the held-out text")
    ax.legend(frameon=False)
    return fig


def plot_zero_shot(measured: Mapping[str, Any], published: Mapping[str, Mapping[str, float]]) -> Figure:
    """Accuracies beside published ones, those measured here with one standard error to each side.

    published: by model; a measure that is missing has no bar.
    """
    names = {"lambada_acc": "LAMBADA, acc", "piqa_acc": "PIQA, acc", "piqa_acc_norm": "PIQA, acc_norm"}
    fig, ax = figure(9, 3.8)
    groups = {"SmolLM2 in our GPT": measured, **published}
    for i, (label, values) in enumerate(groups.items()):
        found = [metric for metric in names if metric in values]
        at = [list(names).index(metric) + 0.26 * (i - 1) for metric in found]
        errors = [measured[f"{metric}_error"] for metric in found] if i == 0 else None
        heights = [values[metric] for metric in found]
        ax.bar(at, heights, 0.24, yerr=errors, capsize=4, color=COLOURS[i], label=label)
        style = dict(rotation=90, color=COLOURS[i], ha="center", va="bottom", fontsize=9)
        for place, metric in enumerate(names):
            if metric not in values:
                ax.text(place + 0.26 * (i - 1), 0.02, "none published", **style)
    ax.set_xticks(range(len(names)), list(names.values()))
    ax.set(title=f"Zero-shot: ours on the first {measured['piqa_examples']:,} examples, published on all")
    ax.set(ylabel="accuracy", xlabel="task and measure", xlim=(-0.5, 2.5), ylim=(0, 1))
    ax.legend(frameon=False)
    return fig


def plot_step_costs(steps: Sequence[Mapping[str, Any]]) -> Figure:
    """Time and memory of each kind of step."""
    panels = {
        "seconds": ("Time of a step", "seconds"),
        "kept_gigabytes": ("Kept for the backward", "GB"),
        "gigabytes": ("Peak memory of the process", "GB"),
    }
    fig, axes = figure(12, 1.4 + 0.5 * len(steps), ncols=len(panels), sharey=True)
    for ax, (key, (title, unit)), colour in zip(axes, panels.items(), COLOURS):
        values = [step.get(key) or 0 for step in steps]
        ax.barh([step["name"] for step in steps], values, color=colour)
        for i, value in enumerate(values):
            ax.annotate(f"{value:.2f}", (value, i), xytext=(5, 0), textcoords="offset points", va="center")
        ax.set(title=title, xlabel=unit)
        ax.margins(x=0.2)
    axes[0].invert_yaxis()
    return fig
