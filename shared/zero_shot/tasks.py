"""Week 6. LAMBADA, PIQA and HellaSwag: examples from their files, and what a model makes of them.

LAMBADA (Paperno et al., 2016, in OpenAI's version) wants a passage's last word, PIQA (Bisk et al., 2020) and
HellaSwag (Zellers et al., 2019) the right one of two or four continuations. Prompts and metrics are those of
EleutherAI's lm-evaluation-harness.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from shared.assets import fetch
from shared.evaluation import MAX_TOKENS, perplexity
from shared.runtime import clock
from shared.tokenizers.base import Tokenizer
from shared.zero_shot.scoring import Likelihood, loglikelihoods

HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"


@dataclass(frozen=True)
class Example:
    """A context and what may follow it, after a space.

    With one choice the question is whether the model would write it.
    """

    context: str
    choices: tuple[str, ...]
    gold: int = 0
    """Number of the right choice."""


@dataclass(frozen=True)
class Record:
    """What a model made of one example."""

    example: Example
    scores: tuple[Likelihood, ...]
    """One for each choice."""

    @property
    def right(self) -> dict[str, bool]:
        """Which metrics count this example as right.

        Of one choice, acc: all its tokens are the model's first guess. Of several, acc: the right one is the
        likeliest; acc_norm: it is the likeliest for its length in characters.
        """
        if len(self.scores) == 1:
            return {"acc": self.scores[0].greedy}
        sums = [s.loglikelihood for s in self.scores]
        per_character = [s / len(c) if c else -math.inf for s, c in zip(sums, self.example.choices)]
        gold = self.example.gold
        return {
            "acc": sums.index(max(sums)) == gold,
            "acc_norm": per_character.index(max(per_character)) == gold,
        }


@dataclass(frozen=True)
class Result:
    """A task's score."""

    task: str
    records: tuple[Record, ...]
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """acc; with several choices acc_norm; with one, perplexity.

        Perplexity is exp of minus the mean log-likelihood of a whole choice.
        """
        right = [record.right for record in self.records]
        metrics = {name: sum(r[name] for r in right) / len(right) for name in right[0]}
        if "acc_norm" not in metrics:
            total = sum(record.scores[0].loglikelihood for record in self.records)
            metrics["perplexity"] = perplexity(-total / len(right))
        return metrics

    @property
    def standard_errors(self) -> dict[str, float]:
        """Of the accuracies: √(p (1 - p) / (n - 1)), nan for one example.

        The binomial one, its variance estimated without bias.
        """
        n = len(self.records)
        accuracies = {name: p for name, p in self.metrics.items() if name != "perplexity"}
        if n == 1:
            return dict.fromkeys(accuracies, math.nan)
        return {name: math.sqrt(p * (1 - p) / (n - 1)) for name, p in accuracies.items()}


def run_task(
    model: nn.Module,
    tokenizer: Tokenizer,
    task: str,
    examples: Sequence[Example],
    max_tokens: int = MAX_TOKENS,
    *,
    progress: bool = False,
) -> Result:
    """Scores `examples`, without any example of the task in the prompt. `task` is only the result's name."""
    if not examples:
        raise ValueError(f"{task}: no examples to score")
    start = clock()
    pairs = [(e.context, " " + choice) for e in examples for choice in e.choices]
    scores = iter(loglikelihoods(model, tokenizer, pairs, max_tokens, progress))
    records = tuple(Record(e, tuple(next(scores) for _ in e.choices)) for e in examples)
    return Result(task, records, clock() - start)


def read_lambada(path: str | Path) -> list[Example]:
    """LAMBADA from JSON lines with `text`: the last word, as spaces cut it, is what is to be guessed."""
    examples = []
    for where, row in _rows(path, {"text": str}):
        context, space, word = row["text"].rpartition(" ")
        if not context or not word:
            raise ValueError(
                f"{where}: expected a text that ends in a space and its last word, not {row['text'][-40:]!r}"
            )
        examples.append(Example(context, (word,)))
    return examples


def read_piqa(path: str | Path, labels: str | Path) -> list[Example]:
    """PIQA from JSON lines with `goal`, `sol1` and `sol2`, and a file with 0 or 1 for each."""
    rows = list(_rows(path, {"goal": str, "sol1": str, "sol2": str}))
    gold = [line.strip() for line in _lines(labels)]
    for number, label in enumerate(gold, 1):
        if label not in (b"0", b"1"):
            raise ValueError(
                f"{labels}, line {number}: expected 0 or 1, not {label[:40].decode(errors='replace')!r}"
            )
    if len(gold) != len(rows):
        raise ValueError(
            f"{labels} ends at line {len(gold)}, but {path} has {len(rows)} lines: the two do not belong"
            " together"
        )
    return [
        Example(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(label))
        for (_, row), label in zip(rows, gold)
    ]


def read_hellaswag(path: str | Path) -> list[Example]:
    """HellaSwag from its authors' JSON lines: `activity_label`, `ctx_a`, `ctx_b`, `endings` and `label`.

    The label is a number, or its digits.
    """
    fields = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (int, str)}
    examples = []
    for where, row in _rows(path, fields):
        endings = row["endings"]
        label = str(row["label"])
        if not endings or not all(isinstance(e, str) for e in endings):
            raise ValueError(f"{where}: 'endings' must be a list of texts")
        if label not in map(str, range(len(endings))):
            raise ValueError(
                f"{where}: label {label!r} is not the number of one of {len(endings)} endings, counted from 0"
            )
        context = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        examples.append(Example(context, tuple(map(_clean, endings)), int(label)))
    return examples


def _clean(text: str) -> str:
    """Without the marks in brackets that are left of WikiHow's pages; a title ends the sentence before it.

    >>> _clean("Baking: [header] How to bake [title] Mix the flour. [step] Stir.")
    'Baking: How to bake. Mix the flour. Stir.'
    """
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _lines(path: str | Path) -> list[bytes]:
    try:
        # Not where str.splitlines cuts: a text may hold U+2028.
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return lines[:-1] if lines[-1] == b"" else lines


def _rows(path: str | Path, fields: Mapping[str, Any]) -> Iterator[tuple[str, dict]]:
    """Each line's place ("FILE, line 3") and its JSON object, which has `fields` of these types.

    Raises ValueError for a line that is anything else.
    """
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{where}: not a line of JSON, the file is cut or damaged ({error})") from None
        values = row if isinstance(row, dict) else {}
        wrong = [field for field, kind in fields.items() if not isinstance(values.get(field), kind)]
        if wrong:
            raise ValueError(
                f"{where}: {', '.join(wrong)} missing or of another kind: expected an object with"
                f" {', '.join(fields)}"
            )
        yield where, row


def load_task(task: str, hellaswag: str | Path | None = None) -> list[Example]:
    """The examples of "lambada" (5,153), "piqa" (1,838) or "hellaswag" (10,042), fetched if need be.

    hellaswag: HellaSwag's file, downloaded by hand.
    """
    if task == "lambada":
        return read_lambada(fetch("lambada"))
    if task == "piqa":
        return read_piqa(fetch("piqa"), fetch("piqa-labels"))
    if task != "hellaswag":
        raise ValueError(f"no task is called {task!r}; there are: lambada, piqa, hellaswag")
    if hellaswag is None:
        raise ValueError(
            f"hellaswag is not fetched for you: download {HELLASWAG} and name the file with --hellaswag FILE"
        )
    return read_hellaswag(hellaswag)
