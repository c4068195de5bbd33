"""Many prompts at once and text bit by bit: against transformers, and each row against itself alone."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shared.adapters.prompts import add_prompt
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.config import LayerKind
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import from_hf
from shared.quantization.cache import Int8Cache
from shared.sampling import Completion, generate, generate_batch, generate_stream
from shared.sampling.reading import READ_AT_ONCE
from shared.tokenizers import BPETokenizer, CharTokenizer
from tests.helpers import shake, synthetic_text

TEXT = synthetic_text(300)
BPE = BPETokenizer.train(TEXT, 290, special_tokens=["<|endoftext|>"])
V, BLOCK = BPE.vocab_size, 48
PROMPTS = [TEXT[:20], "a", TEXT[40:90], "the ", TEXT[7:30]]
SIZES = dict(vocab_size=V, block_size=BLOCK, n_layer=2, n_head=4, n_embd=32)
LLAMA = dict(SIZES, norm="rmsnorm", position="rope", mlp="swiglu", bias=False, n_kv_head=2)


def gpt(**config) -> GPT:
    torch.manual_seed(0)
    model = shake(GPT(GPTConfig(**{**SIZES, **config}))).eval()
    model.tokenizer = BPE
    return model


def their_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ends = dict(bos_token_id=None, eos_token_id=None)
    return shake(
        GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=BLOCK, n_layer=2, n_head=4, n_embd=32, **ends))
    ).eval()


def their_llama(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, max_position_embeddings=BLOCK, hidden_size=32, intermediate_size=64)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    ends = dict(bos_token_id=None, eos_token_id=None)
    return shake(LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends, **config))).eval()


# ---- against transformers


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("make", [their_gpt2, their_llama])
def test_a_batch_is_written_as_by_transformers_with_padding_on_the_left(make, penalty):
    theirs = make()
    ours = from_hf(theirs)
    rows = [BPE.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    attended = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = theirs.generate(
        ids, attention_mask=attended, max_new_tokens=12, do_sample=False, pad_token_id=0, **without(penalty)
    )
    expected = [tuple(row) for row in out[:, longest:].tolist()]
    options = dict(temperature=0, tokenizer=BPE, repetition_penalty=penalty)
    written = generate_batch(ours, PROMPTS, 12, **options)
    if penalty == 1:
        assert [one.ids for one in written] == expected
        return
    # Their penalty counts the padding as part of the prompt: one by one there is none.
    for one, row in zip(written, rows):
        alone = theirs.generate(
            torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=penalty,
        )
        assert one.ids == tuple(alone[0, len(row) :].tolist())


def without(penalty: float) -> dict[str, float]:
    return {} if penalty == 1 else {"repetition_penalty": penalty}


# ---- a row is what it is alone


VARIANTS = {
    "GPT-2": {},
    "Llama": LLAMA,
    "a window": dict(LLAMA, window=5),
    "soft caps": dict(LLAMA, attention_softcap=5.0, logit_softcap=8.0),
    "layers that differ": dict(LLAMA, layers=(LayerKind(window=4), LayerKind(rope=False))),
}


@pytest.mark.slow
@pytest.mark.parametrize("new", [10, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_has_the_ids_and_logprobs_that_it_has_alone(variant, new):
    """Also where texts outgrow block_size, each at another time, and however many share a batch."""
    model = gpt(**VARIANTS[variant])
    together = generate_batch(model, PROMPTS, new, temperature=0)
    for prompt, row in zip(PROMPTS, together, strict=True):
        ids = BPE.prompt(prompt)
        alone = list(generate(model, ids, new, temperature=0, use_cache=False))
        ended = BPE.special_tokens["<|endoftext|>"]
        if ended in alone:
            alone = alone[: alone.index(ended) + 1]
        assert row.ids == tuple(alone) and row.prompt == prompt
        (own,) = generate_batch(model, [prompt], new, temperature=0)
        assert own.text == row.text and own.logprobs == pytest.approx(row.logprobs, abs=1e-4)
    for size in (1, 2):
        again = generate_batch(model, PROMPTS, new, temperature=0, batch_size=size)
        assert [one.ids for one in again] == [one.ids for one in together]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{}, LLAMA])
def test_a_seed_gives_a_row_the_text_of_its_own_seed_alone(variant):
    model = gpt(**variant)
    rows = model.generate(PROMPTS, 30, seed=7)
    assert rows == model.generate(PROMPTS, 30, seed=7) != model.generate(PROMPTS, 30, seed=8)
    assert rows == [model.generate(prompt, 30, seed=7 + i) for i, prompt in enumerate(PROMPTS)]
    others = ["other", *PROMPTS[1:3], TEXT[:60]]
    assert model.generate(others, 30, seed=7)[1:3] == rows[1:3]
    same = model.generate(["the "] * 3, 30, seed=2**32 - 1)
    assert len(set(same)) == 3 and same[1] == model.generate("the ", 30, seed=0)
    assert len(set(model.generate(["the "] * 3, 30))) == 3


def test_log_probabilities_are_the_models_own_before_penalties_and_filters():
    model = gpt(**LLAMA)
    options = dict(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.3, seed=1)
    for row in generate_batch(model, PROMPTS, 12, **options):
        ids = BPE.prompt(row.prompt)
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *row.ids]]))[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.slow
def test_a_long_prompt_beside_short_ones_is_read_in_parts():
    model = gpt(**{**LLAMA, "block_size": READ_AT_ONCE})
    prompts = [(TEXT * 20)[:1200], "a", "the "]
    assert 3 * len(BPE.encode(prompts[0])) > READ_AT_ONCE
    sizes = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    together = model.generate(prompts, 6, temperature=0)
    handle.remove()
    assert max(sizes) <= READ_AT_ONCE and len(sizes) > 7
    assert together == [model.generate(prompt, 6, temperature=0) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["int8 cache", "soft prompt", "soft prompt and a window"])
def test_other_caches_take_rows_of_different_lengths(change):
    model = gpt(**LLAMA, window=6 if "window" in change else None)
    if change == "int8 cache":
        model.cache_type = Int8Cache
    else:
        model = add_prompt(model, 3)
    rows = model.generate(PROMPTS, 60, temperature=0)
    assert rows == [model.generate(prompt, 60, temperature=0) for prompt in PROMPTS]


def test_a_cache_is_padded_before_anything_is_read():
    model = gpt()
    cache = model.new_cache(2)
    model(torch.tensor([[1], [2]]), cache)
    with pytest.raises(ValueError, match="holds 1 tokens: padding comes before the first"):
        cache.pad([1, 0])


# ---- where texts end


def counting(text: str = "abcdefghij") -> tuple[BigramModel, CharTokenizer]:
    """After each character comes the next one, after the last the first."""
    model = BigramModel(BigramConfig(len(text)))
    with torch.no_grad():
        model.table.weight.copy_(torch.eye(len(text)).roll(1, 1).log())
    return model, CharTokenizer(text)


def test_rows_end_for_themselves():
    model, tokenizer = counting()
    options = dict(temperature=0, stop=["gh", "cX"], tokenizer=tokenizer)
    first, second, third = generate_batch(model, ["a", "e", "i"], 6, **options)
    # What ended a text is among its tokens, and not in its text.
    assert (first.text, first.ids, first.finish_reason) == ("bcdefg", (1, 2, 3, 4, 5, 6), "length")
    assert (second.text, second.ids, second.finish_reason) == ("f", (5, 6, 7), "stop")
    assert (third.text, third.finish_reason) == ("jabcde", "length")
    assert first.logprobs == (0,) * 6


def test_an_end_token_ends_a_text():
    model = gpt()
    end = BPE.special_tokens["<|endoftext|>"]
    calls = []

    def scripted(module, args, logits):
        """The second row's third token is the end."""
        calls.append(len(logits))
        logits[:, -1, end] = -100.0
        if len(calls) == 3:
            logits[-1, -1, end] = 100.0
        return logits

    model.register_forward_hook(scripted)
    first, second = generate_batch(model, ["the a", "the"], 5, temperature=0)
    assert second.finish_reason == "stop" and len(second.ids) == 3 and second.ids[-1] == end
    assert second.text == BPE.decode(second.ids[:-1]) and "<|" not in second.text
    assert first.finish_reason == "length" and len(first.ids) == 5
    assert calls == [2, 2, 2, 1, 1]  # a row that has ended is not computed any more


@pytest.mark.slow
@pytest.mark.parametrize("stop", [(), "e", ["the", " a"]])
def test_streamed_pieces_together_are_what_generate_returns(stop):
    model = gpt(**LLAMA)
    for seed in range(4):
        pieces = list(model.stream("the ", 40, stop=stop, seed=seed))
        assert "".join(pieces) == model.generate("the ", 40, stop=stop, seed=seed)
        assert all(pieces) and (stop or len(pieces) > 10)
        assert not any(text in "".join(pieces) for text in ([stop] if isinstance(stop, str) else stop))


def test_a_stream_draws_no_more_than_is_asked_for():
    model = gpt().train()
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    stream = model.stream("the ", 40, seed=0)
    assert not calls
    next(stream)
    assert 1 <= len(calls) < 6
    stream.close()
    assert model.training


def test_prompts_may_be_tokens_and_models_may_be_of_any_week():
    model, tokenizer = counting()
    (written,) = generate_batch(model, [[0, 1]], 3, tokenizer=tokenizer)
    assert written == Completion("ab", "cde", (2, 3, 4), written.logprobs, "length")
    assert "".join(generate_stream(model, [0, 1], 3, tokenizer=tokenizer)) == "cde"
    assert generate_batch(model, ["ab"], 0, tokenizer=tokenizer)[0].text == ""


# ---- the repetition penalty


@pytest.mark.parametrize("penalty", [0.7, 1.0, 2.5])
def test_the_low_level_penalty_is_that_of_a_batch_and_changes_the_text(penalty):
    model = gpt(**LLAMA)
    ids = BPE.prompt("the ")
    options = dict(temperature=0, repetition_penalty=penalty)
    new = list(generate(model, ids, 20, **options))
    assert BPE.decode(new) == model.generate("the ", 20, **options)
    assert (new == list(generate(model, ids, 20, temperature=0))) == (penalty == 1)


# ---- what cannot be


def test_one_text_gives_a_text_and_several_give_a_list_of_200_tokens_unless_asked():
    model = gpt()
    one, several = model.generate("the ", 5, seed=1), model.generate(("the ", "a"), 5, seed=1)
    assert isinstance(one, str) and isinstance(several, list) and several[0] == one
    model, tokenizer = counting()
    (written,) = generate_batch(model, ["a"], tokenizer=tokenizer)
    assert len(written.ids) == 200 == len(list(generate(model, [0])))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "^generation needs at least one token to start from: give a prompt"),
        (["a", ""], {}, "^prompt 1 of 2: generation needs at least one token"),
        ([], {}, "no prompts: give at least one"),
        (["a", 5], {}, "a prompt is 5: each must be a text; tokens go to"),
        ([1, 2], {}, "a prompt is 1: each must be a text"),
        ("a", {"stop": ""}, "stop='': must be a text or several"),
        ("a", {"stop": ["b", ""]}, "each of at least one character"),
        ("a", {"stop": [3]}, "must be a text or several"),
        ("a", {"temperature": -1}, "temperature=-1 is out of range"),
        ("a", {"top_k": 0}, "top_k=0 is out of range"),
        ("a", {"top_p": 0}, "top_p=0 is out of range"),
        ("a", {"repetition_penalty": 0}, "repetition_penalty=0 is out of range"),
        ("a", {"seed": -1}, "seed -1 is out of range"),
        ("a", {"max_new_tokens": -1}, "max_new_tokens=-1 is out of range"),
    ],
)
def test_what_is_asked_for_wrongly_is_said(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        gpt().generate(prompt, **options)
    if isinstance(prompt, str):
        with pytest.raises(ValueError, match=message):
            gpt().stream(prompt, **options)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("abc", {}, "prompts='abc' is one text: put it into a list"),
        (["a", [1, V]], {}, f"prompt 1 of 2: .*{V}"),
        ([[1.5]], {}, "neither a text nor a list of token ids"),
        (["a"], {"batch_size": 0}, "batch_size=0 is out of range"),
    ],
)
def test_prompts_that_cannot_be_are_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate_batch(gpt(), prompts, **options)


def test_without_a_tokenizer_nothing_is_written():
    model = GPT(replace(gpt().config))
    for call in (model.generate, model.stream, model.score):
        with pytest.raises(ValueError, match="no tokenizer"):
            call("abc")
