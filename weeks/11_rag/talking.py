"""Week 11's study of follow-up questions: searched as they are, by a rule, and as a model writes them."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from halves import HALVES, paired_difference
from library import HERE, Library, load_reading, open_library
from measures import with_bounds, with_intervals
from names import REWRITES
from shared.course.workspace import Workspace
from shared.models.gpt import GPT
from shared.models.names import model_label, named_run
from shared.retrieval.followups import needs_context, self_contained, title_of_best
from shared.retrieval.ranking import Interval, bootstrap
from shared.runtime import read_jsonl
from shared.sampling.generate import generate
from shared.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from run import Settings

EXAMPLES = """Before: How tall is the tower of Rowan Castle?
Then: And who built it?
Meant: Who built the tower of Rowan Castle?

Before: What does a loaf cost at the bakery?
Then: When does it open?
Meant: When does the bakery open?

Before: How long is the chess tournament in June?
Then: And in August?
Meant: How long is the chess tournament in August?

"""
"""What rewriting looks like. None of it is about the handbook."""
LONGEST = 32
"""Tokens of a question that the model writes."""
Rewrite = Callable[[str, str], str]
"""From the question before and the one that follows to the one that is searched."""


def study_followups(settings: "Settings", work: Workspace) -> dict[str, float]:
    """How often the first passage is the right one. All pairs were seen while the rule was made."""
    library = open_library(settings, work.device)
    model, tokenizer = load_reading(settings)
    pairs = read_jsonl(HERE / "followups.jsonl")
    if settings.preset == "smoke":
        pairs = pairs[:4]
    metrics: dict[str, float] = {}
    found: dict[str, dict[str, list[float]]] = {}
    for name, rewrite in rewrites(library, model.to(work.device), tokenizer).items():
        searched = [rewrite(pair["first"], pair["question"]) for pair in pairs]
        hits = [found_first(library, text, pair) for text, pair in zip(searched, pairs)]
        found[name] = {"A": hits[0::2], "B": hits[1::2]}
        scores = {f"hit@1_{half}": bootstrap(found[name][half]) for half in HALVES}
        run, label = f"{library.name}-followups-{name}", REWRITES[name]
        if name == "model":  # the others are rules
            run, label = named_run(settings.model, run), f"as {model_label(settings.model)} writes it"
        with work.log(run, settings) as log:
            log.artifact(searched=[pair | {"searched": text} for pair, text in zip(pairs, searched)])
            gains = gains_over("as-is", name, found)
            log.finish(name=label, pairs=len(pairs), **with_bounds(scores | gains))
        print(f"{label}: {with_intervals(scores)}")
        metrics |= {f"{name}_{key.replace('@', '_at_')}": score.mean for key, score in scores.items()}
    return metrics | measure_false_alarms(library, settings, work)


def gains_over(other: str, name: str, found: dict[str, dict[str, list[float]]]) -> dict[str, Interval]:
    """What a way of rewriting brings on each half, question by question."""
    return {f"gain_{half}": paired_difference(found[name][half], found[other][half]) for half in HALVES}


def rewrites(library: Library, model: GPT, tokenizer: Tokenizer) -> dict[str, Rewrite]:
    """The ways of `REWRITES`."""
    topic = title_of_best(library.index)

    def as_it_is(before: str, question: str) -> str:
        return question

    def after_the_first(before: str, question: str) -> str:
        return f"{before} {question}"

    def after_the_title(before: str, question: str) -> str:
        return f"{topic(before)}: {question}"

    def by_rule(before: str, question: str) -> str:
        return self_contained(question, [before], topic)

    def by_model(before: str, question: str) -> str:
        return rewritten(model, tokenizer, before, question) or question

    return {
        "as-is": as_it_is,
        "both": after_the_first,
        "title": after_the_title,
        "rule": by_rule,
        "model": by_model,
    }


def rewritten(model: GPT, tokenizer: Tokenizer, before: str, question: str) -> str:
    """The question as the model makes it self-contained: one line, the likeliest tokens."""
    ids = tokenizer.prompt(f"{EXAMPLES}Before: {before}\nThen: {question}\nMeant:")
    ends = {i for i, token in tokenizer.vocab.items() if b"\n" in token}
    ends |= set(tokenizer.special_tokens.values())
    drawn = generate(model, ids, LONGEST, temperature=0)
    return tokenizer.decode(list(takewhile(lambda i: i not in ends, drawn))).strip()


def found_first(library: Library, question: str, pair: dict[str, Any]) -> float:
    """1 where the first passage is the right one; a pair without a section takes any of its page."""
    chunk = library.index.search(question, 1)[0].chunk
    if chunk.source != pair["document"]:
        return 0.0
    return float(pair["section"] is None or chunk.headings[-1:] == (pair["section"],))


def measure_false_alarms(library: Library, settings: "Settings", work: Workspace) -> dict[str, float]:
    """What the rule costs where a question stands by itself: each of the handbook's after the one before it,
    which is about another page.
    """
    asked = [question for question in library.asked if question["section"]]
    before = [*asked[len(asked) // 2 :], *asked[: len(asked) // 2]]
    topic = title_of_best(library.index)
    plain: Sequence[float] = [found_first(library, q["question"], q) for q in asked]
    ruled = [
        found_first(library, self_contained(q["question"], [other["question"]], topic), q)
        for q, other in zip(asked, before)
    ]
    alarms = bootstrap([float(needs_context(q["question"])) for q in asked])
    cost = paired_difference(ruled, plain)
    with work.log(f"{library.name}-followups-alone", settings) as log:
        log.finish(questions=len(asked), **with_bounds({"alarms": alarms, "cost": cost}))
    print(
        f"questions that stand by themselves: taken for follow-ups {alarms.mean:.3f}, hit@1 {cost.mean:+.3f}"
    )
    return {"false_alarms": alarms.mean, "false_alarm_cost": cost.mean}
