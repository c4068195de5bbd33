"""Week 12. From tokens to text while it is being written: complete characters only, and nothing that may be
the beginning of a stop text.
"""

import codecs
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from shared.serving.generation import Token


@dataclass(frozen=True)
class Piece:
    """Some text, and the tokens that it came from, each with the place in the text where it begins."""

    text: str
    tokens: tuple[tuple[Token, int], ...] = ()
    ending: tuple[tuple[Token, int], ...] = ()
    """Tokens that ended the text and are not in it."""

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(self.text + other.text, self.tokens + other.tokens, self.ending + other.ending)


class TextBuilder:
    """Turns tokens into text, up to the place where one of the texts in `stops` begins.

    Bytes that are not a complete character yet are held back, and so is what may be the beginning of a stop
    text. offset: where in the whole answer the text begins.

    >>> text = TextBuilder({0: b"a", 1: b"b", 2: b"c"}, ["bc"])
    >>> [text.push(Token(i)).text for i in (0, 1, 1, 2)], text.stopped
    (['a', '', 'b', ''], True)
    """

    def __init__(self, vocab: Mapping[int, bytes], stops: Sequence[str] = (), offset: int = 0):
        self._vocab = vocab
        self._stops = stops
        self._shown = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._tokens: list[tuple[Token, int]] = []
        self.count = 0
        """Tokens so far."""
        self.stopped = False
        """Whether a stop text was found."""

    def push(self, token: Token) -> Piece:
        """Takes a token, and returns the text that can be shown now, perhaps none."""
        self.count += 1
        token_bytes = self._vocab[token.id]
        begin = self._shown + len(self._held)
        self._held += self._decoder.decode(token_bytes)
        # Bytes before the token that are no character become U+FFFD only now, and move its beginning.
        with suppress(UnicodeDecodeError):
            begin = self._shown + len(self._held) - len(token_bytes.decode())
        self._tokens.append((token, begin))
        hits = [self._held.find(stop) for stop in self._stops if stop in self._held]
        if hits:
            self.stopped = True
            return self._show(min(hits))
        return self._show(len(self._held) - self._length_of_begun_stop())

    def finish(self, ending: Sequence[Token] = ()) -> Piece:
        """What was held back; an unfinished character is U+FFFD.

        ending: the tokens that ended the text, and are not in it.
        """
        self._held += self._decoder.decode(b"", final=True)
        piece = self._show(len(self._held))
        self.count += len(ending)
        tokens = (*piece.tokens, *self._tokens)
        return Piece(piece.text, tokens, tuple((token, self._shown) for token in ending))

    def _length_of_begun_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        lengths = [
            length
            for stop in self._stops
            for length in range(1, len(stop))
            if self._held.endswith(stop[:length])
        ]
        return max(lengths, default=0)

    def _show(self, length: int) -> Piece:
        """Lets go of the first `length` characters that are held, and of the tokens that begin in them."""
        text, self._held = self._held[:length], self._held[length:]
        self._shown += length
        count = 0
        while count < len(self._tokens) and self._tokens[count][1] < self._shown:
            count += 1
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        return Piece(text, tuple(tokens))


def token_text(vocab: Mapping[int, bytes], i: int) -> str:
    """The text of one token; where its bytes are no text (half a character), as OpenAI's API writes it.

    >>> token_text({0: b"hi", 1: b"\\xe2\\x82"}, 0), token_text({0: b"hi", 1: b"\\xe2\\x82"}, 1)
    ('hi', 'bytes:\\\\xe2\\\\x82')
    """
    try:
        return vocab[i].decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in vocab[i])
