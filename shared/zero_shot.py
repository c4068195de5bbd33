"""Week 6. Zero-shot evaluation: what a GPT knows without being trained on the task, and its perplexity on a
long text.

A task is scored by likelihood: the model never writes, it is asked how probable given continuations are.
LAMBADA (Paperno et al., 2016, in OpenAI's version) wants a passage's last word, PIQA (Bisk et al., 2020) and
HellaSwag (Zellers et al., 2019) the right one of two or four continuations. Prompts and metrics are those of
EleutherAI's lm-evaluation-harness; `LMEvalAdapter` hands a GPT to that program.

    python -m shared.zero_shot --model smollm2 --tasks lambada piqa --limit 200
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from shared.assets import fetch
from shared.commandline import errors_for_people, parse_args
from shared.evaluation import Evaluation, bits_per_byte, perplexity
from shared.models.gpt import GPT
from shared.models.pretrained import load_model
from shared.runtime import clock, device_of, pick_device, table
from shared.sampling.generate import generate, stream_text
from shared.tokenizers import Tokenizer
from shared.tokenizers.bpe import END_OF_TEXT

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:  # LMEvalAdapter says so when it is made; all else here works without
    TemplateLM = object

MAX_TOKENS = 1024
"""Tokens in one forward pass. Its logits take 4 · vocab_size bytes for each: 200 MB for a vocabulary of
49,152.
"""
CHUNK = 256  # positions whose log-softmax is held at a time
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"


# ---- log-likelihoods


class Likelihood(NamedTuple):
    """How probable a model finds a continuation."""

    loglikelihood: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the model's first guess."""


@torch.no_grad()
def score_tokens(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int] | Tensor, int]],
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """For each row (ids, n): the log-probabilities of its last n ids, each given all before it, and whether
    it is the likeliest.

    Returns float32 [n] and bool [n] for each row, on the CPU, in the rows' order. Rows of like length share a
    forward pass of at most `max_tokens` tokens (a longer row has one to itself); padding on the right changes
    nothing, since a causal model does not look there. The model comes back in the mode (train or eval) it was
    in.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: must be at least 1; {MAX_TOKENS} is a good start")
    order = sorted(
        range(len(rows)), key=lambda i: -len(rows[i][0])
    )  # the longest first: what does not fit in memory fails at once
    scores: dict[int, tuple[Tensor, Tensor]] = {}
    was_training = model.training
    model.eval()
    try:
        with tqdm(
            total=len(rows), desc="scoring", unit="text", disable=None if progress else True, leave=False
        ) as bar:
            while order:
                size = max(1, max_tokens // (len(rows[order[0]][0]) - 1))
                batch, order = order[:size], order[size:]
                scores |= zip(batch, _score_batch(model, [rows[i] for i in batch]))
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return [scores[i] for i in range(len(rows))]


def _score_batch(
    model: nn.Module, rows: Sequence[tuple[Sequence[int] | Tensor, int]]
) -> list[tuple[Tensor, Tensor]]:
    device = device_of(model)
    ids = [torch.as_tensor(row, dtype=torch.int64, device=device) for row, _ in rows]
    logits = model(pad_sequence([x[:-1] for x in ids], batch_first=True))  # [batch, time, vocab_size]
    scores = []
    for x, (_, n), row_logits in zip(ids, rows, logits):
        parts = list(zip(row_logits[len(x) - 1 - n : len(x) - 1].split(CHUNK), x[-n:].split(CHUNK)))
        logprobs = torch.cat(
            [-F.cross_entropy(part.float(), target, reduction="none") for part, target in parts]
        )
        scores.append(
            (logprobs.cpu(), torch.cat([part.argmax(-1) == target for part, target in parts]).cpu())
        )
    return scores


def start_token(tokenizer: Tokenizer) -> int:
    """The id of <|endoftext|>, which stands before a text that has no context. Raises ValueError where the
    tokenizer has none.
    """
    specials = getattr(tokenizer, "special_tokens", {})
    if END_OF_TEXT not in specials:
        raise ValueError(
            f"an empty context needs a token to begin with, and this tokenizer has no {END_OF_TEXT}: give a"
            " context"
        )
    return specials[END_OF_TEXT]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both parts, as the harness cuts them: white space at the end of the context belongs to the
    continuation, and the two are encoded as one text, so that no token differs from those the model would
    have read. An empty context becomes <|endoftext|>.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return [start_token(tokenizer)], tokenizer.encode(continuation)
    before = tokenizer.encode(stripped)
    return before, tokenizer.encode(stripped + continuation)[len(before) :]


def loglikelihoods(
    model: nn.Module,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[Likelihood]:
    """How probable each continuation is after its context, for (context, continuation) pairs of text.

    A context that is too long for the model's block_size loses its beginning. Raises ValueError for a
    continuation that does not fit by itself, or that has no token of its own.
    """
    return _score_pairs(model, [encode_pair(tokenizer, *pair) for pair in pairs], max_tokens, progress)


def _score_pairs(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], max_tokens: int, progress: bool
) -> list[Likelihood]:
    limit = _block_size(model)
    rows = []
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError(
                "a context and a continuation need at least one token each; the last letters of a context may"
                " swallow a short text"
            )
        if len(continuation) > limit:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit in the model's"
                f" block_size={limit}: use a longer one"
            )
        rows.append(((context + continuation)[-limit - 1 :], len(continuation)))
    scores = score_tokens(model, rows, max_tokens, progress)
    return [Likelihood(logprobs.double().sum().item(), bool(greedy.all())) for logprobs, greedy in scores]


def _block_size(model: nn.Module) -> int:
    """The longest sequence a model takes; one that does not say (a bigram) takes any."""
    return getattr(model.config, "block_size", sys.maxsize)


# ---- perplexity of a long text


def sliding_window(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    stride: int,
    block_size: int | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Evaluation:
    """Measures `model` on all of `text` through windows of `block_size` tokens (None: the model's) that
    advance by `stride`.

    Each token but the first is scored once, in the first window that reaches it, so with all the tokens
    before it or with more than block_size - stride of them. A small stride gives the model more context and
    takes longer; stride = block_size is `evaluate` on windows side by side. The method is Hugging Face's
    ("Perplexity of fixed-length models"). Raises ValueError for a stride or size out of range, and for a text
    of fewer than two tokens.
    """
    limit = _block_size(model)
    block_size = limit if block_size is None else block_size
    if not 1 <= block_size <= limit:
        raise ValueError(f"block_size={block_size}: must be from 1 to the model's {limit}")
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"stride={stride}: must be from 1 (all the context there is, slow) to block_size={block_size}"
            " (windows side by side)"
        )
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    if len(ids) < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens: at least 2 are needed, one to predict the other from"
        )
    rows, done = [], 0  # ids up to number `done` are given or scored
    for begin in range(0, len(ids), stride):
        end = min(begin + block_size, len(ids) - 1)
        rows.append((ids[begin : end + 1], end - done))
        done = end
        if done == len(ids) - 1:
            break
    scores = score_tokens(model, rows, max_tokens, progress)
    logprobs, right = (torch.cat(parts) for parts in zip(*scores))
    loss = -logprobs.double().mean().item()
    return Evaluation(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=bits_per_byte(
            loss, len(logprobs), sum(len(tokenizer.vocab[i]) for i in ids[1:].tolist())
        ),
        accuracy=right.double().mean().item(),
        tokens=len(logprobs),
    )


# ---- the tasks


@dataclass(frozen=True)
class Example:
    """A context and what may follow it, after a space. With one choice the question is whether the model
    would write it.
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
        """Of one choice, acc: all its tokens are the model's first guess. Of several, acc: the right one is
        the likeliest; acc_norm: it is the likeliest for its length in characters.
        """
        if len(self.scores) == 1:
            return {"acc": self.scores[0].greedy}
        sums = [s.loglikelihood for s in self.scores]
        per_character = [s / len(c) if c else -math.inf for s, c in zip(sums, self.example.choices)]
        return {
            name: values.index(max(values)) == self.example.gold
            for name, values in (("acc", sums), ("acc_norm", per_character))
        }


@dataclass(frozen=True)
class Result:
    """A task's score."""

    task: str
    records: tuple[Record, ...]
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """acc; with several choices acc_norm; with one, perplexity: exp of minus the mean log-likelihood of a
        whole choice.
        """
        right = [r.right for r in self.records]
        metrics = {name: sum(r[name] for r in right) / len(right) for name in right[0]}
        if "acc_norm" not in metrics:
            metrics["perplexity"] = perplexity(
                -sum(r.scores[0].loglikelihood for r in self.records) / len(right)
            )
        return metrics

    @property
    def standard_errors(self) -> dict[str, float]:
        """Of the accuracies: √(p (1 - p) / (n - 1)), the binomial one, its variance estimated without bias;
        nan for one example.
        """
        n = len(self.records)
        return {
            name: math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan
            for name, p in self.metrics.items()
            if name != "perplexity"
        }


def run_task(
    model: nn.Module,
    tokenizer: Tokenizer,
    task: str,
    examples: Sequence[Example],
    max_tokens: int = MAX_TOKENS,
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
    """HellaSwag from its authors' JSON lines: `activity_label`, `ctx_a`, `ctx_b`, `endings` and `label` (a
    number, or its digits).
    """
    examples = []
    for where, row in _rows(
        path, {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (int, str)}
    ):
        endings, label = row["endings"], str(row["label"])
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
        lines = (
            Path(path).read_bytes().split(b"\n")
        )  # and not where str.splitlines cuts: a text may hold U+2028
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return lines[:-1] if lines[-1] == b"" else lines


def _rows(path: str | Path, fields: dict[str, Any]) -> Iterator[tuple[str, dict]]:
    """Each line's place ("FILE, line 3") and its JSON object, which has `fields` of these types, or
    ValueError.
    """
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{where}: not a line of JSON, the file is cut or damaged ({error})") from None
        wrong = (
            list(fields)
            if not isinstance(row, dict)
            else [f for f, kind in fields.items() if not isinstance(row.get(f), kind)]
        )
        if wrong:
            raise ValueError(
                f"{where}: {', '.join(wrong)} missing or of another kind: expected an object with"
                f" {', '.join(fields)}"
            )
        yield where, row


def load_task(task: str, hellaswag: str | Path | None = None) -> list[Example]:
    """The examples of "lambada" (5,153), "piqa" (1,838) or "hellaswag" (10,042), fetched if need be;
    HellaSwag's file is given by hand.
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


# ---- lm-eval


class LMEvalAdapter(TemplateLM):
    """A GPT and its tokenizer as a model of lm-eval: `lm_eval.simple_evaluate(model=LMEvalAdapter(model,
    tokenizer), tasks=[...])`.

    Raises ValueError where lm-eval is not installed. An empty context is <|endoftext|>; writing ends at any
    special token.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, max_tokens: int = MAX_TOKENS):
        if TemplateLM is object:
            raise ValueError("LMEvalAdapter needs the package lm-eval: pip install lm-eval==0.4.13")
        super().__init__()
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens

    @property
    def eot_token_id(self) -> int:
        return start_token(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer.encode(
            string
        )  # adds nothing, whatever is asked: our models have no token that opens every text

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Likelihood]:
        return _score_pairs(
            self.model,
            [(context, continuation) for _, context, continuation in requests],
            self.max_tokens,
            not disable_tqdm,
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        sums = []
        for text in (self.tok_encode(*request.args) for request in requests):
            windows = get_rolling_token_windows(
                text, self.prefix_token_id, _block_size(self.model), context_len=1
            )
            scores = _score_pairs(
                self.model, [make_disjoint_window(w) for w in windows], self.max_tokens, not disable_tqdm
            )
            sums.append(sum(s.loglikelihood for s in scores))
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for context, asked in tqdm(
            [request.args for request in requests], desc="writing", disable=disable_tqdm
        ):
            settings = normalize_gen_kwargs(asked)
            until, new_tokens, limit = settings["until"], settings["max_gen_toks"], _block_size(self.model)
            if new_tokens >= limit:
                raise ValueError(
                    f"max_gen_toks={new_tokens} leaves no room for a prompt in block_size={limit}: ask for"
                    " less"
                )
            ids = generate(
                self.model,
                self.tok_encode(context)[new_tokens - limit :] or [self.prefix_token_id],
                new_tokens,
                settings.get("temperature", 1.0 if settings["do_sample"] else 0.0),
                top_k=settings.get("top_k"),
                top_p=settings.get("top_p"),
                stop=list(getattr(self.tokenizer, "special_tokens", {}).values()),
                seed=0,
            )
            text = ""
            for piece in stream_text(self.tokenizer, ids):
                text += piece
                if any(stop and stop in text for stop in until):
                    break
            texts.append(postprocess_generated_text(text, until, think_end_token=None))
        return texts


# ---- command line


@dataclass(frozen=True)
class Settings:
    """Zero-shot accuracy of a GPT."""

    model: str
    """"smollm2", a checkpoint's folder, or a Hugging Face model's folder or hub name."""
    tasks: tuple[Literal["lambada", "piqa", "hellaswag"], ...] = ("lambada", "piqa")
    limit: int | None = None
    """Only the first so many examples of each task."""
    hellaswag: str | None = None
    """HellaSwag's file hellaswag_val.jsonl, downloaded by hand."""
    max_tokens: int = MAX_TOKENS
    """Tokens in one forward pass: less takes less memory."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("limit", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")


def main(settings: Settings) -> list[Result]:
    """Prints a table with a line for each task and metric."""
    tasks = {task: load_task(task, settings.hellaswag)[: settings.limit] for task in settings.tasks}
    model = load_model(settings.model, pick_device(settings.device))
    if model.tokenizer is None:
        raise ValueError(f"{settings.model} comes without a tokenizer of ours: its ids have no text to score")
    results = [
        run_task(model, model.tokenizer, task, examples, settings.max_tokens, progress=True)
        for task, examples in tasks.items()
    ]
    rows = [
        {
            "task": r.task,
            "metric": name,
            "value": value,
            "standard error": r.standard_errors.get(name),
            "examples": len(r.records),
            "seconds": r.seconds,
        }
        for r in results
        for name, value in r.metrics.items()
    ]
    print(table(rows))
    return results


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
