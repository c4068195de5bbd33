"""shared/quantization/decoder.py and decoder.c: the logits of a GPT's own forward, whatever is read together.

Oracles: `GPT.forward`, which is held to transformers elsewhere; with packed weights, the same on unpacked
weights and inputs that PyTorch has rounded as kernels.h says.
"""

import os
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.adapters import LoRAConfig, add_lora
from shared.adapters.attach import merge_lora, use_adapters
from shared.models.gpt import GPT, GPTConfig
from shared.quantization import native, quantize
from shared.quantization.decoder import Decoder, NotForC, native_reader
from shared.quantization.modules import QuantizedLinear
from shared.quantization.packing import PackedWeight
from shared.registry import fast_reader
from shared.sampling import generate
from tests.family_configs import DYNAMIC, FAMILIES, MISTRAL
from tests.helpers import shake
from tests.quantization.helpers import COMPILED, TIED, UNTIED, gpt, quiet
from tests.quantization.test_packing import rounded

pytestmark = COMPILED
CONFIGS = {**FAMILIES, "Mistral": MISTRAL}
SCHEMES = {"int8": {}, "int4": {}, "nf4": {}, "int8 in groups": {"group_size": 32}}


@pytest.fixture(params=native.variants())
def variant(request, monkeypatch) -> str:
    """Each variant of the kernels that this processor runs."""
    monkeypatch.setenv(native.CHOICE, request.param)
    return request.param


def random_ids(vocab_size: int, count: int, seed: int = 0) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def expected(model: GPT, ids: list[int]) -> Tensor:
    return model.eval()(torch.tensor([ids]))[0]


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_the_models_own_at_every_chunking_and_in_every_batch(family, variant):
    torch.manual_seed(0)
    model = shake(GPT(CONFIGS[family]))
    ids, other = (random_ids(model.config.vocab_size, count, count) for count in (40, 23))
    decoder = Decoder(model, slots=4)
    whole = decoder.read([(0, ids)], every=True)
    assert_close(whole, expected(model, ids))
    parts = [decoder.read([(1, ids[:7])], every=True)]
    parts += [decoder.read([(2, other), (1, [token])])[1:] for token in ids[7:8]]
    parts += [decoder.read([(1, [token]), (3, other[:1])], every=True)[:1] for token in ids[8:12]]
    parts.append(decoder.read([(1, ids[12:])], every=True))
    assert torch.equal(torch.cat(parts), whole), "the same bits, whatever is read together"
    assert decoder.lengths == [40, 40, 23, 4]


@pytest.mark.parametrize("options", SCHEMES.items(), ids=SCHEMES)
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_packed_weights_are_multiplied_with_rounded_inputs(config, options, variant):
    name, more = options
    scheme = name.split()[0]
    if scheme == "nf4":
        more = {"group_size": 32}
    ids = random_ids(config.vocab_size, 30)
    packed = quantize(gpt(config), scheme, say=quiet, kernels=("native",), **more)
    ours = Decoder(packed).read([(0, ids)], every=True)
    unpacked = quantize(gpt(config), scheme, say=quiet, kernels=(), **more)
    exact = expected(unpacked, ids)
    for module in unpacked.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))
    theirs = expected(unpacked, ids)
    # An input between two steps may go to either, and the layers after it then read another one. But no more
    # is lost than that rounding loses, and most of it is the same.
    assert (ours - exact).norm() < 1.2 * (theirs - exact).norm() < 0.03 * exact.norm()
    assert (ours - theirs).norm() < 0.9 * (theirs - exact).norm()


def with_adapters(config: GPTConfig) -> GPT:
    """Two adapters, "first" on queries and values, "second" on all linear layers; neither is zero."""
    model = gpt(config)
    add_lora(model, LoRAConfig(r=3), "first")
    add_lora(model, LoRAConfig(r=5, use_rslora=True, target_modules="all-linear"), "second")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("shares", [(), "first", "second", {"first": 0.5, "second": -2.0}], ids=str)
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_the_adapters_in_use_count(config, shares, variant):
    model = use_adapters(with_adapters(config), shares)
    ids = random_ids(config.vocab_size, 30)
    assert_close(Decoder(model).read([(0, ids)], every=True), expected(model, ids))
    merge_lora(model, keep=True)
    assert_close(Decoder(model).read([(0, ids)], every=True), expected(model, ids))


def test_each_slot_may_have_an_adapter_of_its_own(variant):
    model = with_adapters(UNTIED)
    ids = random_ids(UNTIED.vocab_size, 30)
    decoder = Decoder(model, slots=3, adapters=("first", "second"))
    for slot, name in enumerate((None, "second", "first")):
        decoder.use_adapter(slot, name)
    together = decoder.read([(slot, ids) for slot in range(3)])
    for slot, name in enumerate(((), "second", "first")):
        assert_close(together[slot], expected(use_adapters(model, name), ids)[-1])


def test_weights_in_bfloat16_are_read_as_they_are(variant):
    model = gpt(UNTIED).bfloat16()
    ids = random_ids(UNTIED.vocab_size, 30)
    ours = Decoder(model).read([(0, ids)], every=True)
    assert_close(ours, expected(gpt(UNTIED).bfloat16().float(), ids))


def test_the_number_of_threads_changes_no_bit():
    ids = random_ids(UNTIED.vocab_size, 30)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5, 3):
            torch.set_num_threads(threads)
            found.append(Decoder(gpt(UNTIED)).read([(0, ids)], every=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_a_long_prompt_goes_through_in_blocks():
    config = replace(CONFIGS["GPT-2"], block_size=200)
    model = shake(GPT(config))
    ids = random_ids(config.vocab_size, config.block_size)
    decoder = Decoder(model, slots=3)
    together = decoder.read([(0, ids), (1, ids[:9]), (2, ids)])
    assert torch.equal(together[0], together[2])
    assert_close(together[0], expected(model, ids)[-1])
    assert_close(together[1], expected(model, ids[:9])[-1])


MODEL = gpt(UNTIED)
LENGTHS = st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(LENGTHS)
def test_any_mixture_of_texts_reads_like_each_alone(lengths):
    model = MODEL
    together, alone = Decoder(model, slots=len(lengths)), Decoder(model, slots=1)
    texts = [random_ids(UNTIED.vocab_size, sum(parts) + 1, seed) for seed, parts in enumerate(lengths)]
    begun = [0] * len(texts)
    for step in range(max(map(len, lengths)) + 1):
        new = []
        for slot, parts in enumerate(lengths):
            count = (*parts, 1)[step] if step <= len(parts) else 0
            if count:
                new.append((slot, texts[slot][begun[slot] : begun[slot] + count]))
                begun[slot] += count
        for (slot, _), logits in zip(new, together.read(new)):
            alone.lengths[0] = 0
            assert torch.equal(alone.read([(0, texts[slot][: begun[slot]])])[0], logits)


def test_what_is_forgotten_or_copied_is_read_on_as_if_it_had_been_read():
    model = gpt(UNTIED)
    ids = random_ids(UNTIED.vocab_size, 30)
    decoder = Decoder(model, slots=2)
    whole = decoder.read([(0, ids)], every=True)
    decoder.copy(0, 1, 13)
    assert torch.equal(decoder.read([(1, ids[13:])], every=True), whole[13:])
    decoder.lengths[0] = 5
    assert torch.equal(decoder.read([(0, ids[5:])], every=True), whole[5:])


def test_a_text_that_does_not_fit_is_refused_and_nothing_is_read():
    decoder = Decoder(gpt(UNTIED), slots=2, max_length=10)
    decoder.read([(1, [1] * 8)])
    with pytest.raises(ValueError, match="a slot holds 8 of 10 tokens, and 3 more do not fit"):
        decoder.read([(0, [1]), (1, [1] * 3)])
    assert decoder.lengths == [0, 8]
    with pytest.raises(ValueError, match="max_length=33: must be from 1 to the model's block_size=32"):
        Decoder(gpt(UNTIED), max_length=33)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ([(2, [1])], "slots .2.: this decoder's are numbered from 0 to 1"),
        ([(0, [1]), (-1, [1])], "slots .0, -1.: this decoder's are numbered"),
        ([(1, [1]), (1, [2])], "slots .1, 1.: each can be given once"),
        ([(0, [1]), (1, [])], "slot 1 holds 0 tokens and is given 0: give at least one"),
    ],
    ids=["beyond", "negative", "twice", "empty"],
)
def test_what_would_lie_in_other_memory_is_refused(new, message):
    decoder = Decoder(gpt(UNTIED), slots=2)
    with pytest.raises(ValueError, match=message):
        decoder.read(new)
    assert decoder.lengths == [0, 0]
    with pytest.raises(ValueError, match="numbered from 0 to 1"):
        decoder.copy(0, 2, 1)
    decoder.lengths[0] = -1
    with pytest.raises(ValueError, match="slot 0 holds -1 tokens"):
        decoder.read([(0, [1])])


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_it_reads_on_where_the_models_tensors_become_others(scheme):
    options = {"group_size": 32} if scheme == "nf4" else {}
    model = quantize(gpt(UNTIED), scheme, say=quiet, kernels=("native",), **options)
    ids = random_ids(UNTIED.vocab_size, 30)
    decoder = Decoder(model)
    before = decoder.read([(0, ids)])
    model.load_state_dict(model.state_dict())
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module._apply(lambda tensor: tensor.clone())
            for name, tensor in module.named_buffers(recurse=False):
                module.register_buffer(name, tensor.clone())
    garbage = [torch.full((n, 16), torch.nan) for n in range(1, 400)]
    decoder.lengths[0] = 0
    assert torch.equal(decoder.read([(0, ids)]), before) and garbage


@pytest.mark.parametrize("bad", [-1, 53, 2**31])
def test_an_id_outside_the_vocabulary_is_refused(bad):
    with pytest.raises(ValueError, match=f"the id {bad} .*from 0 to 52"):
        Decoder(gpt(UNTIED)).read([(0, [1, bad])])


def test_values_that_are_not_finite_are_not_hidden_and_do_not_outlive_their_text():
    model = gpt(UNTIED)
    decoder = Decoder(model, slots=2)
    healthy = decoder.read([(1, [1, 2])])
    with torch.no_grad():
        model.token_embedding.weight[7] = torch.nan
    both = decoder.read([(0, [7, 1]), (1, [3])])
    assert not both[0].isfinite().any() and both[1].isfinite().all()
    decoder.lengths = [0, 0]
    assert torch.equal(decoder.read([(0, [1, 2])]), healthy)


def with_dora(model: GPT) -> GPT:
    return add_lora(model, LoRAConfig(r=2, use_dora=True))


class OtherNorm(nn.LayerNorm):
    """It could compute anything."""


def with_another_norm(model: GPT) -> GPT:
    model.norm = OtherNorm(model.config.n_embd)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_dora, r"lengths of its own .*\(DoRA\)"),
        (with_another_norm, "it has a OtherNorm"),
        (GPT.half, "weights in float16"),
        (lambda model: GPT(DYNAMIC), "angles depend on the length"),
        (lambda model: quantize(model, "int8", say=quiet, kernels=()), "not in the order for C"),
    ],
    ids=["dora", "norm", "fp16", "dynamic", "unpacked"],
)
def test_what_it_does_not_know_is_left_to_pytorch(change, reason, caplog):
    model = change(gpt(TIED))
    with pytest.raises(NotForC, match=reason):
        Decoder(model)
    caplog.set_level("INFO")
    assert fast_reader(model, 1, 8) is None
    assert "PyTorch reads with this model" in caplog.text


@pytest.mark.parametrize("family", CONFIGS)
def test_generate_writes_the_same_text_by_either(family, monkeypatch):
    torch.manual_seed(0)
    model = shake(GPT(CONFIGS[family]))
    prompt = random_ids(model.config.vocab_size, 9)
    count = model.config.block_size + 5  # beyond its end, where it starts anew
    assert native_reader(model, 1, 8) is not None
    ours = list(generate(model, prompt, count, 0))
    monkeypatch.setenv(native.CHOICE, "none")
    assert native_reader(model, 1, 8) is None
    assert list(generate(model, prompt, count, 0)) == ours


def test_two_threads_may_read_at_once():
    model, ids = gpt(UNTIED), random_ids(UNTIED.vocab_size, 30)
    expected_logits = Decoder(model).read([(0, ids)])
    found = []

    def work() -> None:
        decoder = Decoder(model)
        for _ in range(20):
            decoder.lengths[0] = 0
            found.append(torch.equal(decoder.read([(0, ids)]), expected_logits))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


def test_a_forked_process_reads_too():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        decoder = Decoder(gpt(UNTIED))
        logits = decoder.read([(0, [1, 2, 3])])
        child = os.fork()
        if child == 0:
            decoder.lengths[0] = 0
            os._exit(0 if torch.equal(decoder.read([(0, [1, 2, 3])]), logits) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)
