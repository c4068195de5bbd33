"""Week 11. What a search is narrowed to: conditions on the fields of documents.

    {"team": "pumps", "year": {">=": 2020}}

Every field that is named must fit; a document without the field does not.

| the condition is | it fits |
| --- | --- |
| a text, a number, true or false | a field that equals it; a list that has it |
| a list of such | a field that equals one of them; a list that has one |
| `{">=": 2020, "<": 2024}`, with `<`, `<=`, `>`, `>=` | a field in this range; a list with an item in it |
| `{"!=": "draft"}` | a field that differs, a list without it, and a document without the field |

Numbers are compared with numbers and texts with texts, in the order of Unicode, which for dates like
2024-05-01 is that of time; true is no number. What this cannot say, a function of the fields can:
`lambda fields: fields["title"].startswith("Valves")`.
"""

import operator
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any

from shared.retrieval.lines import Metadata, Value

Scalar = str | int | float | bool
Condition = Scalar | Collection[Scalar] | Mapping[str, Scalar]
Where = Mapping[str, Condition] | Callable[[Metadata], bool]
"""Conditions by field, or a function of the fields."""

RANGES: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def fields_test(where: Where) -> Callable[[Metadata], bool]:
    """The function of a document's fields that says whether `where` fits them.

    >>> fits = fields_test({"team": ["pumps", "safety"], "year": {">=": 2020, "<": 2024}})
    >>> fits({"team": ["safety", "night"], "year": 2023}), fits({"team": "pumps", "year": 2024}), fits({})
    (True, False, False)

    Raises ValueError for conditions of another form.
    """
    if callable(where):
        return where
    if not isinstance(where, Mapping):
        raise ValueError(f"a filter maps fields to what they must be, or is a function; not {where!r}")
    tests = {name: _condition_test(name, condition) for name, condition in where.items()}

    def fits(fields: Metadata) -> bool:
        return all(test(_items(fields.get(name))) for name, test in tests.items())

    return fits


def _items(value: Value | None) -> Collection[Scalar]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _condition_test(name: str, condition: Condition) -> Callable[[Collection[Scalar]], bool]:
    """The test that a condition is on the values of a field."""
    if isinstance(condition, Mapping):
        return _comparison_test(name, condition)
    wanted: list[Any] = list(condition) if isinstance(condition, list | tuple | Set) else [condition]
    for value in wanted:
        _check_scalar(name, value)
    return lambda items: any(_equal(item, value) for item in items for value in wanted)


def _comparison_test(name: str, bounds: Mapping[str, Scalar]) -> Callable[[Collection[Scalar]], bool]:
    unknown = [sign for sign in bounds if sign not in RANGES and sign != "!="]
    if unknown or not bounds:
        what = repr(unknown[0]) if unknown else "an empty mapping"
        raise ValueError(f"{name}: {what} compares nothing; there are: {', '.join(RANGES)}, !=")
    for bound in bounds.values():
        _check_scalar(name, bound)
    ranges = {sign: bound for sign, bound in bounds.items() if sign in RANGES}

    def fits(items: Collection[Scalar]) -> bool:
        if "!=" in bounds and any(_equal(item, bounds["!="]) for item in items):
            return False
        return not ranges or any(_in_range(item, ranges) for item in items)

    return fits


def _check_scalar(name: str, value: object) -> None:
    if not isinstance(value, str | int | float):
        raise ValueError(
            f"{name}: {value!r} is no text, number, true or false: what a field is compared with must be one"
        )


def _kind(value: Scalar) -> type:
    """What a value can be compared with."""
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def _equal(value: Scalar, other: Scalar) -> bool:
    return _kind(value) is _kind(other) and value == other


def _in_range(value: Scalar, ranges: Mapping[str, Scalar]) -> bool:
    return all(_kind(value) is _kind(bound) and RANGES[sign](value, bound) for sign, bound in ranges.items())
