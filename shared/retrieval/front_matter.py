"""Week 11. YAML front matter on top of a Markdown file: what the file says of itself.

    ---
    title: Valves of the north pump house
    team: [pumps, safety]
    year: 2024
    ---

Scalars are read as YAML 1.2's core schema reads them, less its octal and hexadecimal numbers: true and false,
whole numbers, numbers with a point, and else text. So `NO`, `17:50`, `007` and `2024-05-01` are texts, as
they were meant; YAML 1.1, which PyYAML has by itself, makes False, 64200, 7 and a date of them.

Sources: YAML 1.2.2; front matter as pandoc's manual has it (extension yaml_metadata_block).
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from shared.extras import needs
from shared.retrieval.lines import Metadata, Value

with needs("rag"):
    import yaml

FRONT_MATTER = re.compile(r"---[ \t]*\n(?!\s*\n)(.*?)^(?:---|\.\.\.)[ \t]*$\n?", re.M | re.S)
BEGINS_LIKE_IT = re.compile(r"---[ \t]*\n\w[\w.-]*:(?:\s|$)")
LARGEST = 1 << 14
"""Characters of front matter."""
DEEPEST = 16
"""Mappings and lists in each other: PyYAML's time grows with the square of it."""
WHOLE_NUMBER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
NUMBER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)\.[0-9]+(?:[eE][-+]?[0-9]+)?")


class FrontMatter(NamedTuple):
    """What stands on top of a file, and what comes after it."""

    title: str
    """"" for none."""
    metadata: Metadata
    text: str
    """The file's text without its front matter."""
    remark: str = ""
    """Why what looks like front matter was read as text; "" where nothing does."""


def split_front_matter(text: str) -> FrontMatter:
    """The front matter of a text whose lines end with a line feed, and the text after it.

    Front matter is a YAML mapping between lines of `---`, or `---` and `...`, on top of the file. An empty
    line after the first one makes it a rule, and what is no mapping is text. What is written like front
    matter and cannot be read is text too, with a remark.

    >>> split_front_matter("---\\ntitle: 1984\\ndate: 2024-05-01\\n---\\nIt was a bright day.")[:3]
    ('1984', {'title': '1984', 'date': '2024-05-01'}, 'It was a bright day.')
    """
    found = FRONT_MATTER.match(text)
    if not found:
        unended = "it has no last line of ---" if BEGINS_LIKE_IT.match(text) else ""
        return FrontMatter("", {}, text, _remark(unended))
    if found.end() > LARGEST:
        return FrontMatter("", {}, text, _remark(f"it has over {LARGEST} characters"))
    try:
        metadata = _read(found[1])
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 2 if error.problem_mark else 1
        return FrontMatter("", {}, text, _remark(f"line {line}: {error.problem}"))
    except (yaml.YAMLError, ValueError) as error:
        return FrontMatter("", {}, text, _remark(" ".join(str(error).split())))
    if metadata is None:
        return FrontMatter("", {}, text)
    title = metadata.get("title", "")
    return FrontMatter(title if isinstance(title, str) else "", metadata, text[found.end() :])


def _remark(reason: str) -> str:
    return f"its front matter is read as text, and says nothing of it: {reason}" if reason else ""


def _read(text: str) -> Metadata | None:
    """The fields of a YAML mapping; None where the text is none. Raises ValueError and yaml.YAMLError."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        if isinstance(event, yaml.AliasEvent):  # for what may be large: a few lines can mean gigabytes
            raise ValueError("an alias (*name) is in it: write its value out")
    root = yaml.compose(text, Loader=yaml.BaseLoader)
    if not isinstance(root, yaml.MappingNode):
        return None
    metadata: Metadata = {}
    for name, node in _leaves(root, ""):
        if name in metadata:
            raise ValueError(f"the field {name!r} is in it twice")
        value = _value(node, text)
        if name == "title" and isinstance(node, yaml.ScalarNode):
            value = node.value  # 1984 and 1.50 as they are written
        if isinstance(value, str):
            value = " ".join(value.split())
        if value is not None and value != "":
            metadata[name] = value
    return metadata


def _leaves(mapping: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
    """The fields, those of a mapping in a mapping with its name before theirs: `author.name`."""
    for key, node in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError("a field's name must be a text")
        name = prefix + key.value
        if isinstance(node, yaml.MappingNode):
            yield from _leaves(node, f"{name}.")
        else:
            yield name, node


def _value(node: yaml.Node, text: str) -> Value | None:
    """A field's value; None for none. What a list has that is no scalar, it has as it is written."""
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else _plain(node.value)
    items = [
        item.value if isinstance(item, yaml.ScalarNode) else text[item.start_mark.index : item.end_mark.index]
        for item in node.value
    ]
    return [" ".join(item.split()) for item in items if item.strip()]


def _plain(text: str) -> Value | None:
    """What a scalar without quotes means."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if WHOLE_NUMBER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text
