"""Week 12. The page: a chat in the browser with what `create_app` serves, on the same engine and within the
same limits.

    app = create_app(model, tokenizer, "my-gpt")
    add_page(app)                            # python -m shared.serving --page does this and serves it

A model with a chat template answers, any other goes on with what is typed. Every token that is written is
shown in the shade of its probability, with the likeliest others. With an index of documents (week 11) the
page also answers from them, and shows what it read.

Where the server has an API key, the page asks for it before it shows anything. Its fonts and scripts come
from this server, and what a model or a document says is shown as text and never as markup: it cannot make the
browser fetch anything.
"""

import asyncio
import hmac
import math
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import FastAPI

from shared.models.pretrained import chat_prompt, is_chat
from shared.retrieval.documents import Chunk
from shared.retrieval.rag import ABSTENTION, compose
from shared.serving.api import Answer, describe_size
from shared.serving.engine import Draining, QueueFull, Token
from shared.serving.gate import ApiError
from shared.serving.protocol import CompletionBody, token_text

if TYPE_CHECKING:  # a page without documents needs no FAISS
    from shared.retrieval.index import Index

SHADES = (
    (0.5, "over 50 %"),
    (0.2, "20 to 50 %"),
    (0.05, "5 to 20 %"),
    (0.01, "1 to 5 %"),
    (0.0, "under 1 %"),
)
"""Least probability of each shade, and what the legend says. They grow darker: that can be told apart without
seeing colours.
"""
LIKELIEST = 5
"""So many tokens are named at each place."""
LONGEST = 1000
"""Tokens that may be asked for; the API gives more."""
EVERY = 0.1
"""Seconds between two looks at a text that is being written: more often would only keep the browser busy."""

CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
#new { white-space: nowrap; padding-left: 0.5rem; padding-right: 0.5rem; }
.title h1 { font-size: 1.7rem; margin: 0.6rem 0 0.2rem; }
.title p, .hint { color: var(--body-text-color-subdued); margin: 0 !important; }
.chat .message-content { white-space: pre-wrap; }
.chat .top-panel { display: none; } /* its button would clear what is shown, and not what the model is given */
#status:not(:has(.status:not(:empty))), #passages:not(:has(.passage)) { display: none; }
.status.prose { min-height: 1.5rem; color: var(--body-text-color-subdued); }
.status .problem { color: #7f2704; background: #fff3e6; border-left: 4px solid #b83c00; padding: 0.5rem 0.8rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 0.5rem; align-items: center; font-size: 0.9rem; }
.legend b { font-weight: 600; }
#tokens, #tokens > * { overflow: visible !important; } /* the likeliest of the last line stand below it */
.tokens.prose { position: relative; font-family: var(--font-mono); font-size: 0.95rem; line-height: 1.9; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.shade { padding: 0.15rem 0.05rem; border-radius: 3px; color: #1a1a1a; }
.legend .shade { padding: 0.1rem 0.5rem; border: 1px solid #d9d9d9; }
.shade-0 { background: #ffffff; }
.shade-1 { background: #fee6ce; }
.shade-2 { background: #fdae6b; }
.shade-3 { background: #b83c00; color: #ffffff; }
.shade-4 { background: #5c1a02; color: #ffffff; }
.tokens .shade { cursor: default; }
.tokens .shade:hover, .tokens .shade:focus { outline: 2px solid #0072b2; }
.likeliest { display: none; position: absolute; left: 0; margin-top: 1.8rem; z-index: 9; pointer-events: none; padding: 0.4rem 0.7rem;
  background: #ffffff; color: #1a1a1a; border: 1px solid #0072b2; border-radius: 6px; font-size: 0.85rem; line-height: 1.5; }
.shade:hover > .likeliest, .shade:focus > .likeliest { display: grid; grid-template-columns: auto auto; column-gap: 1.2rem; }
.likeliest .chosen { font-weight: 700; }
.likeliest .share { text-align: right; }
.passage { border-left: 4px solid #0072b2; padding: 0.2rem 0.9rem; margin: 0.5rem 0; white-space: pre-wrap; }
.passage cite { display: block; font-weight: 600; font-style: normal; }
"""


def add_page(app: FastAPI, index: "Index | None" = None) -> FastAPI:
    """Puts the page at `/` of an app from `create_app`, before it is served. index: the documents that it can
    answer from.
    """
    key = app.state.api_key
    page = _Page(app, index).blocks
    return gr.mount_gradio_app(
        app,
        page,
        "/",
        css=CSS,
        theme=_theme(),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        auth=(lambda _, password: hmac.compare_digest(password.encode(), key.encode())) if key else None,
        auth_message="The password is this server's API key; the user name may be anything.",
        max_file_size=1,  # byte: the page takes no files, but Gradio would
    )


def token_view(vocab: Mapping[int, bytes], tokens: Sequence[Token]) -> str:
    """HTML: each token in the shade of its probability, and to be shown when it is pointed at, the likeliest
    at its place.

    vocab: the tokenizer's. tokens: with log-probabilities. The classes are those of `CSS`.
    """
    return "".join(_token(vocab, token) for token in tokens)


def _token(vocab: Mapping[int, bytes], token: Token) -> str:
    rows = [*token.top, *([] if token.id in dict(token.top) else [(token.id, token.logprob)])]
    likeliest = "".join(
        f"<span{' class=chosen' if i == token.id else ''}>{_visible(vocab, i, '␣')}</span><span"
        f" class=share>{_share(logprob)}</span>"
        for i, logprob in rows
    )
    shade = next(n for n, (least, _) in enumerate(SHADES) if math.exp(token.logprob) >= least)
    # It can take the focus, so that a tap shows what a mouse does, but a keyboard need not go through all
    # tokens.
    return (
        f'<span class="shade shade-{shade}" tabindex=-1>{_visible(vocab, token.id, " ")}<span'
        f" class=likeliest>{likeliest}</span></span>"
    )


def _visible(vocab: Mapping[int, bytes], i: int, space: str) -> str:
    text = token_text(vocab, i).removeprefix("bytes:")
    return escape(text).replace(" ", space).replace("\t", "⇥").replace("\n", "↵\n" if space == " " else "↵")


def _share(logprob: float) -> str:
    percent = 100 * math.exp(logprob)
    return f"{percent:.1f} %" if percent >= 0.1 else "under 0.1 %"


def _legend() -> str:
    shades = "".join(f'<span class="shade shade-{n}">{text}</span>' for n, (_, text) in enumerate(SHADES))
    return (
        f"<div class=legend><b>Token by token</b> {shades}</div><p class=hint>Point at a token, or tap it:"
        " what else could have stood there?</p>"
    )


def _passages(chunks: Sequence[Chunk]) -> str:
    return "".join(
        f"<div class=passage><cite>{escape(chunk.cite)}</cite>{escape(chunk.text)}</div>" for chunk in chunks
    )


def _problem(error: Exception | str) -> str:
    text = str(error)
    return f"<div class=problem role=alert>{escape(text[:1].upper() + text[1:])}</div>"


def _seed(text: str) -> int | None:
    try:
        return int(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"the seed {text!r} is no whole number: give one, or leave it empty") from None


def _theme() -> gr.Theme:
    theme = gr.themes.Default(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="gray",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    return theme.set(
        body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600", layout_gap="10px"
    )  # the usual grey is too light


class _Page:
    """The page, and what its buttons do. A conversation is a list of {"role", "content"}, which is kept here:
    the browser only shows it.
    """

    def __init__(self, app: FastAPI, index: "Index | None"):
        self._state, self._index = app.state, index
        self._vocab = app.state.tokenizer.vocab
        self._chats = is_chat(app.state.tokenizer)
        self._running: dict[str, Answer] = {}  # by browser tab
        self._searching = threading.Lock()  # an embedder is not made for two threads
        name = next(iter(app.state.models))
        with gr.Blocks(analytics_enabled=False, title=name) as self.blocks:
            gr.HTML(self._title(name))
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._build_chat()
                with gr.Column(scale=1, min_width=260):
                    self._build_controls()
            self._connect()

    def _title(self, name: str) -> str:
        size = f"{describe_size(self._state.engine.model)}, {self._state.engine.max_length} tokens of context"
        kind = (
            "It answers what you write"
            if self._chats
            else "It has learned no conversation: it goes on with the text that you begin"
        )
        return (
            f"<div class=title><h1>{escape(name)}</h1><p>{size}. {kind}. Everything is computed by the server"
            " that this page comes from.</p></div>"
        )

    def _build_chat(self) -> None:
        self._talk = gr.State([])
        self._chat = gr.Chatbot(
            show_label=False,
            height=380,
            buttons=[],
            render_markdown=False,
            feedback_options=None,
            elem_classes="chat",
            placeholder="What is said stands here.",
            elem_id="chat",
        )
        what, example = (
            ("Your message", "Why is the sky blue?") if self._chats else ("The beginning of a text", "ROMEO:")
        )
        self._text = gr.Textbox(
            label=what, placeholder=example, lines=1, max_lines=8, autofocus=True, elem_id="text"
        )
        with gr.Row():
            self._send = gr.Button(
                "Send" if self._chats else "Go on", variant="primary", min_width=80, elem_id="send"
            )
            self._stop = gr.Button("Stop", variant="stop", interactive=False, min_width=80, elem_id="stop")
            self._new = gr.Button("New chat" if self._chats else "Clear", min_width=80, elem_id="new")
        self._status = gr.HTML(elem_classes="status", elem_id="status")
        self._passages = gr.HTML(elem_id="passages")
        gr.HTML(_legend())
        self._tokens = gr.HTML(elem_classes="tokens", elem_id="tokens")

    def _build_controls(self) -> None:
        models = list(self._state.models)
        longest = min(LONGEST, self._state.limits.tokens or LONGEST, self._state.engine.max_length)
        self._model = gr.Dropdown(models, value=models[0], label="Model or adapter", elem_id="model")
        self._documents = gr.Checkbox(
            label="Answer from the documents",
            info=self._about_documents(),
            value=False,
            visible=self._index is not None,
            elem_id="documents",
        )
        self._length = gr.Slider(
            1,
            longest,
            min(200, longest),
            step=1,
            buttons=[],
            label="Longest answer",
            info="in tokens",
            elem_id="length",
        )
        self._temperature = gr.Slider(
            0,
            2,
            0.7,
            step=0.05,
            buttons=[],
            label="Temperature",
            info="0 always takes the likeliest token",
            elem_id="temperature",
        )
        self._top_k = gr.Slider(
            0,
            200,
            0,
            step=1,
            buttons=[],
            label="Top-k",
            info="draw from so many of the likeliest tokens; 0: from all",
            elem_id="top-k",
        )
        self._top_p = gr.Slider(
            0.05,
            1,
            0.95,
            step=0.05,
            buttons=[],
            label="Top-p",
            info="draw from the likeliest tokens that together have this probability",
            elem_id="top-p",
        )
        self._seed = gr.Textbox(
            label="Seed",
            info="the same number writes the same text; empty: another each time",
            max_lines=1,
            elem_id="seed",
        )

    def _about_documents(self) -> str:
        return (
            f"{len(self._index.sources)} files; one line, always the likeliest tokens" if self._index else ""
        )

    def _connect(self) -> None:
        """Which button does what. Limits are the engine's: Gradio's own queue lets all through."""
        free = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
        controls = [
            self._model,
            self._temperature,
            self._top_k,
            self._top_p,
            self._seed,
            self._length,
            self._documents,
        ]
        shown = [
            self._talk,
            self._chat,
            self._text,
            self._send,
            self._stop,
            self._new,
            self._status,
            self._passages,
            self._tokens,
        ]
        gr.on(
            [self._send.click, self._text.submit],
            self.send,
            [self._text, self._talk, *controls],
            shown,
            trigger_mode="once",
            **free,
        )
        self._stop.click(self.stop, **free)
        self._new.click(self.clear, outputs=shown, **free)
        self.blocks.unload(self.stop)

    async def send(
        self,
        text: str,
        talk: list[dict[str, str]],
        model: str,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: str,
        length: int,
        from_documents: bool,
        request: gr.Request,
    ) -> AsyncIterator[dict[Any, Any]]:
        """Writes an answer; yields what changes on the page."""
        if not text.strip():
            yield {self._status: _problem("type something first")}
            return
        before, talk = talk, [*talk, {"role": "user", "content": text}]
        yield self._buttons(reading=True) | {
            self._status: "Reading",
            self._passages: "",
            self._tokens: "",
            self._chat: _said(talk),
        }
        try:
            ids, chunks = await asyncio.to_thread(self._prompt, talk, length, from_documents)
            drawing = {
                "temperature": float(temperature),
                "top_k": top_k or None,
                "top_p": top_p,
                "seed": _seed(seed),
            }
            drawing = {"temperature": 0.0, "stop": "\n"} if from_documents else drawing
            room = max(1, self._state.engine.max_length - len(ids))
            answer = await self._state.complete(
                CompletionBody(
                    model=model, prompt=ids, max_tokens=min(length, room), logprobs=LIKELIEST, **drawing
                )
            )
        except (ApiError, QueueFull, Draining, ValueError) as error:
            yield self._buttons() | {
                self._status: _problem(error),
                self._chat: _said(before),
                self._text: text,
            }
            return
        self.stop(request)
        tab, started, looked = request.session_hash, time.perf_counter(), 0.0
        self._running[tab] = answer
        written, view, count, ended, problem = "", "", 0, "Stopped", ""
        try:
            yield self._buttons(writing=True) | {self._text: "", self._passages: _passages(chunks)}
            async for _, piece, reason in answer.pieces():
                written += piece.text if written or not from_documents else piece.text.lstrip()
                view += token_view(self._vocab, [token for token, _ in piece.tokens])
                count += len(piece.tokens)
                if time.perf_counter() - looked > EVERY:
                    looked = time.perf_counter()
                    yield {
                        self._chat: _said(talk, written),
                        self._tokens: view,
                        self._status: f"{count} tokens",
                    }
                if reason:
                    ended = "Ended by itself" if reason == "stop" else "As long as was asked for"
            written = written or ABSTENTION * from_documents
        except ApiError as error:  # also where `stop` ended it, but then it is not running any more
            problem = _problem(error) if self._running.get(tab) is answer else ""
        finally:
            answer.cancel()
            if self._running.get(tab) is answer:
                del self._running[tab]
        seconds = time.perf_counter() - started
        talk = [*talk, {"role": "assistant", "content": written}]
        status = problem or f"{ended}: {count} tokens in {seconds:.1f} s, {count / seconds:.0f} a second"
        yield self._buttons() | {
            self._talk: talk,
            self._chat: _said(talk),
            self._tokens: view,
            self._status: status,
        }

    def _buttons(self, reading: bool = False, writing: bool = False) -> dict[Any, Any]:
        """Which can be pressed: what reads is over in a moment, what writes can be stopped."""
        free = not (reading or writing)
        return {
            self._send: gr.Button(interactive=free),
            self._stop: gr.Button(interactive=writing),
            self._new: gr.Button(interactive=free),
        }

    def stop(self, request: gr.Request) -> None:
        """Cancels, in the engine, what is being written for this tab."""
        if answer := self._running.pop(request.session_hash, None):
            answer.cancel()

    def clear(self) -> dict[Any, Any]:
        """Forgets the conversation."""
        return {self._talk: [], self._chat: [], self._status: "", self._passages: "", self._tokens: ""}

    def _prompt(
        self, talk: list[dict[str, str]], length: int, from_documents: bool
    ) -> tuple[list[int], Sequence[Chunk]]:
        """What the model is given to read, and the passages in it."""
        state, text = self._state, talk[-1]["content"]
        most = min(state.limits.prompt or state.engine.max_length, state.engine.max_length)
        read = talk if self._chats and not from_documents else talk[-1:]
        if sum(len(message["content"]) for message in read) > most * max(
            map(len, self._vocab.values())
        ):  # not worth the time of encoding it
            raise ValueError(
                f"this is longer than the {most} tokens that can be read: shorten it, or start anew"
            )
        if not from_documents:
            return (chat_prompt(state.tokenizer, talk) if self._chats else state.tokenizer.encode(text)), ()
        with self._searching:
            hits = self._index.search(
                text, 1
            )  # a small model reads one passage better than several (week 11)
        prompt = compose(
            text,
            [hit.chunk for hit in hits],
            state.tokenizer,
            min(most, state.engine.max_length - min(length, most // 4)),
        )
        return prompt.ids, prompt.chunks


def _said(talk: Sequence[Mapping[str, str]], written: str | None = None) -> list[dict[str, Any]]:
    """As Gradio's chat shows it unchanged: it takes text for HTML, and strips what is no part of a list.
    `written`: an answer so far.
    """
    coming = [] if written is None else [{"role": "assistant", "content": written}]
    return [
        {"role": m["role"], "content": [{"type": "text", "text": escape(m["content"], quote=False)}]}
        for m in (*talk, *coming)
    ]
