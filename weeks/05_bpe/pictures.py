"""The pictures of week 5's notebook: each takes data and returns a figure."""

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from shared.course.report import COLOURS, LINES, MARKERS, LoggedRun, char_label, figure

Pair = tuple[bytes, bytes]
Row = tuple[str, Sequence[bytes], Sequence[int] | None]
"""A label, tokens, and what stands below each of them."""


def readable(token: bytes) -> str:
    """A token as it can be read: ␣ is a space, ⏎ a line break, and a byte that is no character is written as
    its code.

    >>> readable(b" the"), readable(bytes([195]))
    ('␣the', '\\\\xc3')
    """
    try:
        return "".join(map(char_label, token.decode()))
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in token)


def draw_tokens(rows: Sequence[Row], title: str, width: float = 11) -> Figure:
    """Tokens as boxes beside each other, a row for each text; a row without tokens is a gap."""
    fig, ax = figure(width, 0.5 + (0.62 if rows[0][2] else 0.45) * len(rows))
    most = max(sum(len(readable(token)) for token in tokens) for _, tokens, _ in rows)
    size = min(12, 0.8 * width * 72 / most / 0.62)
    below = _size_of_ids(rows, 0.8 * width * 72 / most)
    for y, row in enumerate(rows):
        _draw_row(ax, y, row, size, below)
    ax.set(title=title, xlim=(0, most), ylim=(len(rows) - 0.4, -0.5), xticks=[])
    ax.set_yticks([y - 0.1 for y in range(len(rows))], [label for label, _, _ in rows])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return fig


def _size_of_ids(rows: Sequence[Row], letter: float) -> float:
    """The largest size, up to 10, in which every id is as narrow as its token. letter: points of a letter."""
    sizes = [10.0]
    for _, tokens, ids in rows:
        for token, i in zip(tokens, ids or ()):
            sizes.append(letter * len(readable(token)) / (0.68 * len(str(i))))
    return max(7, min(sizes))


def _draw_row(ax: Axes, y: int, row: Row, size: float, size_below: float) -> None:
    _, tokens, below = row
    x = 0
    for i, token in enumerate(tokens):
        shown = readable(token)
        colour = COLOURS[(4, 1, 2, 3)[i % 4]]
        ax.add_patch(Rectangle((x + 0.08, y - 0.3), len(shown) - 0.16, 0.5, facecolor=colour, alpha=0.4))
        middle = x + len(shown) / 2
        centred = dict(ha="center", va="center")
        ax.text(middle, y - 0.05, shown, family="monospace", fontsize=size, **centred)
        if below:
            ax.text(middle, y + 0.37, str(below[i]), fontsize=size_below, color="#444444", **centred)
        x += len(shown)


def draw_pieces(rows: Mapping[str, Sequence[str]], title: str, width: float = 11) -> Figure:
    """Pieces of a text, by the way in which it was cut."""
    return draw_tokens(
        [(label, [p.encode() for p in pieces], None) for label, pieces in rows.items()], title, width
    )


def draw_stages(text: str, merges: Sequence[Pair], merge_pair: Callable, after: Sequence[int]) -> Figure:
    """One text as tokens after so many merges."""
    tokens = [bytes([byte]) for byte in text.encode()]
    stages = [tokens]
    for pair in merges:
        tokens = merge_pair(tokens, pair)
        stages.append(tokens)
    rows = [(f"{n} merges: {len(stages[n])} tokens", stages[n], None) for n in after]
    return draw_tokens(rows, "One text after more and more merges")


def draw_encoding(piece: str, merges: Sequence[Pair], title: str, width: float = 7) -> Figure:
    """How a piece becomes tokens, merge by merge, each with its rank."""
    rank = {pair: i for i, pair in enumerate(merges)}
    tokens = [bytes([byte]) for byte in piece.encode()]
    rows: list[Row] = [("bytes", tokens, None)]
    while able := [(rank[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:])) if pair in rank]:
        lowest, i = min(able)
        tokens = [*tokens[:i], tokens[i] + tokens[i + 1], *tokens[i + 2 :]]
        rows.append((f"rank {lowest}", tokens, None))
    return draw_tokens(rows, title, width)


def draw_vocabulary_growth(words_so_far: Sequence[int], characters: int, every: int) -> Figure:
    """How many different words and characters a text has had, after every so many words."""
    fig, ax = figure(8, 3.8)
    read = [(i + 1) * every / 1000 for i in range(len(words_so_far))]
    ax.plot(read, words_so_far, color=COLOURS[0], linewidth=2, label="words")
    ax.axhline(characters, color=COLOURS[1], linestyle="--", linewidth=2, label="characters")
    ax.annotate(
        f"{characters} characters",
        (read[-1], characters),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
    )
    ax.set(
        title="Words keep coming, characters do not",
        xlabel="words read (thousands)",
        ylabel="different words or characters so far",
        ylim=(0, None),
    )
    ax.legend(frameon=False)
    return fig


def draw_touched(shares: Sequence[float]) -> Figure:
    """In what share of the different pieces each merge occurs."""
    fig, ax = figure(8, 3.8)
    ax.plot(range(1, len(shares) + 1), [100 * share for share in shares], ".", color=COLOURS[0])
    ax.set(
        title="What a merge touches",
        xlabel="merge",
        ylabel="share of the different pieces (%)",
        ylim=(0, None),
    )
    return fig


def draw_bars(
    values: Mapping[str, float], title: str, xlabel: str, unit: str = "", log: bool = False
) -> Figure:
    """A bar for each name, with its value at the end. log: the axis is logarithmic."""
    lines = max(name.count("\n") + 1 for name in values)
    fig, ax = figure(8, 1.1 + 0.42 * lines * len(values))
    ax.set_axisbelow(True)
    colours = [COLOURS[1] if name.startswith("yours") else COLOURS[0] for name in values]
    ax.barh(list(values), list(values.values()), color=colours)
    for i, value in enumerate(values.values()):
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        ax.annotate(text + unit, (value, i), xytext=(6, 0), textcoords="offset points", va="center")
    if log:
        ax.set_xscale("log")
    ax.set(title=title, xlabel=xlabel)
    ax.margins(x=0.3 if log else 0.12)
    ax.invert_yaxis()
    return fig


def draw_savings_and_cost(
    sizes: Sequence[int], bytes_per_token: Mapping[str, Sequence[float]], shares: Sequence[float]
) -> Figure:
    """By vocabulary size: the text that a token stands for, and the model's parameters that it takes."""
    fig, (left, right) = figure(11, 4, ncols=2)
    for i, (label, values) in enumerate(bytes_per_token.items()):
        style = dict(color=COLOURS[i], marker=MARKERS[i], linestyle=LINES[i], linewidth=2)
        left.plot(sizes, values, label=label, **style)
    left.set(
        title="What a larger vocabulary saves",
        ylabel="bytes per token",
        xlabel="vocabulary size (tokens)",
        ylim=(0.9, None),
    )
    left.legend(frameon=False)
    right.plot(sizes, [100 * share for share in shares], color=COLOURS[2], marker="^", linewidth=2)
    right.set(
        title="What it costs: embedding and output layer",
        ylabel="share of the parameters (%)",
        xlabel="vocabulary size (tokens)",
        ylim=(0, None),
    )
    return fig


def draw_by_seconds(runs: Mapping[str, LoggedRun], title: str) -> Figure:
    """Bits per byte of the held-out text against the seconds of training."""
    fig, ax = figure(8, 4.2)
    for i, (label, run) in enumerate(runs.items()):
        style = dict(color=COLOURS[i], marker=MARKERS[i], linestyle=LINES[i], linewidth=2)
        ax.plot(*run.series("val_bits_per_byte", "seconds"), label=label, **style)
    ax.set(title=title, xlabel="seconds of training", ylabel="bits per byte of the held-out text")
    ax.legend(frameon=False)
    return fig


def draw_sizes(studied: Mapping[int, float], characters: tuple[int, float] | None) -> Figure:
    """Bits per byte by vocabulary size, at equal compute; characters: their number and bits per byte."""
    fig, ax = figure(8, 4.2)
    sizes = sorted(studied)
    bits = [studied[size] for size in sizes]
    ax.plot(sizes, bits, color=COLOURS[0], marker="o", linewidth=2, label="byte-pair encoding")
    if characters:
        label = f"characters ({characters[0]} tokens)"
        ax.axhline(characters[1], color=COLOURS[1], linestyle="--", linewidth=2, label=label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.set(
        title="Vocabulary size, at equal compute (one run each)",
        xlabel="vocabulary size (tokens, logarithmic)",
        ylabel="bits per byte of the held-out text",
    )
    ax.legend(frameon=False)
    return fig


def draw_languages(tokens: Mapping[str, int], per_character: Mapping[str, float]) -> Figure:
    """What one sentence costs in tokens, by language."""
    fig, axes = figure(11, 3.6, ncols=2, sharey=True)
    shown = (
        (tokens, "The same sentence in GPT-2's tokens", "tokens", "{}"),
        (per_character, "How finely it is cut", "tokens per character", "{:.2f}"),
    )
    for ax, colour, (values, title, label, form) in zip(axes, COLOURS, shown):
        bars = ax.barh(list(values), list(values.values()), color=colour)
        ax.bar_label(bars, [form.format(value) for value in values.values()], padding=4)
        ax.set_axisbelow(True)
        ax.margins(x=0.12)
        ax.set(title=title, xlabel=label)
    axes[0].invert_yaxis()
    return fig
