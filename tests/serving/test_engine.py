"""shared/serving/engine.py and slots.py: a request's tokens are those that `shared.sampling.generate` gives
it alone, whoever else is there.
"""

import random
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import registry
from shared.adapters import LoRAConfig, add_lora
from shared.adapters.attach import use_adapters
from shared.evaluation import score_tokens
from shared.models.gpt import GPT, GPTConfig
from shared.quantization import quantize
from shared.sampling import generate
from shared.serving.engine import Draining, Engine, QueueFull
from shared.serving.generation import Request, Token
from shared.serving.slots import SlotCache
from tests.helpers import shake

VOCAB, BLOCK = 61, 96
GPT2 = GPTConfig(vocab_size=VOCAB, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32)
LLAMA = replace(
    GPT2,
    norm="rmsnorm",
    position="rope",
    mlp="swiglu",
    mlp_hidden=64,
    n_kv_head=1,
    bias=False,
    tie_weights=False,
)
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "window": replace(LLAMA, window=9, qk_norm=True)}


@pytest.fixture(params=["decoder.c", "PyTorch"], autouse=True)
def reads(request, monkeypatch) -> None:
    """All tests with either way to read."""
    if request.param == "PyTorch":
        monkeypatch.setattr(registry, "READERS", [])


def gpt(config: GPTConfig = LLAMA) -> GPT:
    return shake(GPT(config))


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(range(VOCAB), k=draw.randint(1, longest)) for _ in range(count)]


def stepped(model: GPT, **options) -> Engine:
    """An engine that the test steps itself."""
    return Engine(model, **({"chunk": 8, "start": False} | options))


def run(engine: Engine) -> None:
    while engine.step():
        pass


def ids(generation) -> list[int]:
    return [token.id for token in generation]


def alone(model: GPT, request: Request) -> list[int]:
    """What the sampler of week 1 makes of it."""
    drawn = generate(
        model,
        request.prompt,
        request.max_new_tokens,
        request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        stop=request.stop,
        seed=request.seed,
    )
    return list(drawn)


def request(prompt: list[int], draw: random.Random) -> Request:
    """Greedy or not, with filters or without, sometimes with stop sequences."""
    stop = [draw.choices(range(VOCAB), k=draw.randint(1, 2)) for _ in range(draw.randint(0, 6))]
    return Request(
        prompt,
        draw.randint(1, min(30, BLOCK - len(prompt))),
        temperature=draw.choice([0, 0.7, 1.0]),
        top_k=draw.choice([None, 5]),
        top_p=draw.choice([None, 0.9]),
        seed=draw.randint(0, 99),
        stop=stop,
    )


# The law: alone or in any batch.


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_requests_that_arrive_at_any_time_get_what_they_would_get_alone(name, slots):
    model, draw = gpt(CONFIGS[name]), random.Random(slots)
    requests = [request(prompt, draw) for prompt in prompts(24, slots)]
    engine, running, left = stepped(model, slots=slots), [], list(requests)
    while left or engine.busy or engine.waiting:
        for _ in range(min(len(left), draw.choice([0, 0, 1, 3]))):
            running.append(engine.submit(left.pop(0)))
        engine.step()
    assert [ids(g) for g in running] == [alone(model, r) for r in requests]
    assert {g.finish_reason for g in running} == {"stop", "length"}
    assert engine.generated_tokens == sum(g.drawn for g in running)


# Of a request: length of its prompt, tokens to write, steps before the next one arrives, whether it leaves.
ARRIVALS = st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(0, 3), st.booleans())


@pytest.mark.slow
@settings(max_examples=25)
@given(st.lists(ARRIVALS, min_size=1, max_size=10), st.integers(1, 5))
def test_any_order_of_arrivals_and_departures(plan, slots):
    model = gpt()
    engine, kept = stepped(model, slots=slots), []
    for number, (length, new, wait, leaves) in enumerate(plan):
        r = Request([(7 * number + i) % VOCAB for i in range(length)], new, seed=number)
        g = engine.submit(r)
        for _ in range(wait):
            engine.step()
        if leaves:
            g.cancel()
        else:
            kept.append((g, r))
    run(engine)
    assert engine.busy == engine.waiting == 0
    assert [ids(g) for g, _ in kept] == [alone(model, r) for _, r in kept]


@pytest.mark.slow
def test_threads_that_submit_at_once_get_what_they_would_get_alone():
    model, results = gpt(), {}
    requests = [request(prompt, random.Random(i)) for i, prompt in enumerate(prompts(16, 5))]
    engine = Engine(model, slots=3, chunk=8)

    def submit(i: int) -> None:
        results[i] = ids(engine.submit(requests[i]))

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.wait_idle()
    engine.close()
    assert [results[i] for i in range(16)] == [alone(model, r) for r in requests]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_model_says_the_same_alone_and_in_a_batch(scheme):
    model = quantize(gpt(), scheme, say=lambda line: None)
    requests = [Request(prompt, 12, seed=i) for i, prompt in enumerate(prompts(9, 2))]
    single = []
    for r in requests:
        engine = stepped(model)
        single.append(engine.submit(r))
        run(engine)
    engine = stepped(model)
    together = [engine.submit(r) for r in requests]
    run(engine)
    assert [ids(g) for g in together] == [ids(g) for g in single]


@pytest.mark.slow
def test_each_row_has_the_adapter_that_it_asks_for():
    model = gpt()
    for name in ("one", "two"):
        add_lora(model, LoRAConfig(r=4, target_modules=("all-linear",)), name)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    names = [None, "one", "two", "one", None, "two", "one"]
    requests = [Request(prompt, 10, seed=3, adapter=name) for prompt, name in zip(prompts(7, 3), names)]
    # Nor does one take over another's keys:
    same_prompt = [Request([1] * 40, 10, seed=3, adapter=name) for name in names]
    engine = stepped(model)
    found = [engine.submit(r) for r in requests + same_prompt]
    run(engine)
    engine.close()
    expected = []
    for r in requests + same_prompt:
        use_adapters(model, r.adapter or ())
        expected.append(alone(model, r))
    assert [ids(g) for g in found] == expected
    assert len({tuple(e) for e in expected[7:10]}) == 3


# Log-probabilities.


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_log_probabilities_of_the_prompt_and_of_what_follows(length):
    model, prompt = gpt(), prompts(1, 9, 1)[0] * length
    prompt = [(i * i + p) % VOCAB for i, p in enumerate(prompt)]
    engine = stepped(model)
    engine.submit(Request(prompt, 3))  # read before: scoring takes nothing over
    scored = engine.submit(Request(prompt, 6, temperature=0, logprobs=4, score_prompt=True))
    run(engine)
    tokens = [*scored.prompt, *scored]
    assert [t.id for t in tokens[:length]] == prompt and tokens[0] == Token(prompt[0])
    text = [t.id for t in tokens]
    ((expected, greedy),) = score_tokens(model, [(text, len(text) - 1)])
    torch.testing.assert_close(torch.tensor([t.logprob for t in tokens[1:]]), expected, atol=1e-4, rtol=1e-4)
    assert greedy.tolist() == [t.top[0][0] == t.id and t.top[0][1] == t.logprob for t in tokens[1:]]
    with torch.no_grad():
        best = F.log_softmax(model(torch.tensor([text]))[0, :-1], -1).topk(4)
    torch.testing.assert_close(
        torch.tensor([[p for _, p in t.top] for t in tokens[1:]]), best.values, atol=1e-4, rtol=1e-4
    )


def test_log_probabilities_are_of_the_model_whatever_the_temperature():
    model = gpt()
    engine = stepped(model)
    g = engine.submit(Request([1, 2, 3], 8, temperature=0.3, top_k=2, seed=1, logprobs=0))
    run(engine)
    tokens = list(g)
    ((expected, _),) = score_tokens(model, [([1, 2, 3, *(t.id for t in tokens)], 8)])
    torch.testing.assert_close(torch.tensor([t.logprob for t in tokens]), expected, atol=1e-4, rtol=1e-4)
    assert all(t.top == () for t in tokens)


# What was read is not read again.


def test_a_prompt_that_begins_like_an_earlier_one_is_read_from_where_they_part():
    model, first = gpt(), prompts(1, 1)[0] * 60
    first = [(i * 5 + p) % VOCAB for i, p in enumerate(first[:50])]
    engine = stepped(model)

    def reused(prompt: list[int], **options) -> int:
        before, r = engine.prompt_tokens, Request(prompt, 5, seed=4, **options)
        g = engine.submit(r)
        run(engine)
        assert ids(g) == alone(model, r)
        assert engine.prompt_tokens - before == len(prompt) - g.reused
        return g.reused

    assert reused(first) == 0
    assert reused(first) == 48  # in whole chunks of 8
    assert reused(first[:48]) == 40  # at least the last token is read
    assert reused([*first[:20], 0, 0, 0, 0, 0]) == 16
    assert reused(first) == 48  # the one before has not taken its place
    assert reused(first, score_prompt=True) == 0
    assert reused([0, *first]) == 0


def test_a_prompt_is_shared_with_one_that_is_still_being_written():
    model = gpt()
    common = [i % VOCAB for i in range(24)]
    engine = stepped(model)
    requests = [Request([*common, i], 20, seed=i) for i in range(3)]
    running = [engine.submit(requests[0])]
    for _ in range(6):
        engine.step()
    running += [engine.submit(r) for r in requests[1:]]
    run(engine)
    assert [g.reused for g in running] == [0, 24, 24]
    assert [ids(g) for g in running] == [alone(model, r) for r in requests]


@pytest.mark.slow
def test_slots_are_taken_over_again_and_again():
    model, draw = gpt(), random.Random(3)
    bases = prompts(4, 6, 50)
    engine = stepped(model, slots=2)
    requests = []
    for i in range(60):
        base = draw.choice(bases)
        begins_alike = base[: draw.randint(1, len(base))]
        own = draw.choices(range(VOCAB), k=draw.randint(0, 4))
        requests.append(Request([*begins_alike, *own], 4, seed=i))
    found = [engine.submit(r) for r in requests]
    run(engine)
    assert [ids(g) for g in found] == [alone(model, r) for r in requests]
    assert engine.reused_tokens == sum(g.reused for g in found) > 100


# Leaving, limits, closing.


def test_a_cancelled_text_ends_before_the_next_step_and_its_slot_is_free():
    engine = stepped(gpt(), slots=1)
    first, second = (engine.submit(Request([1, 2], 50, seed=i)) for i in range(2))
    for _ in range(4):
        engine.step()
    drawn = first.drawn
    assert drawn > 1 and second.drawn == 0
    first.cancel()
    engine.step()
    assert first.drawn == drawn and first.finish_reason == "cancelled" and len(ids(first)) == drawn
    assert second.drawn > 0
    second.cancel()
    engine.step()
    assert engine.busy == 0 and not engine.step()


def test_one_that_waits_can_be_cancelled_too_and_leaves_the_queue():
    engine = stepped(gpt(), slots=1, queue=1)
    running, waits = engine.submit(Request([1], 5)), engine.submit(Request([2], 5))
    with pytest.raises(QueueFull, match="ask again later"):
        engine.submit(Request([3], 5))
    waits.cancel()
    engine.step()
    assert waits.finish_reason == "cancelled" and ids(waits) == [] and engine.waiting == 0
    last = engine.submit(Request([3], 5))
    run(engine)
    assert len(ids(running)) == len(ids(last)) == 5


def test_a_text_that_runs_out_of_time_ends_with_what_it_has(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("shared.serving.engine.time.monotonic", lambda: now[0])
    engine = stepped(gpt(), slots=1)
    running, waits = (engine.submit(Request([1], 50, timeout=t)) for t in (10, 5))
    engine.step()
    now[0] = 106
    engine.step()
    assert waits.finish_reason == "timeout" and running.finish_reason is None
    now[0] = 111
    engine.step()
    assert running.finish_reason == "timeout" and len(ids(running)) == running.drawn > 1
    assert engine.busy == engine.waiting == 0


def test_a_listener_that_fails_is_one_that_has_gone():
    engine = stepped(gpt())

    def listen(token):
        raise RuntimeError("the event loop is closed")

    gone, stays = engine.submit(Request([1], 30), listen), engine.submit(Request([1], 30))
    run(engine)
    assert gone.finish_reason == "cancelled" and gone.drawn < 5
    assert len(ids(stays)) == 30


def test_draining_finishes_what_is_there_and_takes_nothing_new():
    engine = Engine(gpt(), slots=2, chunk=8)
    running = [engine.submit(Request([i], 40, seed=i)) for i in range(6)]
    engine.drain()
    with pytest.raises(Draining, match="shutting down"):
        engine.submit(Request([1], 1))
    assert engine.wait_idle() and [len(ids(g)) for g in running] == [40] * 6
    engine.close()


def test_closing_ends_what_is_there():
    engine = Engine(gpt(), slots=2, chunk=8)
    running = [engine.submit(Request([i], 90)) for i in range(6)]
    engine.close()
    assert all(g.finish_reason in ("cancelled", "length") for g in running)
    assert all(len(ids(g)) == g.drawn for g in running)
    assert engine.busy == engine.waiting == 0


def test_a_failing_step_ends_what_was_written_and_the_engine_goes_on(caplog, monkeypatch):
    model = gpt()
    engine = Engine(model, slots=2, chunk=8)

    def fail(*args, **options):
        raise MemoryError("no memory left")

    with monkeypatch.context() as broken:
        broken.setattr(engine._reader, "read", fail)
        failed = engine.submit(Request([1, 2], 5))
        with pytest.raises(RuntimeError, match="could not finish"):
            ids(failed)
    assert failed.finish_reason == "error" and "no memory left" in caplog.text
    r = Request([1, 2], 5, seed=1)
    assert ids(engine.submit(r)) == alone(model, r)
    engine.close()


def test_a_request_whose_slot_cannot_be_prepared_is_ended_and_not_lost(monkeypatch):
    engine = Engine(gpt(), slots=2, chunk=8)

    def fail(*args):
        raise MemoryError("no memory left")

    for prompt in ([50], list(range(20))):  # in a slot each: the first one is used longest ago
        ids(engine.submit(Request(prompt, 2)))
    with monkeypatch.context() as broken:
        broken.setattr(engine._reader, "copy", fail)
        begins_alike = Request([*range(8), *range(30, 40)], 2)  # as the second prompt, but not so far
        with pytest.raises(RuntimeError, match="could not finish"):
            ids(engine.submit(begins_alike))
    r = Request([1, 2], 5, seed=1)
    assert ids(engine.submit(r)) == alone(gpt(), r) and engine.wait_idle(10)
    engine.close()


def test_values_that_are_not_finite_do_not_outlive_their_text():
    model = gpt()
    add_lora(model, LoRAConfig(r=2, target_modules=("k_proj", "v_proj")), "broken")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.fill_(float("nan"))
    engine = stepped(model, slots=1)
    broken = engine.submit(Request([1] * 20, 5, temperature=0, adapter="broken"))
    r = Request([3, 4], 6, seed=1)
    healthy = engine.submit(r)
    run(engine)
    engine.close()
    use_adapters(model, ())
    assert broken.finish_reason == "error" and ids(healthy) == alone(model, r)


TOO_LONG = "90 tokens of prompt and 7 new ones are 97, and this model takes 96"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "at least one token to start from"),
        ({"prompt": [VOCAB]}, f"ids go from 0 to {VOCAB - 1}"),
        ({"prompt": [-1]}, "outside the vocabulary"),
        ({"prompt": [1] * 90, "max_new_tokens": 7}, TOO_LONG),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is out of range"),
        ({"temperature": -1}, "temperature=-1 is out of range"),
        ({"top_k": 0}, "top_k=0 is out of range"),
        ({"top_p": 2}, "top_p=2 is out of range"),
        ({"seed": 2**63}, f"{2**63} is out of range"),
        ({"logprobs": -1}, "logprobs=-1 is out of range"),
        ({"logprobs": 62}, "there are only 61 tokens"),
        ({"timeout": 0}, "timeout=0 is out of range"),
        ({"adapter": "x"}, "no adapter is called 'x'; there are: none"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_done_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        stepped(gpt()).submit(Request(**({"prompt": [1], "max_new_tokens": 3} | change)))


@pytest.mark.parametrize(
    "options", [{"slots": 0}, {"chunk": 0}, {"queue": -1}, {"max_length": BLOCK + 1}], ids=str
)
def test_an_engine_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Engine(gpt(), **options)


def test_all_of_block_size_can_be_used():
    model = gpt()
    engine = stepped(model)
    requests = [Request([1] * (BLOCK - n), n, seed=n) for n in (0, 1, BLOCK - 1)]
    found = [engine.submit(r) for r in requests]
    run(engine)
    assert [ids(g) for g in found] == [alone(model, r) for r in requests]


def test_an_idle_row_changes_nothing_in_the_cache():
    model = gpt()
    cache = SlotCache(model.config, 4)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache.rows(1, [0]))
        before = cache.k.clone()
        model(torch.tensor([[5], [5], [5], [5]]), cache.rows(0, [0, None, 2, None]))
    spare = cache.k.size(3) - 1
    assert torch.equal(cache.k[:, [1, 3], :, :spare], before[:, [1, 3], :, :spare])
    assert not torch.equal(cache.k[:, 0, :, 0], before[:, 0, :, 0])
    with pytest.raises(ValueError, match="a slot holds 96 of 96 tokens"):
        cache.rows(0, [BLOCK]).positions(1)
