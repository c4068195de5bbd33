"""shared/serving/page.py in a real browser: what it shows is what `shared.sampling.generate` writes, Stop
ends it in the engine, nothing is fetched from elsewhere, and the key and the limits hold.
"""

import math
import string
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import torch
from playwright.sync_api import expect

from shared.adapters import LoRAConfig, add_lora
from shared.adapters.attach import use_adapters
from shared.models.chat import IM_END, IM_START, chat_prompt
from shared.models.gpt import GPT, GPTConfig
from shared.retrieval.documents import chunk_documents, load_documents
from shared.retrieval.embedders import HiddenStates
from shared.retrieval.index import Index
from shared.retrieval.rag import compose
from shared.sampling import generate
from shared.serving.api import CompletionServer
from shared.serving.engine import Engine
from shared.serving.gate import Limits
from shared.serving.generation import Request, Token
from shared.serving.page import add_page
from shared.serving.page_html import token_view
from shared.tokenizers import BPETokenizer, CharTokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from shared.training.own_model import own_checkpoint
from tests.helpers import serving, shake

CHARS = CharTokenizer.train(string.digits + string.ascii_letters + string.punctuation + " \n")
TALKS = BPETokenizer.train(
    "the boat is at sea, the sea is deep", 270, special_tokens=[END_OF_TEXT, IM_START, IM_END]
)
MARKUP = '<img src=x onerror="document.title=1"> ${7*7} {{value}} ![x](http://example.com/x.png)\n  two'
DOCUMENTS = {
    "boats.md": f"# Boats\n\nBoth boats are green. {MARKUP}\n",
    "bells.md": "# Bells\n\nThe bell is struck at noon.\n",
}
expect.set_options(timeout=20_000)  # milliseconds; only a page that is wrong takes so long


def gpt(tokenizer) -> GPT:
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=256, n_layer=2, n_head=2, n_embd=32)
    return shake(GPT(config))


def pirate() -> GPT:
    model = add_lora(gpt(CHARS), LoRAConfig(r=4, target_modules=("all-linear",)), "pirate")
    return shake(model)


def written(model: GPT, ids: list[int], n: int = 20, **options) -> list[int]:
    """What a page with seed 1 and everything else as it comes should write."""
    return list(generate(model, ids, n, **{"temperature": 0.7, "top_p": 0.95, "seed": 1} | options))


@contextmanager
def page_of(server: CompletionServer, index=None):
    with serving(add_page(server, index)) as url:
        yield SimpleNamespace(url=url, engine=server.engine)


@pytest.fixture(scope="module")
def completing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    index = Index(HiddenStates(gpt(CHARS), CHARS, "tiny"))
    index.add(chunk_documents(load_documents(folder).documents, CHARS))
    engine = Engine(pirate(), slots=1, queue=1)
    server = CompletionServer(engine, CHARS, name="tiny", limits=Limits(tokens=200))
    with page_of(server, index) as served:
        yield SimpleNamespace(**vars(served), index=index)


@pytest.fixture(scope="module")
def chatting():
    with page_of(CompletionServer(Engine(gpt(TALKS)), TALKS, name="tiny")) as served:
        yield served


@pytest.fixture
def visit(chromium):
    """Opens a server's page in a window of its own. In the end: what was fetched came from that server, and
    no script failed.
    """
    contexts = []
    foreign: list[str] = []
    failed: list[str] = []

    def open_page(server, width=1200, ready="#send"):
        context = chromium.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)

        def note_foreign(request) -> None:
            if not request.url.startswith((server.url, "data:", "blob:")):
                foreign.append(request.url)

        page.on("request", note_foreign)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(server.url)
        page.locator(ready).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert foreign == [] and failed == []


def ask(page, text: str, length: int = 20, seed: str = "1", wait: bool = True) -> None:
    for field, value in (("#length input[type=number]", length), ("#seed :is(input, textarea)", seed)):
        page.locator(field).fill(str(value))
        page.locator(field).blur()
    answers = page.locator("#chat [data-testid=bot]")
    before = answers.count()
    page.locator("#text textarea").fill(text)
    page.locator("#send").click()
    if wait:
        expect(answers).to_have_count(before + 1)
        expect(page.locator("#status")).to_contain_text("a second")


def said(page, who: str = "bot") -> list[str]:
    messages = page.locator(f"#chat [data-testid={who}] .message-content").all()
    return [message.text_content() for message in messages]


def shades(page) -> list[tuple[str, int, str]]:
    """Of each token: its text, its shade, and the share of it that is shown."""
    return page.evaluate(
        """[...document.querySelectorAll('#tokens .shade')].map(token => [
            token.firstChild.textContent,
            Number(token.className.match(/shade-(\\d)/)[1]),
            token.querySelector('.chosen').nextSibling.textContent,
        ])"""
    )


# Texts and tokens.


@pytest.mark.slow
def test_a_text_goes_on_as_the_sampler_writes_it_each_token_in_its_shade(visit, completing):
    page = visit(completing)
    assert "goes on with the text" in page.locator(".title").inner_text()
    ask(page, "abc")
    model, prompt = use_adapters(pirate(), ()), CHARS.encode("abc")
    ids = written(model, prompt)
    assert said(page) == [CHARS.decode(ids)] and said(page, "user") == ["abc"]
    with torch.no_grad():
        shares = model(torch.tensor([prompt + ids]))[0, 2:-1].softmax(-1)[range(20), ids].tolist()
    shown = shades(page)
    assert "".join(text for text, _, _ in shown).replace("↵", "") == CHARS.decode(ids).replace("\t", "⇥")
    assert [shade for _, shade, _ in shown] == [
        sum(share < bound for bound in (0.5, 0.2, 0.05, 0.01)) for share in shares
    ]
    for (_, _, text), share in zip(shown, shares):
        if share < 0.0009:
            assert text == "under 0.1 %"
        else:
            assert float(text.removesuffix(" %")) == pytest.approx(100 * share, abs=0.06)


@pytest.mark.slow
def test_pointing_at_a_token_names_the_likeliest(visit, completing):
    page = visit(completing)
    ask(page, "abc", length=3)
    token = page.locator("#tokens .shade").nth(1)
    assert not token.locator(".likeliest").is_visible()
    token.hover()
    model, ids = use_adapters(pirate(), ()), CHARS.encode("abc")
    with torch.no_grad():
        best = model(torch.tensor([ids + written(model, ids)[:1]]))[0, -1].softmax(-1).topk(5)
    named = token.locator(".likeliest > :not(.share)").all_text_contents()[:5]
    shares = [float(share.removesuffix(" %")) for share in token.locator(".share").all_text_contents()[:5]]
    assert "".join(named) == CHARS.decode(best.indices.tolist()).replace(" ", "␣").replace("\n", "↵")
    assert shares == pytest.approx((100 * best.values).tolist(), abs=0.06)


@pytest.mark.parametrize(
    ("least", "shade"), [(0.51, 0), (0.5, 0), (0.21, 1), (0.06, 2), (0.02, 3), (0.001, 4), (1e-9, 4)]
)
def test_shades(least, shade):
    logprob = math.log(least) + 1e-9
    html = token_view({5: b"<&"}, [Token(5, logprob, ((5, logprob),))])
    assert f'class="shade shade-{shade}"' in html and "&lt;&amp;" in html


@pytest.mark.slow
def test_a_conversation_is_read_as_a_whole(visit, chatting):
    page = visit(chatting)
    assert "answers what you write" in page.locator(".title").inner_text()
    assert not page.locator("#documents").is_visible()
    talk, model = [], gpt(TALKS)
    ends = [[TALKS.special_tokens[token]] for token in (END_OF_TEXT, IM_END)]
    for question in ("the sea", "the boat"):
        talk.append({"role": "user", "content": question})
        ask(page, question, length=12)
        text = TALKS.decode(written(model, chat_prompt(TALKS, talk), 12, stop=ends))
        talk.append({"role": "assistant", "content": text})
        answers = [message["content"] for message in talk if message["role"] == "assistant"]
        assert said(page) == [answer.replace("\0", "") for answer in answers]  # no browser shows these
    page.locator("#new").click()
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(0)
    ask(page, "the sea", length=12)
    assert said(page) == [talk[1]["content"].replace("\0", "")]


@pytest.mark.slow
def test_an_adapter_writes_its_own_text(visit, completing):
    page = visit(completing)
    page.locator("#model input").click()
    page.get_by_role("option", name="pirate").click()
    ask(page, "abc")
    assert said(page) == [CHARS.decode(written(use_adapters(pirate(), "pirate"), CHARS.encode("abc")))]


# Documents.


@pytest.mark.slow
def test_an_answer_from_documents_shows_what_was_read(visit, completing):
    page = visit(completing)
    page.locator("#documents input").check()
    question = "Are the boats green?"
    ask(page, question)
    (hit,) = completing.index.search(question, 1)
    prompt = compose(question, [hit.chunk], CHARS, 256 - 20)
    text = CHARS.decode(written(use_adapters(pirate(), ()), prompt.ids, temperature=0))
    assert said(page) == [text.lstrip().split("\n")[0] or "I don't know."]
    assert page.locator("#passages cite").text_content() == hit.chunk.cite
    shown = page.locator("#passages .passage").text_content()
    assert shown == f"{hit.chunk.cite} score {hit.score:.2f}\n{prompt.chunks[0].text}"
    (marked,) = page.locator("#passages mark").all_text_contents()
    assert marked and marked in prompt.chunks[0].text


@pytest.mark.slow
def test_a_name_that_no_document_has_is_refused_and_nothing_is_cited(visit, completing):
    page = visit(completing)
    page.locator("#documents input").check()
    ask(page, "Who is the mayor of Paris?", wait=False)
    expect(page.locator("#status")).to_contain_text("The model was not asked")
    assert said(page) == ["Nothing in the documents answers this."]
    assert page.locator("#passages .passage").count() == 0


@pytest.mark.slow
def test_what_is_said_is_shown_as_text_and_never_as_markup(visit, completing):
    page = visit(completing)
    page.locator("#documents input").check()
    ask(page, "boats <b>")
    assert MARKUP.split(" !")[0] in page.locator("#passages .passage").text_content()
    page.locator("#documents input").uncheck()
    ask(page, MARKUP)
    assert said(page, "user") == ["boats <b>", MARKUP]
    assert page.title() == "tiny" and page.locator("#chat img, #passages img, #tokens img").count() == 0
    shown = token_view({0: MARKUP.encode()}, [Token(0, -1.0)])
    assert "<img" not in shown and "${7*7} {{value}}" in shown


# Stopping.


@pytest.fixture
def brake(completing, monkeypatch):
    """The engine takes as many steps as it is given."""
    steps, step = threading.Semaphore(0), completing.engine.step

    def slowly():
        steps.acquire()
        return step()

    monkeypatch.setattr(completing.engine, "step", slowly)
    # Each token is shown before there is another.
    monkeypatch.setattr("shared.serving.page.REFRESH_SECONDS", 0)
    yield steps
    monkeypatch.undo()
    steps.release(1_000_000)
    assert completing.engine.wait_idle(10)


def write_some(page, brake) -> None:
    """The window's text is begun, and waits in the middle."""
    ask(page, "abc", length=200, wait=False)
    brake.release(20)
    expect(page.locator("#tokens .shade").nth(5)).to_be_attached()


def go_on(engine, brake) -> None:
    """Step by step, until nothing is left to do."""
    while not engine.wait_idle(0.1):
        brake.release(1)


@pytest.mark.slow
def test_stop_ends_it_in_the_engine(visit, completing, brake):
    page, engine = visit(completing), completing.engine
    write_some(page, brake)
    before = engine.ended["cancelled"]
    assert engine.busy == 1 and page.locator("#send").is_disabled()
    page.locator("#stop").click()
    go_on(engine, brake)
    expect(page.locator("#status")).to_contain_text("Stopped")
    assert engine.ended["cancelled"] == before + 1
    (text,) = said(page)
    whole = CHARS.decode(written(use_adapters(pirate(), ()), CHARS.encode("abc"), 200))
    assert 5 < len(text) < 200 and whole.startswith(text)
    assert page.locator("#stop").is_disabled() and page.locator("#send").is_enabled()


@pytest.mark.slow
def test_a_closed_window_ends_it_too(visit, completing, brake):
    page, engine = visit(completing), completing.engine
    write_some(page, brake)
    before = engine.ended["cancelled"]
    page.context.close()
    go_on(engine, brake)
    assert engine.ended["cancelled"] == before + 1


# What is refused.


@pytest.mark.slow
def test_a_full_queue_is_said_and_the_text_is_kept(visit, completing, brake):
    page = visit(completing)
    filling = [completing.engine.submit(Request([1], 200)) for _ in range(2)]
    ask(page, "abc", wait=False)
    expect(page.locator("#status [role=alert]")).to_contain_text("ask again later")
    assert page.locator("#text textarea").input_value() == "abc"
    assert said(page, "user") == []
    assert page.locator("#send").is_enabled()
    for generation in filling:
        generation.cancel()
    brake.release(10)
    assert completing.engine.wait_idle(10)
    brake.release(100)
    ask(page, "abc", length=5)
    assert said(page) == [CHARS.decode(written(use_adapters(pirate(), ()), CHARS.encode("abc"), 5))]


@pytest.mark.slow
def test_what_cannot_be_done_is_said_and_the_text_is_kept(visit, completing):
    page = visit(completing)
    for text, seed, message in (
        (" ", "", "Type something first"),
        ("a" * 300, "", "longer than the 256 tokens"),
        ("a" * 256, "", "256 tokens of prompt"),
        ("é", "", "é"),
        ("abc", "one", "The seed 'one' is no whole number"),
        ("abc", "9" * 20, f"{'9' * 20} is out of range"),
    ):
        ask(page, text, seed=seed, wait=False)
        expect(page.locator("#status [role=alert]")).to_contain_text(message)
        assert said(page, "user") == [] and page.locator("#text textarea").input_value() == text


CLOSED = [
    ("GET", "/config"),
    ("GET", "/gradio_api/queue/data?session_hash=x"),
    ("POST", "/gradio_api/queue/join"),
    ("GET", "/v1/models"),
]


@pytest.mark.slow
def test_with_a_key_nothing_is_there_without_it(visit):
    server = CompletionServer(Engine(gpt(CHARS)), CHARS, name="tiny", api_key="open sesame")
    with page_of(server) as served:
        with httpx.Client(base_url=served.url) as http:
            assert "Temperature" not in http.get("/").text
            for method, path in CLOSED:
                assert http.request(method, path, json={}).status_code == 401, path
            for password in ("", "open", "open sesame "):
                answer = http.post("/login", data={"username": "x", "password": password})
                assert answer.status_code in (400, 422)
        page = visit(served, ready="input[type=password]")
        assert "API key" in page.inner_text("body")
        for password in ("open", "open sesame"):
            page.locator("input:not([type=password]), textarea").first.fill("me")
            page.locator("input[type=password]").fill(password)
            page.get_by_role("button", name="Login").click()
            if password == "open":
                page.get_by_text("Incorrect").wait_for()
        page.locator("#send").wait_for()
        ask(page, "abc")
        assert said(page) == [CHARS.decode(written(gpt(CHARS), CHARS.encode("abc")))]
        page.context.close()


@pytest.mark.slow
def test_it_fits_on_a_phone(visit, completing):
    page = visit(completing, width=390)
    ask(page, "abc def " * 10, length=100)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("send", "stop", "new"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 36


# The command line.


def test_the_newest_week_with_a_checkpoint_is_served(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_OUTPUT", str(tmp_path))
    assert own_checkpoint() is None
    for week, path in (
        ("06_gpt2", "smoke/shakespeare/gpt2/best"),
        ("04_mini_gpt", "laptop/shakespeare/headline/best"),
        ("06_gpt2", "gpu/shakespeare/gpt2/best"),
    ):
        folder = tmp_path / "checkpoints" / week / path
        folder.mkdir(parents=True)
        assert own_checkpoint() == (week, folder)
