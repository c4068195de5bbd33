"""shared/models/gpt.py against Hugging Face's models, and against the laws of a causal model with a cache."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shared.evaluation import cross_entropy
from shared.models.attention import CausalSelfAttention
from shared.models.gpt import GPT, GPTConfig, KVCache
from shared.runtime import ROOT, read_json
from shared.tokenizers import CharTokenizer
from tests.helpers import shake

VOCAB, BLOCK, TIME = 53, 32, 24


GPT2_NAMES = {
    "wte": "token_embedding",
    "wpe": "position_embedding",
    "ln_f": "norm",
    "h.": "blocks.",
    "ln_1": "attn_norm",
    "ln_2": "mlp_norm",
    "attn.c_proj": "attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
LLAMA_NAMES = {
    "model.layers": "blocks",
    "model.embed_tokens": "token_embedding",
    "model.norm": "norm",
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}


def renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def from_gpt2(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A GPT2LMHeadModel's parameters (or their gradients) under our names."""
    ours = {}
    for name, t in theirs.items():
        name = renamed(name.removeprefix("transformer."), GPT2_NAMES)
        if "_proj.weight" in name or "c_attn.weight" in name:
            t = t.T  # Conv1D keeps [in, out]
        if "c_attn" in name:
            for part, piece in zip("qkv", t.chunk(3)):
                ours[name.replace("c_attn", f"{part}_proj")] = piece
        else:
            ours[name] = t
    return ours


def from_llama(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters (or their gradients) of Llama, Mistral or Qwen3 under our names."""
    return {renamed(name, LLAMA_NAMES): t for name, t in theirs.items()}


def gpt2(activation: str) -> GPT2LMHeadModel:
    sizes = dict(vocab_size=VOCAB, n_positions=BLOCK, n_layer=2, n_head=4, n_embd=32)
    no_dropout = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    config = GPT2Config(**sizes, **no_dropout, activation_function=activation, attn_implementation="eager")
    return GPT2LMHeadModel(config)


LLAMA = dict(
    vocab_size=VOCAB,
    max_position_embeddings=BLOCK,
    num_hidden_layers=2,
    num_attention_heads=4,
    hidden_size=32,
    intermediate_size=88,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    attn_implementation="eager",
)
OURS = dict(vocab_size=VOCAB, block_size=BLOCK, n_layer=2, n_head=4, n_embd=32)
OUR_LLAMA = dict(
    OURS, norm="rmsnorm", position="rope", rope_theta=500.0, mlp="swiglu", mlp_hidden=88, bias=False
)


def llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **changes))


def qwen3(**changes) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**LLAMA, **changes))


def mistral(**changes) -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**LLAMA, **changes))


# Theirs, the renaming of their parameters, and our configuration.
PAIRS = {
    "GPT-2": (lambda: gpt2("gelu_new"), from_gpt2, GPTConfig(**OURS, mlp="gelu_tanh")),
    "GPT-2 with the exact GELU": (lambda: gpt2("gelu"), from_gpt2, GPTConfig(**OURS, mlp="gelu")),
    "GPT-2 with squared ReLU": (lambda: gpt2("relu2"), from_gpt2, GPTConfig(**OURS, mlp="relu2")),
    "Llama": (
        lambda: llama(num_key_value_heads=4, tie_word_embeddings=False),
        from_llama,
        GPTConfig(**OUR_LLAMA, tie_weights=False),
    ),
    "Llama with grouped queries and tied weights": (
        lambda: llama(num_key_value_heads=2, tie_word_embeddings=True),
        from_llama,
        GPTConfig(**OUR_LLAMA, n_kv_head=2, tie_weights=True),
    ),
    "Llama with one key head and biases": (
        lambda: llama(num_key_value_heads=1, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        from_llama,
        GPTConfig(**OUR_LLAMA | dict(bias=True), n_kv_head=1, tie_weights=False),
    ),
    "Qwen3": (
        lambda: qwen3(num_key_value_heads=2, head_dim=8, tie_word_embeddings=False),
        from_llama,
        GPTConfig(**OUR_LLAMA, n_kv_head=2, tie_weights=False, qk_norm=True),
    ),
    "Mistral with a sliding window": (
        lambda: mistral(num_key_value_heads=2, sliding_window=5, tie_word_embeddings=False),
        from_llama,
        GPTConfig(**OUR_LLAMA, n_kv_head=2, tie_weights=False, window=5),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_logits_and_gradients_equal_hugging_faces(name):
    build, rename, config = PAIRS[name]
    torch.manual_seed(0)
    theirs, ours = shake(build()), GPT(config).eval()
    weights = rename(dict(theirs.named_parameters()))
    own = dict(ours.named_parameters())
    assert weights.keys() == own.keys()
    with torch.no_grad():
        for key, p in own.items():
            p.copy_(weights[key])

    idx, targets = torch.randint(VOCAB, (2, TIME)), torch.randint(VOCAB, (2, TIME))
    expected, got = theirs(idx).logits, ours(idx)
    assert expected.std() > 0.3  # the comparison is worth something
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    F.cross_entropy(expected.view(-1, VOCAB), targets.view(-1)).backward()
    cross_entropy(got, targets).backward()
    gradients = rename({n: p.grad for n, p in theirs.named_parameters()})
    for key, p in own.items():
        torch.testing.assert_close(
            p.grad, gradients[key], atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_the_window_of_the_mistral_pair_is_felt():
    """Without the window the same weights give other logits, so the comparison above does test it."""
    config = PAIRS["Mistral with a sliding window"][2]
    model = shake(GPT(config))
    wide = GPT(replace(config, window=None)).eval()
    wide.load_state_dict(model.state_dict())
    idx = torch.randint(VOCAB, (1, TIME), generator=torch.Generator().manual_seed(1))
    difference = (model(idx) - wide(idx)).abs().amax(-1)[0]
    assert difference[:5].max() < 1e-5 and difference[5:].min() > 1e-3


CACHED = {
    "GPT-2": GPTConfig(**OURS),
    "Llama with grouped queries": GPTConfig(**OUR_LLAMA, n_kv_head=2, qk_norm=True),
    "a window": GPTConfig(**OUR_LLAMA, n_kv_head=2, window=5),
    "a window of one": GPTConfig(**OURS, window=1),
    "a window with learned positions": GPTConfig(**OURS, window=7),
}
CHUNKS = {
    "token by token": [1] * TIME,
    "one and the rest": [1, TIME - 1],
    "all but one and one": [TIME - 1, 1],
    "at once": [TIME],
    "unevenly": [3, 1, 7, 2, 1, 10],
}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", CACHED)
def test_cached_and_uncached_logits_are_equal_at_every_position(name, chunks):
    model = shake(GPT(CACHED[name]))
    idx = torch.randint(VOCAB, (2, TIME), generator=torch.Generator().manual_seed(2))
    cache = model.new_cache(batch_size=2)
    assert sum(CHUNKS[chunks]) == TIME
    with torch.no_grad():
        got = torch.cat([model(part, cache) for part in idx.split(CHUNKS[chunks], dim=1)], dim=1)
        torch.testing.assert_close(got, model(idx), atol=1e-5, rtol=1e-5)
    assert cache.length == TIME


def test_a_full_cache_raises_and_says_what_to_do():
    model = GPT(GPTConfig(**OURS))
    cache = model.new_cache(max_length=4)
    model(torch.zeros(1, 3, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="3 of 4 tokens and 2 more do not fit.*new cache"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache)
    assert cache.length == 3
    model(torch.zeros(1, 1, dtype=torch.int64), cache)  # what fits still does


def test_a_cache_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="max_length=33: must be from 1 to the model's block_size=32"):
        KVCache(GPTConfig(**OURS), max_length=33)


def test_a_sequence_longer_than_block_size_is_refused():
    with pytest.raises(ValueError, match="33 tokens do not fit in block_size=32"):
        GPT(GPTConfig(**OURS))(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.parametrize("name", CACHED)
def test_the_future_does_not_change_the_past_and_a_window_forgets(name):
    config = CACHED[name]
    model = shake(GPT(config))
    idx = torch.randint(VOCAB, (1, TIME), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(idx)
        for t in range(TIME):
            changed = idx.clone()
            changed[0, t] = (changed[0, t] + 1) % VOCAB
            difference = (model(changed) - before).abs().amax(-1)[0]
            assert t == 0 or difference[:t].max() == 0, f"position {t} is seen by an earlier one"
            assert difference[t] > 1e-4
            if config.window:  # each layer carries a token window - 1 positions further
                reach = t + config.n_layer * (config.window - 1)
                assert reach + 1 >= TIME or difference[reach + 1 :].max() < 1e-6


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_gpt2s_published_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert model.num_parameters() == parameters
    assert model.num_parameters(embeddings=False) == parameters - 1024 * model.config.n_embd


def test_the_large_preset_is_a_llama_of_about_1_1_billion():
    config = GPTConfig.preset("gpt-1b")
    assert (config.n_layer, config.n_embd, config.n_head, config.mlp) == (24, 1536, 12, "swiglu")
    sizes = dict(vocab_size=50257, hidden_size=1536, intermediate_size=6144)
    theirs = LlamaConfig(**sizes, num_hidden_layers=24, num_attention_heads=12)
    with torch.device("meta"):
        model, llama = GPT(config), LlamaForCausalLM(theirs)
    assert model.num_parameters() == llama.num_parameters() and 1.0e9 < model.num_parameters() < 1.1e9
    swiglus = [GPTConfig(n_embd=width, n_head=1, mlp="swiglu").hidden for width in (576, 960, 768)]
    assert swiglus == [1536, 2560, 2048]  # SmolLM2-135M, SmolLM2-360M, karpathy/tinyllamas 110M


@pytest.mark.parametrize(
    "changes", [{}, {"mlp": "swiglu", "n_kv_head": 1, "tie_weights": False}], ids=["GPT-2", "Llama"]
)
def test_flops_are_those_that_torch_counts(changes):
    config = GPTConfig(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=32, **changes)
    model, idx = GPT(config), torch.zeros(3, 64, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx).sum().backward()
    assert model.flops_per_token(64) * idx.numel() == counter.get_total_flops()


@pytest.mark.slow
def test_the_first_loss_of_gpt2_is_what_its_first_values_say():
    """The last norm's output is 768 numbers of about 1, the output layer's weights are N(0, 0.02²), so the
    logits are N(0, 768 · 0.02²): their half variance, 0.15, comes on top of ln(50257) = 10.82.
    """
    expected = math.log(50257) + 768 * 0.02**2 / 2
    torch.manual_seed(1)
    x, y = torch.randint(50257, (2, 1, 512))
    for model in (GPT(GPTConfig.preset("gpt2")), GPT2LMHeadModel(GPT2Config())):
        with torch.no_grad():
            logits = model.eval()(x)
        assert cross_entropy(getattr(logits, "logits", logits), y).item() == pytest.approx(expected, abs=0.1)


def test_the_mini_preset_is_the_model_of_week_4s_committed_run():
    run = ROOT / "logs/04_mini_gpt/reference/tinyshakespeare/headline/run.json"
    logged = read_json(run)["settings"]["model"]
    preset = json.loads(json.dumps(asdict(GPTConfig.preset("mini", block_size=256))))
    assert {name: preset[name] for name in logged} == logged


def test_an_unknown_preset_is_refused_with_the_names():
    with pytest.raises(ValueError, match="no GPT preset 'gpt3'; there are: nano, mini, gpt2"):
        GPTConfig.preset("gpt3")


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_the_first_loss_is_ln_of_the_vocabulary_size(name):
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(name)).eval()
    idx = torch.randint(65, (8, 65))
    with torch.no_grad():
        assert cross_entropy(model(idx[:, :64]), idx[:, 1:]).item() == pytest.approx(math.log(65), abs=0.05)


@pytest.mark.parametrize("zero_init", [False, True])
def test_initial_values_are_those_of_the_table(zero_init):
    torch.manual_seed(0)
    sizes = dict(vocab_size=500, block_size=128, n_layer=3, n_head=4, n_embd=128)
    model = GPT(GPTConfig(**sizes, tie_weights=False, zero_init=zero_init))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            if zero_init:
                assert (p == 0).all(), name
            else:
                assert p.std().item() == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.05), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(p.mean().item()) < 0.001, name


@pytest.mark.parametrize("zero_init", [False, True])
def test_zero_init_and_nothing_else_makes_each_block_the_identity(zero_init):
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("mini", zero_init=zero_init)).eval()
    x = torch.randn(2, 10, model.config.n_embd)
    for block in model.blocks:
        assert torch.equal(block(x, model.rotaries[0].at(slice(0, 10)), None, 0), x) == zero_init


def test_a_config_names_all_its_problems_at_once():
    with pytest.raises(ValueError) as error:
        GPTConfig(n_layer=0, vocab_size=-1, norm="batchnorm", mlp="tanh", position="none", dropout=1.0)
    for part in ("n_layer=0", "vocab_size=-1", "'batchnorm'", "'tanh'", "'none'", "dropout=1.0"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_embd=30), "n_embd=30 is not a multiple of n_head=4"),
        (dict(n_kv_head=3), "n_head=4 is not a multiple of n_kv_head=3"),
        (dict(n_embd=12, position="rope"), "even head size"),
        (dict(window=0), "window=0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**(OURS | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"n_kv_head": 1}, {"window": 2}, {"qk_norm": lambda size: nn.RMSNorm(size, eps=1e-5)}],
    ids=["plain", "grouped queries", "window", "qk_norm"],
)
def test_attentions_gradient_equals_finite_differences(options):
    torch.manual_seed(0)
    layer = CausalSelfAttention(8, 2, bias=True, **options).double()
    names, values = zip(*layer.named_parameters())
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


def test_rope_scores_depend_on_the_distance_alone():
    model = GPT(GPTConfig(**OUR_LLAMA))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def score(i: int, j: int) -> float:
        turned_q = model.rotaries[0].at(slice(i, i + 1))(q)
        turned_k = model.rotaries[0].at(slice(j, j + 1))(k)
        return (turned_q * turned_k).sum().item()

    assert score(20, 13) == pytest.approx(score(7, 0), abs=1e-5)
    assert score(20, 13) != pytest.approx(score(20, 12), abs=1e-3)


def test_positions_may_differ_by_row():
    rotary = GPT(GPTConfig(**OUR_LLAMA)).rotaries[0]
    x = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    both = rotary.at(torch.tensor([[0, 1, 2], [5, 6, 7]]))(x)
    torch.testing.assert_close(both[:1], rotary.at(slice(0, 3))(x[:1]))
    torch.testing.assert_close(both[1:], rotary.at(slice(5, 8))(x[1:]))


def test_tied_weights_are_one_tensor_and_untied_are_two():
    tied, untied = GPT(GPTConfig(**OURS)), GPT(GPTConfig(**OURS, tie_weights=False))
    assert tied.lm_head.weight is tied.token_embedding.weight
    assert untied.lm_head.weight is not untied.token_embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == VOCAB * 32


@pytest.mark.parametrize("place", ["embedding", "attention", "mlp"])
@torch.no_grad()
def test_half_of_the_numbers_are_dropped_in_each_place_that_gpt2_drops_some(place):
    """Each place by itself: the branches of the block that are not looked at add nothing."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, block_size=32, n_layer=1, n_head=2, n_embd=64, dropout=0.5))
    block = model.blocks[0]
    silenced = block.mlp.down_proj if place == "attention" else block.attn.o_proj
    silenced.weight.zero_()
    silenced.bias.zero_()
    seen = {}
    block.register_forward_hook(lambda module, inputs, output: seen.update(before=inputs[0], after=output))
    model.eval()
    (model if place == "embedding" else block).dropout.train()
    model(torch.randint(40, (8, 32)))
    dropped = seen["before"] == 0 if place == "embedding" else seen["after"] == seen["before"]
    assert dropped.double().mean().item() == pytest.approx(0.5, abs=0.02)


@torch.no_grad()
def test_attention_weights_are_dropped_too():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**OURS, dropout=0.5)).eval()
    idx = torch.arange(TIME)[None]
    assert torch.equal(model(idx), model(idx))
    model.blocks[0].attn.train()
    assert not torch.equal(model(idx), model(idx))


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**OURS, dropout=0.3))
    idx = torch.arange(TIME)[None]
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


@pytest.mark.slow
def test_generate_gives_the_same_text_with_and_without_the_cache():
    chars = "abcdefghijklmnopqrstuvwxyz .,!?ABCDEFGHIJKLMNOPQRSTUV"
    assert len(chars) == VOCAB
    model = shake(GPT(CACHED["Llama with grouped queries"]))
    model.tokenizer = CharTokenizer(chars)
    options = dict(max_new_tokens=3 * BLOCK, temperature=1.0, seed=5)  # past block_size, twice
    with_cache = model.generate("hello", **options)
    assert with_cache == model.generate("hello", **options, use_cache=False)
    assert len(with_cache) == 3 * BLOCK
    at = with_cache.index(with_cache[40:42])
    assert model.generate("hello", **options, stop=[with_cache[40:42]]) == with_cache[:at]
    assert model.generate("hello", **options, stop=with_cache[40:42]) == with_cache[:at]


def test_generate_without_a_tokenizer_says_so():
    with pytest.raises(ValueError, match="no tokenizer"):
        GPT(GPTConfig(**OURS)).generate("hello")


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_without_biases_there_are_none(norm):
    with_and_without = [GPT(GPTConfig(**OURS, norm=norm, bias=bias)) for bias in (True, False)]
    biases = [
        sum(name.endswith("bias") for name, _ in model.named_parameters()) for model in with_and_without
    ]
    assert biases[0] > 0 and biases[1] == 0


def test_a_cache_is_of_the_models_type():
    model = shake(GPT(GPTConfig(**OURS))).to(torch.bfloat16)
    cache = model.new_cache()
    idx = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        parts = torch.cat([model(idx[:, :3], cache), model(idx[:, 3:], cache)], dim=1)
        torch.testing.assert_close(parts, model(idx), atol=0.05, rtol=0.05)
    assert cache.k.dtype == cache.v.dtype == torch.bfloat16
