"""Week 12. From tokens to text while it is being written, and which tokens each piece of it came from."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from shared.sampling.text import TextStream
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
    """A `TextStream` that keeps the tokens with their text.

    offset: where in the whole answer the text begins.

    >>> text = TextBuilder({0: b"a", 1: b"b", 2: b"c"}, ["bc"])
    >>> [text.push(Token(i)).text for i in (0, 1, 1, 2)], text.stopped
    (['a', '', 'b', ''], True)
    """

    def __init__(self, vocab: Mapping[int, bytes], stops: Sequence[str] = (), offset: int = 0):
        self._vocab = vocab
        self._offset = offset
        self._stream = TextStream(vocab, stops)
        self._tokens: list[tuple[Token, int]] = []
        self.count = 0
        """Tokens so far."""

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found."""
        return self._stream.stopped

    def push(self, token: Token) -> Piece:
        """Takes a token, and returns the text that can be shown now, perhaps none."""
        self.count += 1
        begin = self._length()
        text = self._stream.push(token.id)
        # Bytes before the token that are no character become U+FFFD only now, and move its beginning.
        with suppress(UnicodeDecodeError):
            begin = self._length() - len(self._vocab[token.id].decode())
        self._tokens.append((token, begin))
        return Piece(text, self._shown_tokens())

    def finish(self, ending: Sequence[Token] = ()) -> Piece:
        """What was held back; an unfinished character is U+FFFD.

        ending: the tokens that ended the text, and are not in it.
        """
        text = self._stream.finish()
        self.count += len(ending)
        end = self._offset + self._stream.shown
        tokens = self._shown_tokens() if self.stopped else tuple(self._tokens)
        return Piece(text, tokens, tuple((token, end) for token in ending))

    def _length(self) -> int:
        """Where the text ends that came so far, shown or held."""
        return self._offset + self._stream.shown + len(self._stream.held)

    def _shown_tokens(self) -> tuple[tuple[Token, int], ...]:
        """Lets go of the tokens that begin in the text that was shown."""
        end = self._offset + self._stream.shown
        count = 0
        while count < len(self._tokens) and self._tokens[count][1] < end:
            count += 1
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        return tuple(tokens)


def token_text(vocab: Mapping[int, bytes], i: int) -> str:
    """The text of one token; where its bytes are no text (half a character), as OpenAI's API writes it.

    >>> token_text({0: b"hi", 1: b"\\xe2\\x82"}, 0), token_text({0: b"hi", 1: b"\\xe2\\x82"}, 1)
    ('hi', 'bytes:\\\\xe2\\\\x82')
    """
    try:
        return vocab[i].decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in vocab[i])
