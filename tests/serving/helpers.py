"""What the tests of the server share: a small model with a tokenizer, a client, and checks of answers."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

from starlette.testclient import TestClient

from shared.models.chat import IM_END, IM_START
from shared.models.gpt import GPT, GPTConfig
from shared.sampling import generate
from shared.serving.api import create_app
from shared.serving.engine import Engine
from shared.tokenizers import BPETokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from tests.helpers import shake, synthetic_text

TOKENIZER = BPETokenizer.train(synthetic_text(400), 300, special_tokens=[END_OF_TEXT, IM_START, IM_END])
CONFIG = GPTConfig(
    vocab_size=300,
    block_size=128,
    n_layer=2,
    n_head=2,
    n_embd=32,
    n_kv_head=1,
    norm="rmsnorm",
    position="rope",
    mlp="swiglu",
    mlp_hidden=64,
    bias=False,
    tie_weights=False,
)
ENDS = [TOKENIZER.special_tokens[token] for token in (END_OF_TEXT, IM_END)]
PROMPT = "abc def, hij"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
TOO_LONG = "context_length_exceeded"


def gpt() -> GPT:
    return shake(GPT(CONFIG))


reference = cache(gpt)


def expected(prompt: str | list[int], n: int, stop=(), model: GPT | None = None, **options) -> str:
    """What the sampler writes after a prompt."""
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    return TOKENIZER.decode(list(generate(model or reference(), ids, n, stop=ENDS, **options)))


@contextmanager
def client(model: GPT | None = None, tokenizer=TOKENIZER, **options):
    """Talks to an app of its own; the app's engine is `engine`."""
    app = create_app(model or gpt(), tokenizer, name="tiny", **options)
    with TestClient(app, raise_server_exceptions=False) as talk:
        talk.engine = app.state.server.engine
        yield talk


def complete(talk: TestClient, path: str = COMPLETIONS, **body):
    """Sends a small request with these fields."""
    if path == COMPLETIONS:
        body = {"prompt": PROMPT} | body
    else:
        body = {"messages": [{"role": "user", "content": "hi"}]} | body
    return talk.post(path, json={"model": "tiny"} | body)


def events(response) -> list[dict]:
    """The chunks of a stream."""
    lines = [line for line in response.text.split("\n") if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    found = [json.loads(line[6:]) for line in lines[:-1]]
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in found}) == 1
    return found


def choices_of(response, stream: bool) -> list[dict]:
    """The choices of an answer, or of all chunks of a stream."""
    if stream:
        return [choice for event in events(response) for choice in event["choices"]]
    return response.json()["choices"]


def check_error(
    response, status: int, message: str, param: str | None = None, code: str | None = None
) -> None:
    error = response.json()["error"]
    assert response.status_code == status and error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"] and (error["param"], error["code"]) == (param, code), error


def before_each_read(engine: Engine, do: Callable[[], object]) -> Callable[[], None]:
    """Has `do` called before each forward pass of the engine's model. Returns what ends that."""
    reader = engine._reader
    read = reader.read

    def noted(*args, **options):
        do()
        return read(*args, **options)

    reader.read = noted

    def restore() -> None:
        reader.read = read

    return restore
