"""Week 12. The page: a chat in the browser with the model of a `CompletionServer`, on the same engine and
within the same limits.

    server = CompletionServer(Engine(model), tokenizer, name="my-gpt")
    app = add_page(server)                   # python -m shared.serving --page does this and serves it

A model with a chat template answers, any other goes on with what is typed. Every token that is written is
shown in the shade of its probability, with the likeliest others. With an index of documents (week 11) the
page also answers from them, and shows what the answer rests on.

Where the server has an API key, the page asks for it before it shows anything. Its fonts and scripts come
from this server, and what a model or a document says is shown as text and never as markup: it cannot make the
browser fetch anything.
"""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.extras import needs
from shared.models.chat import chat_prompt, is_chat
from shared.retrieval.rag import ABSTENTION, REFUSAL
from shared.serving.answer import Answer, Update
from shared.serving.api import CompletionServer, describe_size
from shared.serving.bodies import CompletionBody
from shared.serving.documents import Reading, reading_of, sources_of
from shared.serving.engine import Draining, QueueFull
from shared.serving.gate import ApiError
from shared.serving.generation import check_long_seed
from shared.serving.page_html import CSS, chat_messages, legend, passages, problem, title, token_view
from shared.serving.page_paths import OnlyUsedPaths

if TYPE_CHECKING:  # a page without documents needs no FAISS
    from shared.retrieval.index import Index

with needs("serve"):
    from fastapi import FastAPI
    from starlette.routing import Mount
with needs("page"):
    import gradio as gr

LIKELIEST = 5
"""How many tokens are named at each place."""
LONGEST = 1000
"""Tokens that may be asked for; the API gives more."""
REFRESH_SECONDS = 0.1
"""Between two updates of a text that is being written: more would only keep the browser busy."""

Conversation = list[dict[str, str]]
"""Messages, {"role": "user" | "assistant", "content": text}, oldest first."""
Changes = dict[Any, Any]
"""New values of the page's components."""


def add_page(server: CompletionServer, index: "Index | None" = None) -> FastAPI:
    """Puts the page at `/` of a server's app, before it is served; returns the app.

    index: the documents that it can answer from.
    """
    app = gr.mount_gradio_app(
        server.app,
        _Page(server, index).blocks,
        "/",
        css=CSS,
        theme=_theme(),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        auth=_login(server.api_key),
        auth_message="The password is this server's API key; the user name may be anything.",
    )
    mounted = app.routes[-1]
    assert isinstance(mounted, Mount)
    mounted.app = OnlyUsedPaths(mounted.app)
    return app


def _login(api_key: str | None) -> Callable[[str, str], bool] | None:
    """Checks a user name and a password for Gradio; None where nothing is asked for."""
    if not api_key:
        return None
    expected = api_key.encode()

    def is_right(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), expected)

    return is_right


def _theme() -> gr.Theme:
    theme = gr.themes.Default(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="gray",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    # The usual grey of small print has too little contrast.
    return theme.set(
        body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600", layout_gap="10px"
    )


def _slider(
    label: str, info: str, low: float, high: float, *, value: float, step: float = 1, elem_id: str
) -> gr.Slider:
    return gr.Slider(low, high, value, step=step, label=label, info=info, buttons=[], elem_id=elem_id)


@dataclass(frozen=True)
class _Question:
    """What a visitor sends: the text, what was said before, and the controls beside it."""

    text: str
    before: Conversation
    model: str
    temperature: float
    top_k: int
    top_p: float
    seed: str
    length: int
    from_documents: bool

    @property
    def conversation(self) -> Conversation:
        """What was said before, and the text."""
        return [*self.before, {"role": "user", "content": self.text}]

    def body(self, ids: list[int], max_tokens: int) -> CompletionBody:
        """The request to the server. Raises ValueError for a seed that is no number.

        An answer from documents is one line of the likeliest tokens, whatever the controls say.
        """
        seed = _parse_seed(self.seed)
        if self.from_documents:
            return CompletionBody(
                model=self.model,
                prompt=ids,
                max_tokens=max_tokens,
                logprobs=LIKELIEST,
                temperature=0.0,
                stop="\n",
            )
        return CompletionBody(
            model=self.model,
            prompt=ids,
            max_tokens=max_tokens,
            logprobs=LIKELIEST,
            temperature=float(self.temperature),
            top_k=self.top_k or None,
            top_p=self.top_p,
            seed=seed,
        )


def _parse_seed(text: str) -> int | None:
    try:
        seed = int(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"the seed {text!r} is no whole number: give one, or leave it empty") from None
    return None if seed is None else check_long_seed(seed)


class _Progress:
    """An answer as far as it is written."""

    def __init__(self, vocab: Mapping[int, bytes], *, strip: bool):
        self.text = ""
        self.tokens_html = ""
        self.count = 0
        """Tokens so far."""
        self.ended = "Stopped"
        """Why it ended, in words."""
        self._vocab = vocab
        self._strip = strip  # spaces and line ends before the first word
        self._started = time.perf_counter()

    def add(self, update: Update) -> None:
        """Takes the next piece of text."""
        text = update.piece.text
        if self._strip and not self.text:
            text = text.lstrip()
        self.text += text
        self.tokens_html += token_view(self._vocab, [token for token, _ in update.piece.tokens])
        self.count += len(update.piece.tokens)
        if update.reason == "stop":
            self.ended = "Ended by itself"
        elif update.reason:
            self.ended = "As long as was asked for"

    def summary(self) -> str:
        """Why it ended, and how fast it was written."""
        seconds = time.perf_counter() - self._started
        return f"{self.ended}: {self.count} tokens in {seconds:.1f} s, {self.count / seconds:.0f} a second"


class _Page:
    """The page, and what its buttons do.

    The server keeps each conversation; the browser only shows it.
    """

    def __init__(self, server: CompletionServer, index: "Index | None"):
        self._server = server
        self._index = index
        self._chats = is_chat(server.tokenizer)
        self._running: dict[str | None, Answer] = {}  # by browser tab
        name = next(iter(server.models))
        with gr.Blocks(analytics_enabled=False, title=name) as self.blocks:
            gr.HTML(title(name, self._description()))
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._build_chat()
                with gr.Column(scale=1, min_width=260):
                    self._build_controls()
            self._connect()

    def _description(self) -> str:
        engine = self._server.engine
        kind = "It has learned no conversation: it goes on with the text that you begin"
        if self._chats:
            kind = "It answers what you write"
        return f"{describe_size(engine.model)}, {engine.max_length} tokens of context. {kind}."

    def _build_chat(self) -> None:
        label, example = "The beginning of a text", "ROMEO:"
        if self._chats:
            label, example = "Your message", "Why is the sky blue?"
        self._conversation = gr.State([])
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
        self._text = gr.Textbox(
            label=label, placeholder=example, lines=1, max_lines=8, autofocus=True, elem_id="text"
        )
        with gr.Row():
            self._send = gr.Button(
                "Send" if self._chats else "Go on", variant="primary", min_width=80, elem_id="send"
            )
            self._stop = gr.Button("Stop", variant="stop", interactive=False, min_width=80, elem_id="stop")
            self._new = gr.Button("New chat" if self._chats else "Clear", min_width=80, elem_id="new")
        self._status = gr.HTML(elem_classes="status", elem_id="status")
        self._passages = gr.HTML(elem_id="passages")
        gr.HTML(legend())
        self._tokens = gr.HTML(elem_classes="tokens", elem_id="tokens")

    def _build_controls(self) -> None:
        models = list(self._server.models)
        longest = min(LONGEST, self._server.limits.tokens or LONGEST, self._server.engine.max_length)
        about_documents = ""
        if self._index is not None:
            about_documents = f"{len(self._index.sources)} files; one line, always the likeliest tokens"
        self._model = gr.Dropdown(models, value=models[0], label="Model or adapter", elem_id="model")
        self._documents = gr.Checkbox(
            label="Answer from the documents",
            info=about_documents,
            value=False,
            visible=self._index is not None,
            elem_id="documents",
        )
        info = "in tokens"
        self._length = _slider("Longest answer", info, 1, longest, value=min(200, longest), elem_id="length")
        info = "0 always takes the likeliest token"
        self._temperature = _slider("Temperature", info, 0, 2, value=0.7, step=0.05, elem_id="temperature")
        info = "draw from so many of the likeliest tokens; 0: from all"
        self._top_k = _slider("Top-k", info, 0, 200, value=0, elem_id="top-k")
        info = "draw from the likeliest tokens that together have this probability"
        self._top_p = _slider("Top-p", info, 0.05, 1, value=0.95, step=0.05, elem_id="top-p")
        self._seed = gr.Textbox(
            label="Seed",
            info="the same number writes the same text; empty: another each time",
            max_lines=1,
            elem_id="seed",
        )

    def _connect(self) -> None:
        """Which button does what. Limits are the engine's: Gradio's own queue lets all requests through."""
        inputs = {
            self._text,
            self._conversation,
            self._model,
            self._temperature,
            self._top_k,
            self._top_p,
            self._seed,
            self._length,
            self._documents,
        }
        outputs = [
            self._conversation,
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
            inputs,
            outputs,
            trigger_mode="once",
            concurrency_limit=None,
            api_visibility="private",
            show_progress="hidden",
        )
        self._stop.click(self.stop, concurrency_limit=None, api_visibility="private", show_progress="hidden")
        self._new.click(
            self.clear,
            outputs=outputs,
            concurrency_limit=None,
            api_visibility="private",
            show_progress="hidden",
        )
        self.blocks.unload(self.stop)

    async def send(self, values: Mapping[Any, Any], request: gr.Request) -> AsyncIterator[Changes]:
        """Writes an answer. values: by component. Yields what changes on the page."""
        question = self._read(values)
        if not question.text.strip():
            yield {self._status: problem("type something first")}
            return
        conversation = question.conversation
        yield {
            **self._buttons(reading=True),
            self._status: "Reading",
            self._passages: "",
            self._tokens: "",
            self._chat: chat_messages(conversation),
        }
        try:
            answer, reading = await self._start(question)
        except (ApiError, QueueFull, Draining, ValueError) as error:
            yield {
                **self._buttons(),
                self._status: problem(error),
                self._chat: chat_messages(question.before),
                self._text: question.text,
            }
            return
        if answer is None:
            conversation = [*conversation, {"role": "assistant", "content": REFUSAL}]
            yield {
                **self._buttons(),
                self._text: "",
                self._conversation: conversation,
                self._chat: chat_messages(conversation),
                self._status: "The model was not asked: no passage is near enough",
            }
            return
        progress = _Progress(self._server.vocab, strip=question.from_documents)
        error_html = ""
        with self._writing(answer, request) as is_wanted:
            yield {**self._buttons(writing=True), self._text: ""}
            try:
                async for changes in self._follow(answer, progress, conversation):
                    yield changes
                progress.text = progress.text or (ABSTENTION if question.from_documents else "")
            except ApiError as error:
                error_html = problem(error) if is_wanted() else ""
        conversation = [*conversation, {"role": "assistant", "content": progress.text}]
        sources = await asyncio.to_thread(sources_of, self._index, reading, progress.text)
        yield {
            **self._buttons(),
            self._passages: passages(sources),
            self._conversation: conversation,
            self._chat: chat_messages(conversation),
            self._tokens: progress.tokens_html,
            self._status: error_html or progress.summary(),
        }

    async def _follow(
        self, answer: Answer, progress: _Progress, conversation: Conversation
    ) -> AsyncIterator[Changes]:
        """Takes the pieces of an answer as they come; yields what changes on the page, now and then."""
        shown = 0.0
        async for update in answer.updates():
            progress.add(update)
            if time.perf_counter() - shown > REFRESH_SECONDS:
                shown = time.perf_counter()
                written = {"role": "assistant", "content": progress.text}
                yield {
                    self._chat: chat_messages([*conversation, written]),
                    self._tokens: progress.tokens_html,
                    self._status: f"{progress.count} tokens",
                }

    @contextmanager
    def _writing(self, answer: Answer, request: gr.Request) -> Iterator[Callable[[], bool]]:
        """Within `with`, Stop and a closed tab cancel the answer, and it is cancelled at the end.

        Yields a function that says whether it is still wanted. The tab's earlier answer is cancelled.
        """
        tab = request.session_hash
        self.stop(request)
        self._running[tab] = answer

        def is_wanted() -> bool:
            return self._running.get(tab) is answer

        try:
            yield is_wanted
        finally:
            answer.cancel()
            if is_wanted():
                del self._running[tab]

    def stop(self, request: gr.Request) -> None:
        """Cancels, in the engine, what is being written for this tab."""
        answer = self._running.pop(request.session_hash, None)
        if answer is not None:
            answer.cancel()

    def clear(self) -> Changes:
        """Forgets the conversation."""
        return {
            self._conversation: [],
            self._chat: [],
            self._status: "",
            self._passages: "",
            self._tokens: "",
        }

    def _buttons(self, *, reading: bool = False, writing: bool = False) -> Changes:
        """Which can be pressed: reading is over in a moment, writing can be stopped."""
        idle = not (reading or writing)
        return {
            self._send: gr.Button(interactive=idle),
            self._stop: gr.Button(interactive=writing),
            self._new: gr.Button(interactive=idle),
        }

    def _read(self, values: Mapping[Any, Any]) -> _Question:
        return _Question(
            text=values[self._text],
            before=values[self._conversation],
            model=values[self._model],
            temperature=values[self._temperature],
            top_k=values[self._top_k],
            top_p=values[self._top_p],
            seed=values[self._seed],
            length=values[self._length],
            from_documents=values[self._documents],
        )

    async def _start(self, question: _Question) -> tuple[Answer | None, Reading]:
        """Has the engine begin an answer; with it, what the model is given to read. No answer where the
        documents have none.

        Raises ApiError, QueueFull, Draining, and ValueError for what cannot be done.
        """
        reading = await asyncio.to_thread(self._prompt, question)
        if not reading.ids:
            return None, reading
        room = max(1, self._server.engine.max_length - len(reading.ids))
        answer = await self._server.complete(question.body(reading.ids, min(question.length, room)))
        return answer, reading

    def _prompt(self, question: _Question) -> Reading:
        """The ids that the model is given to read, and the passages in them; no ids where the documents are
        about something else.
        """
        tokenizer = self._server.tokenizer
        longest = self._server.longest_prompt
        whole = self._chats and not question.from_documents
        read = question.conversation if whole else question.conversation[-1:]
        if self._server.surely_exceeds(sum(len(message["content"]) for message in read), longest):
            raise ValueError(
                f"this is longer than the {longest} tokens that can be read: shorten it, or start anew"
            )
        if self._index is not None and question.from_documents:
            room = self._server.engine.max_length - min(question.length, longest // 4)
            earlier = [message["content"] for message in question.before if message["role"] == "user"]
            return reading_of(self._index, question.text, earlier, tokenizer, min(longest, room))
        if self._chats:
            return Reading(chat_prompt(tokenizer, question.conversation))
        return Reading(tokenizer.prompt(question.text))
