"""The copying tasks of week 11's study of week 6's model. First things that nobody can foresee are copied;
then sentences about things that do not exist are asked about, and the answer stands in the sentence word for
word.

Nothing in them can be known beforehand: what can be learned is to find a place in what was read, and which
place a question asks for. The kinds of facts, in copying.json, are general (who, when, how many, what it
costs); names are put together from syllables.

Sources: Olsson et al., "In-context Learning and Induction Heads" (2022), for copying as a skill of attention,
which comes all at once; Weston et al., "Towards AI-Complete Question Answering" (2015), for facts from
templates.
"""

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

from shared.runtime import read_json

_KEPT = read_json(Path(__file__).with_name("copying.json"))
WORDS = {name: words.split(", ") for name, words in _KEPT["words"].items()}
FACTS = _KEPT["facts"]
"""Each with what is `said`, and what is `asked` for: by slots, the ways to ask. A slot stands for the same
words wherever it stands in a fact.
"""


COPIED = ("name", "name", "name", "person", "count", "year", "time", "colour", "thing", "animal", "trade")
"""The kinds of things that a row to copy has, drawn evenly."""


def row_to_copy(chance: Random) -> str:
    """Eight to twenty things, one after the other."""
    return " ".join(DRAWN[chance.choice(COPIED)](chance) for _ in range(chance.randint(8, 20)))


def made_up(chance: Random) -> tuple[str, str, str]:
    """A sentence under two headings, a question on it, and its answer: a span of the sentence.

    In one of three another fact is said before or after it.
    """
    facts = chance.sample(FACTS, 2 if chance.random() < 1 / 3 else 1)
    values = [slot_values(fact["said"], chance) for fact in facts]
    said = [fact["said"].format_map(slots) for fact, slots in zip(facts, values)]
    chance.shuffle(said)
    wanted, ways = chance.choice(list(facts[0]["asked"].items()))
    headings = f"The {_word('places', chance)} of {_name(chance)}. {_word('things', chance).capitalize()}"
    answer = " ".join(values[0][slot] for slot in wanted.split())
    return f"{headings}. {' '.join(said)}", chance.choice(ways).format_map(values[0]), answer


def slot_values(said: str, chance: Random) -> dict[str, str]:
    """What the slots of a text are filled with, no two alike; "price2" is another price."""
    values: dict[str, str] = {}
    for slot in re.findall(r"{(\w+)}", said):
        draw = DRAWN[slot.rstrip("0123456789")]
        while slot not in values:
            value = draw(chance)
            if value not in values.values():
                values[slot] = value
    return values


def _word(kind: str, chance: Random) -> str:
    return chance.choice(WORDS[kind])


def _name(chance: Random) -> str:
    return "".join(_word("syllables", chance) for _ in range(chance.choice((2, 2, 3)))).capitalize()


def _count(chance: Random) -> str:
    """In three of ten a word."""
    if chance.random() < 0.3:
        return _word("words", chance)
    return str(chance.choice((chance.randint(2, 30), chance.randint(2, 99), chance.randint(100, 990))))


def _measure(units: str, chance: Random) -> str:
    """A number, one of eight with a decimal, and a unit."""
    decimal = f".{chance.randint(1, 9)}" if chance.random() < 1 / 8 else ""
    count = _count(chance)
    return f"{count}{decimal if count.isdigit() else ''} {_word(units, chance)}"


DRAWN: dict[str, Callable[[Random], str]] = {
    "person": lambda chance: f"{_word('first', chance)} {_name(chance)}",
    "name": _name,
    "count": _count,
    "price": lambda chance: _measure("coins", chance),
    "length": lambda chance: _measure("units", chance),
    "span": lambda chance: _measure("spans", chance),
    "year": lambda chance: str(chance.randint(1500, 1999)),
    "time": lambda chance: f"{chance.randint(5, 22):02}:{chance.randrange(0, 60, 5):02}",
    "date": lambda chance: f"{chance.randint(1, 28)} {_word('months', chance)}",
    "day": lambda chance: _word("days", chance),
    "month": lambda chance: _word("months", chance),
    "colour": lambda chance: _word("colours", chance),
    "animal": lambda chance: _word("animals", chance),
    "food": lambda chance: _word("foods", chance),
    "stuff": lambda chance: _word("stuffs", chance),
    "thing": lambda chance: _word("things", chance),
    "trade": lambda chance: _word("trades", chance),
    "place": lambda chance: _word("places", chance),
    "event": lambda chance: _word("events", chance),
    "group": lambda chance: _word("groups", chance),
}
"""What a slot is filled with, by its name."""
