"""Week 5. Tokens that are looked for in a text as a whole, before it is cut and merged.

Special ones, such as <|endoftext|>, are found only where the caller allows it; others, such as Qwen's
<tool_call>, are found in every text. Some take the white space beside them along.

>>> added = AddedTokens({"<end>": 7}, {"<tool>": 8}, rstrip=["<end>"])
>>> list(added.split("a<tool>b<end> c")), list(added.split("a<end> c", "all"))
(['a', 8, 'b<end> c'], ['a', 7, 'c'])

Source: the library `tokenizers`, whose rules these are.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

AllowedSpecial = Iterable[str] | Literal["all"]
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)
"""Unicode's White_Space; Python's own `isspace` has some control characters more."""
_SPACES = re.compile(f"[{WHITE_SPACE}]*")


class AddedTokens:
    """Finds added tokens in texts: at each place the longest, from left to right.

    special, plain: ids by the texts of the tokens, those that must be allowed and those that are always
    found. lstrip, rstrip: the tokens that take the white space on their left or right.
    """

    def __init__(
        self,
        special: Mapping[str, int],
        plain: Mapping[str, int],
        lstrip: Iterable[str] = (),
        rstrip: Iterable[str] = (),
    ):
        self.special = dict(special)
        self.plain = dict(plain)
        self.lstrip = frozenset(lstrip)
        self.rstrip = frozenset(rstrip)
        self._ids = {**self.plain, **self.special}
        self._finders: dict[frozenset[str], re.Pattern[str]] = {}

    def problems(self) -> list[str]:
        """What does not fit together."""
        found = []
        if "" in self._ids:
            found.append("special and added tokens must not be empty")
        if self.special.keys() & self.plain.keys():
            found.append("a token cannot be special and found in every text as well")
        unknown = (self.lstrip | self.rstrip) - self._ids.keys()
        if unknown:
            found.append(f"{min(unknown)!r} takes white space and is no special or added token")
        return found

    def split(self, text: str, allowed_special: AllowedSpecial = ()) -> Iterator[str | int]:
        """The ids of the tokens found, and the text between them.

        allowed_special: the special tokens that may be found; "all" allows all. Raises ValueError for one
        that doesn't exist.
        """
        finder = self._finder(allowed_special)
        start = 0
        for match in finder.finditer(text) if finder else ():
            token = match[0]
            begin, end = match.span()
            if token in self.lstrip:
                begin = start + len(text[start:begin].rstrip(WHITE_SPACE))
            if token in self.rstrip:
                end = _SPACES.match(text, end).end()  # type: ignore[union-attr]
            if start < begin:
                yield text[start:begin]
            yield self._ids[token]
            start = end
        if start < len(text):
            yield text[start:]

    def _finder(self, allowed_special: AllowedSpecial) -> re.Pattern[str] | None:
        """What finds those that are allowed; None where there is nothing to find."""
        special = frozenset(self.special if allowed_special == "all" else allowed_special)
        unknown = special - self.special.keys()
        if unknown:
            known = ", ".join(self.special) or "none"
            raise ValueError(f"no special token {min(unknown)!r}; there are: {known}")
        if not special and not self.plain:
            return None
        if special not in self._finders:
            self._finders[special] = re.compile(_longest_of([*special, *self.plain]))
        return self._finders[special]


def _longest_of(texts: Iterable[str]) -> str:
    """A regular expression for the longest of the texts that fits.

    What several begin with is written once: a model may have thousands, most of them alike.

    >>> _longest_of(["<a>", "<abc>", "<ab"])
    '(?:<a(?:>|b(?:c>)?))'
    """
    rests = defaultdict(list)
    for text in set(texts):
        rests[text[:1]].append(text)
    may_end = bool(rests.pop("", None))
    branches = []
    for first in sorted(rests):
        common = os.path.commonprefix(rests[first])
        branches.append(re.escape(common) + _longest_of(text[len(common) :] for text in rests[first]))
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if may_end else ''}"
