"""Week 12. The HTML of the chat page: tokens in the shades of their probabilities, passages, and messages.

Whatever a model, a document or a visitor says is escaped here: it is shown as text and never as markup.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from shared.retrieval.evidence import Source
from shared.serving.generation import Token
from shared.serving.text import token_text

SHADES = (
    (0.5, "over 50 %"),
    (0.2, "20 to 50 %"),
    (0.05, "5 to 20 %"),
    (0.01, "1 to 5 %"),
    (0.0, "under 1 %"),
)
"""Least probability of each shade, and what the legend says. The shades grow darker, which can be told apart
without seeing colours.
"""

CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
#new { white-space: nowrap; padding-left: 0.5rem; padding-right: 0.5rem; }
.title h1 { font-size: 1.7rem; margin: 0.6rem 0 0.2rem; }
.title p, .hint { color: var(--body-text-color-subdued); margin: 0 !important; }
.chat .message-content { white-space: pre-wrap; }
/* its button would clear what is shown, and not what the model is given */
.chat .top-panel { display: none; }
#status:not(:has(.status:not(:empty))), #passages:not(:has(.passage)) { display: none; }
.status.prose { min-height: 1.5rem; color: var(--body-text-color-subdued); }
.status .problem { color: #7f2704; background: #fff3e6; border-left: 4px solid #b83c00;
  padding: 0.5rem 0.8rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 0.5rem; align-items: center; font-size: 0.9rem; }
.legend b { font-weight: 600; }
/* the likeliest tokens of the last line stand below it */
#tokens, #tokens > * { overflow: visible !important; }
.tokens.prose { position: relative; font-family: var(--font-mono); font-size: 0.95rem; line-height: 1.9;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.shade { padding: 0.15rem 0.05rem; border-radius: 3px; color: #1a1a1a; }
.legend .shade { padding: 0.1rem 0.5rem; border: 1px solid #d9d9d9; }
.shade-0 { background: #ffffff; }
.shade-1 { background: #fee6ce; }
.shade-2 { background: #fdae6b; }
.shade-3 { background: #b83c00; color: #ffffff; }
.shade-4 { background: #5c1a02; color: #ffffff; }
.tokens .shade { cursor: default; }
.tokens .shade:hover, .tokens .shade:focus { outline: 2px solid #0072b2; }
.likeliest { display: none; position: absolute; left: 0; margin-top: 1.8rem; z-index: 9; pointer-events: none;
  padding: 0.4rem 0.7rem; background: #ffffff; color: #1a1a1a; border: 1px solid #0072b2; border-radius: 6px;
  font-size: 0.85rem; line-height: 1.5; }
.shade:hover > .likeliest, .shade:focus > .likeliest { display: grid; grid-template-columns: auto auto;
  column-gap: 1.2rem; }
.likeliest .chosen { font-weight: 700; }
.likeliest .share { text-align: right; }
.passage { border-left: 4px solid #0072b2; padding: 0.2rem 0.9rem; margin: 0.5rem 0; white-space: pre-wrap; }
.passage cite { font-weight: 600; font-style: normal; }
.passage .score { color: var(--body-text-color-subdued); }
.passage mark { background: #cfe8f7; color: #1a1a1a; border-radius: 3px; }
"""


def title(name: str, description: str) -> str:
    """The heading of the page."""
    return (
        f"<div class=title><h1>{escape(name)}</h1><p>{description} Everything is computed by the server"
        " that this page comes from.</p></div>"
    )


def legend() -> str:
    """What the shades mean."""
    shades = "".join(f'<span class="shade shade-{n}">{text}</span>' for n, (_, text) in enumerate(SHADES))
    return (
        f"<div class=legend><b>Token by token</b> {shades}</div><p class=hint>Point at a token, or tap it:"
        " what else could have stood there?</p>"
    )


def token_view(vocab: Mapping[int, bytes], tokens: Sequence[Token]) -> str:
    """Each token in the shade of its probability. Pointing at one shows the likeliest tokens at its place.

    vocab: the bytes of each id. tokens: with log-probabilities; ValueError for one without. The classes are
    those of `CSS`.
    """
    return "".join(_token(vocab, token) for token in tokens)


def _token(vocab: Mapping[int, bytes], token: Token) -> str:
    if token.logprob is None:
        raise ValueError("a token without a log-probability has no shade")
    rows = list(token.top)
    if token.id not in dict(token.top):
        rows.append((token.id, token.logprob))
    likeliest = "".join(_likely(vocab, i, logprob, chosen=i == token.id) for i, logprob in rows)
    probability = math.exp(token.logprob)
    shade = next(n for n, (least, _) in enumerate(SHADES) if probability >= least)
    text = _visible(vocab, token.id).replace("\n", "↵\n")
    # tabindex -1: a tap gives it the focus, and shows what a mouse does, but the tab key does not go through
    # all tokens.
    return (
        f'<span class="shade shade-{shade}" tabindex=-1>{text}<span class=likeliest>{likeliest}</span></span>'
    )


def _likely(vocab: Mapping[int, bytes], i: int, logprob: float, *, chosen: bool) -> str:
    """A row of the likeliest tokens: text and share."""
    text = _visible(vocab, i).replace(" ", "␣").replace("\n", "↵")
    mark = " class=chosen" if chosen else ""
    return f"<span{mark}>{text}</span><span class=share>{_share(logprob)}</span>"


def _visible(vocab: Mapping[int, bytes], i: int) -> str:
    return escape(token_text(vocab, i).removeprefix("bytes:")).replace("\t", "⇥")


def _share(logprob: float) -> str:
    percent = 100 * math.exp(logprob)
    return f"{percent:.1f} %" if percent >= 0.1 else "under 0.1 %"


def passages(sources: Sequence[Source]) -> str:
    """The passages that an answer rests on, each under its place and score, the sentences that support it
    marked.
    """
    return "".join(
        f"<div class=passage><cite>{escape(source.chunk.cite)}</cite> <span class=score>score"
        f" {source.score:.2f}</span>\n{_with_marks(source)}</div>"
        for source in sources
    )


def _with_marks(source: Source) -> str:
    text, pieces, at = source.chunk.text, [], 0
    for start, end, score in source.sentences:
        pieces.append(escape(text[at:start]))
        pieces.append(f'<mark title="score {score:.2f}">{escape(text[start:end])}</mark>')
        at = end
    return "".join([*pieces, escape(text[at:])])


def problem(error: Exception | str) -> str:
    """What went wrong, in a box that screen readers announce."""
    text = str(error)
    return f"<div class=problem role=alert>{escape(text[:1].upper() + text[1:])}</div>"


def chat_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """A conversation for Gradio's chatbot, which shows it unchanged.

    Given plain strings it would take them for HTML and strip their spaces; a list of escaped parts it leaves
    alone.
    """
    return [
        {"role": m["role"], "content": [{"type": "text", "text": escape(m["content"], quote=False)}]}
        for m in messages
    ]
