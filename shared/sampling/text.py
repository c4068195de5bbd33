"""Week 1. From tokens to text while it is being written: whole characters only, up to a text that ends it."""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence

from shared.tokenizers.base import Tokenizer


class _StopSearch:
    """Looks for one text in another one that comes in pieces, in time that does not depend on how long it is.

    Source: Knuth, Morris and Pratt, "Fast Pattern Matching in Strings" (1977).
    """

    def __init__(self, stop: str):
        self.stop = stop
        self.begun = 0
        """How many characters of `stop` the text so far ends in; none once it was found."""
        self._found = False
        # How many characters go on being matched after so many that were, when the next one is another.
        self._shorter = [0]
        for character in stop[1:]:
            self._shorter.append(self._advance(self._shorter[-1], character))

    def find(self, piece: str) -> int | None:
        """Takes the next piece; returns where in it `stop` first ends, None where it does not."""
        if self._found:
            return None
        for place, character in enumerate(piece, 1):
            self.begun = self._advance(self.begun, character)
            if self.begun == len(self.stop):
                self._found = True
                self.begun = 0
                return place
        return None

    def _advance(self, begun: int, character: str) -> int:
        while begun and self.stop[begun] != character:
            begun = self._shorter[begun - 1]
        return begun + 1 if self.stop[begun] == character else 0


class TextStream:
    """Turns tokens into text, up to the first place where one of the texts in `stops` begins.

    Bytes that are not a complete character yet are held back, and so is what may be the beginning of a stop
    text. It is the text that counts: a stop text may begin and end inside of tokens. Where one lies inside of
    another ("bc" in "abcd"), the stream waits until it is known whether the longer one comes.

    >>> stream = TextStream({0: b"a", 1: b"b", 2: b"cd"}, ["bc"])
    >>> [stream.push(i) for i in (0, 1, 1, 2)], stream.stopped
    (['a', '', 'b', ''], True)
    """

    def __init__(self, vocab: Mapping[int, bytes], stops: Sequence[str] = ()):
        self._vocab = vocab
        self._searches = [_StopSearch(stop) for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        """Text that cannot be shown yet; once stopped, the stop text and what follows it."""
        self.shown = 0
        """How many characters were let go."""
        self.stopped = False
        """Whether it is known that a stop text ends the text, and which."""
        self._end: int | None = None
        """Where in the whole text the first of the stop texts begins that were found."""

    def push(self, token: int) -> str:
        """Takes a token, and returns the text that can be shown now, perhaps none.

        Raises ValueError for a token outside the vocabulary.
        """
        if token not in self._vocab:
            raise ValueError(f"the id {token} is not in the vocabulary of {len(self._vocab)} tokens")
        piece = self._decoder.decode(self._vocab[token])
        before = self.shown + len(self.held)
        self.held += piece
        if self.stopped:
            return ""
        ends = [(search.find(piece), len(search.stop)) for search in self._searches]
        found = [before + end - length for end, length in ends if end is not None]
        if found and (self._end is None or min(found) < self._end):
            self._end = min(found)
        # Here the earliest text begins that may still become a stop text.
        begun = before + len(piece) - max((search.begun for search in self._searches), default=0)
        if self._end is None or begun < self._end:
            return self._let_go(begun)
        self.stopped = True
        return self._let_go(self._end)

    def finish(self) -> str:
        """What was held back; an unfinished character is U+FFFD. Nothing of a stop text or what follows."""
        if self.stopped:
            return ""
        self.held += self._decoder.decode(b"", final=True)
        if self._end is None:
            return self._let_go(self.shown + len(self.held))
        self.stopped = True
        return self._let_go(self._end)

    def _let_go(self, end: int) -> str:
        """The text up to a place in the whole text that was not let go yet."""
        length = end - self.shown
        text, self.held = self.held[:length], self.held[length:]
        self.shown = end
        return text


def stream_text(tokenizer: Tokenizer, ids: Iterable[int], stops: Sequence[str] = ()) -> Iterator[str]:
    """Pieces of text as ids come in, up to the first of the texts in `stops`, which is not among them."""
    stream = TextStream(tokenizer.vocab, stops)
    for token in ids:
        piece = stream.push(token)
        if piece:
            yield piece
        if stream.stopped:
            return
    rest = stream.finish()
    if rest:
        yield rest
