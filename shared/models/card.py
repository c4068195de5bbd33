"""Week 6. Model cards: what a model is, for those who find its files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.runtime import write_atomically


def model_card(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    *,
    figures: Sequence[Mapping[str, str]],
    usage: str,
    sample: str | None = None,
) -> Path:
    """Writes a model's card in Markdown: what it is, what was measured, how to load it, what it writes.

    facts: a line each. figures: the rows of a table, their keys its heading. usage: Python. sample: text by
    the model, where there is some. Returns the card's path.
    """
    heading = list(figures[0])
    ruler = ["---", *["---:"] * (len(heading) - 1)]
    rows = [heading, ruler, *(list(row.values()) for row in figures)]
    parts = [
        f"# {title}",
        "\n".join(f"- **{name}:** {fact}" for name, fact in facts.items()),
        "\n".join(f"| {' | '.join(cells)} |" for cells in rows),
        f"```python\n{usage}\n```",
    ]
    if sample is not None:
        parts.append(f"A sample:\n\n```text\n{sample.strip()}\n```")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path
