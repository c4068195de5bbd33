"""shared/export/__main__.py, onnx_export.py and token_formats.py against transformers, tokenizers, gguf's
reader and names, ONNX Runtime, and llama.cpp.

The tests of llama.cpp itself are there only where its package xllamacpp is installed (requirements-test.txt);
`-k llama_cpp` shows them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import onnxruntime
import pytest
import requests
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import quantize
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared import checkpoint
from shared.adapters import LoRAConfig, add_lora
from shared.commandline import parse_args
from shared.export import __main__ as export
from shared.export import gguf as gguf_export
from shared.export import huggingface, save_hf_folder, to_gguf, to_onnx
from shared.export import onnx as onnx_export
from shared.export.huggingface import Card, push_to_hub
from shared.export.onnx import OnnxModel
from shared.models.chat import IM_END, IM_START, chat_prompt
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import from_gguf, from_hf, load_smollm2
from shared.models.tokenizer_files import DEFAULT_PATTERN, SMOLLM_PATTERN
from shared.quantization import quantize as quantize_model
from shared.runtime import ROOT
from shared.sampling import generate
from shared.tokenizers import BPETokenizer, CharTokenizer, Tokenizer, gpt2_tokenizer
from shared.tokenizers.bpe import END_OF_TEXT, GPT2_PATTERN, GPT4_PATTERN
from tests.expectations.make_smollm2 import CONVERSATIONS
from tests.helpers import fuzz, shake, synthetic_text

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TEXT = synthetic_text()
NEW = 64
SMALL = dict(vocab_size=320, block_size=128, n_layer=2, n_head=4, n_embd=64)
LLAMA = dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False)
CONFIGS = {
    "GPT-2": GPTConfig(**SMALL),
    "GPT-2 without biases, untied": GPTConfig(**SMALL, bias=False, tie_weights=False),
    "Llama with grouped queries": GPTConfig(**SMALL, **LLAMA, n_kv_head=2, rope_theta=777.0),
    "Qwen3, as in week 4's modern recipe": GPTConfig.preset("mini", **SMALL),
}
ARCHITECTURES = ["GPT2LMHeadModel", "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]
DIFFICULT = [
    "",
    " ",
    "\n\n \t\r\n  x  ",
    "it's IT'S we'll \u2019s",
    "1 12 123 1234567 \u00bd \u0663",
    "na\u00efve \u732b\U0001f408\u200d\u2b1b e\u0301",
    "a" * 300,
    "  end  ",
    " \u00a0\u3000x\u2028y",
    f"a{END_OF_TEXT}b{END_OF_TEXT}",
    "<|endoftext|",
    "x\ufffd\u0000y",
    "!?.,;:()[]{}$+<=>^~|\\",
    "\n\n",
    "a\n  ",
    " \n \nb",
]
PATTERNS = {
    "GPT-2": GPT2_PATTERN,
    "SmolLM": SMOLLM_PATTERN,
    "GPT-4": GPT4_PATTERN,
    "default": DEFAULT_PATTERN,
}


@cache
def bpe(
    pattern: str = GPT2_PATTERN, special: tuple[str, ...] = (END_OF_TEXT,), size: int = 310
) -> BPETokenizer:
    return BPETokenizer.train(TEXT, size, pattern, special)


CHARACTERS = CharTokenizer.train(TEXT + "\u00e9\u20ac\\\t\r'1")
TOKENIZERS = {
    "GPT-2 without biases, untied": bpe(special=(), size=320),
    "Llama with grouped queries": CHARACTERS,
}


@cache
def made(name: str) -> GPT:
    torch.manual_seed(0)
    return shake(GPT(CONFIGS[name])).eval()


def tokenizer_of(name: str):
    return TOKENIZERS.get(name, bpe())


def prompt(name: str) -> list[int]:
    return tokenizer_of(name).encode(TEXT)[:20]


def idx(batch: int = 2, time: int = 40) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, time), generator=torch.Generator().manual_seed(1))


@cache
def greedy(name: str) -> list[int]:
    """64 tokens by our GPT; the best is so far ahead of the second each time that rounding cannot decide."""
    model, ids = made(name), prompt(name)
    new = list(generate(model, ids, NEW, temperature=0))
    with torch.inference_mode():
        best = model(torch.tensor([ids + new]))[0, len(ids) - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4 and len(set(new)) > 10
    return new


@torch.inference_mode()
def same_logits(got, expected, tolerance: float = 1e-5) -> None:
    assert expected.std() > 0.3
    torch.testing.assert_close(torch.as_tensor(got), expected, atol=tolerance, rtol=tolerance)


def same_tensors(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def with_zeros(model: GPT) -> dict[str, torch.Tensor]:
    """The tensors of a GPT-2, biases of zero among them where it has none."""
    if model.config.norm == "rmsnorm":
        return model.state_dict()
    full = GPT(replace(model.config, bias=True)).state_dict()
    return {name: model.state_dict().get(name, torch.zeros_like(t)) for name, t in full.items()}


# ---- Hugging Face


@pytest.mark.parametrize(("name", "architecture"), list(zip(CONFIGS, ARCHITECTURES)))
def test_transformers_loads_the_folder_and_writes_the_same_64_tokens(name, architecture, tmp_path):
    folder = save_hf_folder(tmp_path / "deep" / "m", made(name), tokenizer_of(name))
    assert sorted(p.name for p in folder.iterdir()) == sorted(huggingface.FILES) and list(
        folder.parent.iterdir()
    ) == [folder]
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    assert type(theirs).__name__ == architecture
    with torch.inference_mode():
        same_logits(theirs(idx()).logits, made(name)(idx()))
    batch = tokenizer(TEXT[:60], return_tensors="pt", return_token_type_ids=False)
    ids = torch.tensor([prompt(name)])
    assert batch.input_ids[0].tolist() == tokenizer_of(name).encode(TEXT[:60])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    assert out[0, ids.size(1) :].tolist() == greedy(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folder_comes_back_as_our_model_and_tokenizer(name, tmp_path):
    back = from_hf(save_hf_folder(tmp_path / "m", made(name), tokenizer_of(name)))
    expected = with_zeros(made(name))
    assert back.state_dict().keys() == expected.keys() and all(
        torch.equal(t, expected[n]) for n, t in back.state_dict().items()
    )
    assert back.tokenizer.fingerprint == tokenizer_of(name).fingerprint


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_autotokenizer_gives_our_ids_and_our_text(pattern, tmp_path):
    ours = bpe(pattern)
    folder = save_hf_folder(tmp_path / "m", made("GPT-2"), ours)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*DIFFICULT, *fuzz(1000, seed=3)]:
        ids = ours.encode(text, allowed_special="all")
        assert theirs(text)["input_ids"] == ids, text
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.special_tokens[END_OF_TEXT],
    ) * 3
    assert from_hf(folder).tokenizer.fingerprint == ours.fingerprint


def test_a_character_tokenizer_goes_along_and_knows_what_it_does_not_know(tmp_path):
    folder = save_hf_folder(tmp_path / "m", made("GPT-2"), CHARACTERS)
    theirs = AutoTokenizer.from_pretrained(folder)
    text = TEXT[:50] + "\u00e9\u20ac\\\t\r'1 \n  \n"
    assert (
        theirs(text)["input_ids"] == CHARACTERS.encode(text)
        and theirs.decode(CHARACTERS.encode(text)) == text
    )
    for text in ("z", "\u00e8", "a\U0001f408"):
        with pytest.raises(ValueError):
            CHARACTERS.encode(text)
        with pytest.raises(Exception, match="WordLevel error"):
            theirs(text)
    assert theirs.eos_token_id is None


def test_gpt2s_vocabulary_goes_along(tmp_path):
    ours = gpt2_tokenizer()
    model = GPT(
        GPTConfig(vocab_size=50304, block_size=16, n_layer=1, n_head=1, n_embd=2)
    )  # more rows than tokens, as is usual for speed
    theirs = AutoTokenizer.from_pretrained(save_hf_folder(tmp_path / "m", model, ours))
    for text in DIFFICULT:
        assert theirs(text)["input_ids"] == ours.encode(text, allowed_special="all"), text
    assert from_gguf(to_gguf(tmp_path / "m.gguf", model, ours)).tokenizer.encode(TEXT[:500]) == ours.encode(
        TEXT[:500]
    )


def test_smollm2_with_its_chat_template(tmp_path):
    model, tokenizer = load_smollm2()
    folder = save_hf_folder(tmp_path / "m", model, tokenizer, Card(sample="Hello."))
    theirs, their_tokens = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    for messages in CONVERSATIONS:
        got = their_tokens.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert got == chat_prompt(tokenizer, messages)
    ids = chat_prompt(tokenizer, CONVERSATIONS[1])
    expected = list(generate(model, ids, 12, temperature=0, stop=[tokenizer.special_tokens[IM_END]]))
    out = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=12,
        do_sample=False,
    )
    new = out[0, len(ids) :].tolist()
    assert new[: len(expected)] == expected and new[len(expected) :] in (
        [],
        [tokenizer.special_tokens[IM_END]],
    )  # it stops by its own settings
    assert (
        theirs.generation_config.eos_token_id == tokenizer.special_tokens[IM_END] == their_tokens.eos_token_id
    )
    with torch.inference_mode():
        same_logits(theirs(torch.tensor([ids])).logits, model(torch.tensor([ids])), 1e-4)


def test_half_precision_stays_half(tmp_path):
    model = shake(GPT(CONFIGS["Llama with grouped queries"])).bfloat16()
    theirs = AutoModelForCausalLM.from_pretrained(save_hf_folder(tmp_path / "m", model, CHARACTERS))
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}


def test_the_card_is_one_for_the_hub_and_says_what_is_known(tmp_path):
    card = Card("Mine", {"Trained on": "plays"}, [{"measured": "loss", "value": "1.50"}], license="mit")
    text = (save_hf_folder(tmp_path / "m", made("GPT-2"), bpe(), card) / "README.md").read_text()
    read = ModelCard(text)
    assert (read.data.library_name, read.data.pipeline_tag, read.data.license) == (
        "transformers",
        "text-generation",
        "mit",
    )
    parameters = sum(p.numel() for p in made("GPT-2").parameters())
    for part in (
        "# Mine",
        "- **Trained on:** plays",
        "| loss | 1.50 |",
        f"{parameters:,}",
        "GPT2LMHeadModel",
        'from_pretrained("m")',
    ):
        assert part in text, part
    assert text.split("```text\n")[1].strip("`\n ")  # a sample, which it wrote itself


def test_an_earlier_export_is_replaced_and_anything_else_is_left_alone(tmp_path):
    folder = save_hf_folder(tmp_path / "m", made("GPT-2"), bpe())
    save_hf_folder(folder, made("Llama with grouped queries"), CHARACTERS)
    assert from_hf(folder).tokenizer.fingerprint == CHARACTERS.fingerprint
    (folder / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="holds something else \\(notes.txt\\): choose a new folder"):
        save_hf_folder(folder, made("GPT-2"), bpe())
    saved = checkpoint.save(tmp_path / "c", made("GPT-2"), bpe())
    with pytest.raises(ValueError, match="checkpoint"):
        save_hf_folder(saved, made("GPT-2"), bpe())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and checkpoint.load(
        saved
    ).tokenizer is not None


# ---- GGUF


def permuted(weight: np.ndarray, n_head: int) -> np.ndarray:
    """llama.cpp's order of the channels that RoPE turns: the two halves of each head, by turns."""
    halves = weight.reshape(n_head, 2, -1, weight.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def expected_tensors(name: str, folder: Path) -> dict[str, np.ndarray]:
    """What a GGUF file holds, from transformers' model by gguf's own table of names."""
    model, config = AutoModelForCausalLM.from_pretrained(folder), CONFIGS[name]
    arch = {"gpt2": gguf.MODEL_ARCH.GPT2, "llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}[
        model.config.model_type
    ]
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    found = {}
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_weights:
            continue
        values = tensor.numpy()
        if (
            model.config.model_type == "gpt2"
            and values.ndim == 2
            and any(part in theirs for part in ("c_attn", "c_proj", "c_fc"))
        ):
            values = values.T
        if model.config.model_type == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            values = permuted(values, config.n_head if "q_proj" in theirs else config.kv_heads)
        found[names.get_name(theirs, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(values)
    return found


@pytest.mark.parametrize("kind", gguf_export.KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_ggufs_reader_finds_every_tensor_as_ggufs_own_quantizer_rounds_it(name, kind, tmp_path):
    expected = expected_tensors(name, save_hf_folder(tmp_path / "m", made(name), tokenizer_of(name)))
    read = {
        t.name: t
        for t in GGUFReader(to_gguf(tmp_path / "m.gguf", made(name), tokenizer_of(name), kind)).tensors
    }
    assert read.keys() == expected.keys()
    for tensor, values in expected.items():
        as_kind = Kind[kind] if values.ndim == 2 and tensor != "position_embd.weight" else Kind.F32
        assert read[tensor].tensor_type == as_kind, tensor
        assert read[tensor].shape.tolist() == list(reversed(values.shape)), tensor
        assert np.array_equal(
            read[tensor].data.view(np.uint8).ravel(), quantize(values, as_kind).view(np.uint8).ravel()
        ), tensor


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_comes_back_as_our_model_and_tokenizer(name, tmp_path):
    model, tokenizer = made(name), tokenizer_of(name)
    back = from_gguf(to_gguf(tmp_path / "deep" / "m.gguf", model, tokenizer, "F32"))
    expected = with_zeros(model)
    assert back.state_dict().keys() == expected.keys() and all(
        torch.equal(t, expected[n]) for n, t in back.state_dict().items()
    )
    like = dict(
        norm_eps=model.config.norm_eps,
        bias=model.config.bias,
        mlp_hidden=None,
        zero_init=model.config.zero_init,
    )
    assert replace(back.config, **like) == model.config and back.config.norm_eps == np.float32(
        model.config.norm_eps
    )
    same_logits(back(idx()), made(name)(idx()))
    assert [back.tokenizer.encode(text) for text in TEXT.splitlines()] == [
        tokenizer.encode(text) for text in TEXT.splitlines()
    ]
    if (
        tokenizer is CHARACTERS or tokenizer.vocab_size == model.config.vocab_size
    ):  # else the rows left over are special tokens
        assert back.tokenizer.fingerprint == tokenizer.fingerprint
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.gguf"]


def test_a_text_ends_at_the_special_token_and_else_at_a_byte_that_is_in_no_text(tmp_path):
    def metadata(tokenizer):
        reader = GGUFReader(to_gguf(tmp_path / "m.gguf", made("GPT-2"), tokenizer))
        return {
            n.removeprefix("tokenizer.ggml."): f.contents()
            for n, f in reader.fields.items()
            if n.startswith("tokenizer.")
        }

    with_end, without, chat = (
        metadata(bpe()),
        metadata(bpe(special=(), size=320)),
        metadata(bpe(special=(IM_START, IM_END))),
    )
    for found, bos, eos in (
        (with_end, END_OF_TEXT, END_OF_TEXT),
        (without, "\u00ff", "\u00ff"),
        (chat, IM_START, IM_END),
    ):
        assert (found["tokens"][found["bos_token_id"]], found["tokens"][found["eos_token_id"]]) == (bos, eos)
        assert (
            found["add_bos_token"] is found["add_eos_token"] is False
            and len(found["tokens"]) == len(found["token_type"]) == 320
        )
    assert "tokenizer.chat_template" in chat and "tokenizer.chat_template" not in with_end
    assert "eos_token_id" not in metadata(CHARACTERS)


def test_numbers_that_a_kind_cannot_hold_are_refused(tmp_path):
    for value, message in (
        (7e4, "token_embd.weight has values up to 7e\\+04, and F16 can hold"),
        (float("nan"), "not finite"),
    ):
        model = GPT(CONFIGS["GPT-2"])
        model.token_embedding.weight.data[3, 5] = value
        with pytest.raises(ValueError, match=message):
            to_gguf(tmp_path / "m.gguf", model, bpe())
    assert list(tmp_path.iterdir()) == []
    assert (
        from_gguf(
            to_gguf(tmp_path / "m.gguf", shake(GPT(CONFIGS["GPT-2"])).bfloat16(), bpe(), "F32")
        ).norm.weight.dtype
        == torch.float32
    )


# ---- ONNX

ONNX_ONLY = "squared ReLU, a window, one key head"
CONFIGS_ONNX = CONFIGS | {
    ONNX_ONLY: GPTConfig.preset("mini", **SMALL, mlp="relu2", window=7, n_kv_head=1, position="learned")
}
del CONFIGS_ONNX["GPT-2 without biases, untied"]


@pytest.fixture(scope="module", params=CONFIGS_ONNX)
def onnx(request, tmp_path_factory):
    """(our model, its file)"""
    torch.manual_seed(0)
    model = (
        made(request.param) if request.param in CONFIGS else shake(GPT(CONFIGS_ONNX[request.param])).eval()
    )
    return request.param, model, to_onnx(tmp_path_factory.mktemp("onnx") / "m.onnx", model)


def test_onnx_runtime_gives_our_logits_at_any_batch_time_and_past(onnx):
    _, model, path = onnx
    assert sorted(p.name for p in path.parent.iterdir()) == ["m.onnx"]
    run = OnnxModel(path)
    assert run.config == model.config
    for batch, cuts in ((1, [1]), (1, [40]), (2, [40]), (2, [1, 1, 5, 33]), (1, [39, 1]), (3, [0, 7])):
        ids = idx(batch, sum(cuts))
        with torch.inference_mode():
            expected = model(ids)
        past, start = run.new_cache(batch), 0
        for size in filter(None, cuts):
            logits, past = run(ids[:, start : start + size].numpy(), past)
            same_logits(logits, expected[:, start : start + size], 1e-4)
            start += size
        assert past[0].shape == (batch, model.config.kv_heads, start, model.config.head_dim)


def test_onnx_runtime_writes_the_same_64_tokens_for_each_row_of_a_batch(onnx):
    name, model, path = onnx
    run = OnnxModel(path, threads=1)
    prompts = idx(2, 20).tolist()
    expected = [list(generate(model, row, NEW, temperature=0)) for row in prompts]
    assert run.generate(prompts, NEW) == expected
    assert [run.generate([row], NEW)[0] for row in prompts] == expected
    if name in CONFIGS:
        assert run.generate([prompt(name)], NEW) == [greedy(name)]


def test_inputs_and_outputs_have_the_names_that_others_use(onnx):
    _, model, path = onnx
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    flat = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [i.name for i in session.get_inputs()] == ["input_ids", *(f"past_key_values.{n}" for n in flat)]
    assert [o.name for o in session.get_outputs()] == ["logits", *(f"present.{n}" for n in flat)]
    shape = session.get_inputs()[1].shape
    assert shape[1::2] == [model.config.kv_heads, model.config.head_dim] and all(
        isinstance(size, str) for size in shape[::2]
    )


def test_weights_of_a_large_model_go_into_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    model = shake(GPT(GPTConfig(vocab_size=320, block_size=64, n_layer=1, n_head=2, n_embd=32))).eval()
    path = to_onnx(tmp_path / "m.onnx", model)
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
        and path.stat().st_size < 200_000
    )
    with torch.inference_mode():
        same_logits(OnnxModel(path)(idx().numpy(), OnnxModel(path).new_cache(2))[0], model(idx()), 1e-4)
    monkeypatch.undo()
    to_onnx(path, model)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]  # nothing is left of what was written before


def test_the_runner_says_what_is_wrong(onnx, tmp_path):
    _, model, path = onnx
    run = OnnxModel(path)
    with pytest.raises(ValueError, match="129 tokens do not fit in block_size=128"):
        run(idx(1, 129).numpy(), run.new_cache())
    with pytest.raises(ValueError, match="all of the same length"):
        run.generate([[1, 2], [3]], 4)
    assert run.generate([[1, 2]], 0) == [[]]
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-1000])
    for name in ("cut.onnx", "none.onnx"):
        with pytest.raises(ValueError, match=f"{name} is missing, cut or damaged"):
            OnnxModel(tmp_path / name)


# ---- llama.cpp

if importlib.util.find_spec("xllamacpp"):
    import xllamacpp

    def llama_cpp(path: Path) -> SimpleNamespace:
        """llama.cpp's server with the file, its keys and values in fp32 as ours are."""
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.fit_params = (
            str(path),
            128,
            1,
            False,
            False,
        )
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        server = xllamacpp.Server(params)

        def ask(what: str, **values):
            answer = requests.post(f"{server.listening_address}/{what}", json=values, timeout=60)
            answer.raise_for_status()
            return answer.json()

        def complete(ids: list[int], n: int):
            more = dict(temperature=0, samplers=["top_k"], top_k=1, repeat_penalty=1.0, cache_prompt=False)
            return ask("completion", prompt=ids, n_predict=n, return_tokens=True, n_probs=10, **more)

        return SimpleNamespace(
            complete=complete,
            tokenize=lambda text: ask("tokenize", content=text, parse_special=True)["tokens"],
        )

    @pytest.mark.parametrize("name", CONFIGS)
    def test_llama_cpp_writes_the_same_64_tokens_and_cuts_text_alike(name, tmp_path):
        run = llama_cpp(to_gguf(tmp_path / "m.gguf", made(name), tokenizer_of(name), "F32"))
        assert run.complete(prompt(name), NEW)["tokens"] == greedy(name)
        tokenizer = tokenizer_of(name)
        texts = [TEXT[:60] + "\u00e9\u20ac\\\t\r'1"] if tokenizer is CHARACTERS else DIFFICULT[1:]
        for text in texts:
            everything = {} if tokenizer is CHARACTERS else {"allowed_special": "all"}
            assert run.tokenize(text) == tokenizer.encode(text, **everything), text

    @pytest.mark.parametrize("pattern", [SMOLLM_PATTERN, DEFAULT_PATTERN], ids=["SmolLM", "default"])
    def test_llama_cpp_cuts_text_alike_by_the_other_rules(pattern, tmp_path):
        run = llama_cpp(to_gguf(tmp_path / "m.gguf", made("GPT-2"), bpe(pattern)))
        for text in DIFFICULT[1:]:
            assert run.tokenize(text) == bpe(pattern).encode(text, allowed_special="all"), text

    @pytest.mark.parametrize(("kind", "tolerance"), {"F16": 0.01, "Q8_0": 0.1, "Q4_0": 0.1}.items())
    @pytest.mark.parametrize("name", CONFIGS)
    def test_llama_cpp_reads_packed_weights_as_gguf_does(name, kind, tolerance, tmp_path):
        """Probabilities of the next token; llama.cpp also rounds what it multiplies by, so they are close and
        not equal.
        """
        path = to_gguf(tmp_path / "m.gguf", made(name), tokenizer_of(name), kind)
        with torch.inference_mode():
            expected = from_gguf(path)(torch.tensor([prompt(name)]))[0, -1].log_softmax(-1)
        best = llama_cpp(path).complete(prompt(name), 1)["completion_probabilities"][0]["top_logprobs"]
        assert len(best) == 10
        for token in best:
            assert abs(token["logprob"] - expected[token["id"]].item()) < tolerance, token


# ---- what is refused

NO_EQUIVALENT = {
    "a window": (replace(CONFIGS["Llama with grouped queries"], window=8), "a llama has no window=8"),
    "squared ReLU with RoPE": (
        replace(CONFIGS["Llama with grouped queries"], mlp="relu2"),
        "a llama has no mlp='relu2'",
    ),
    "qk_norm in a GPT-2": (replace(CONFIGS["GPT-2"], qk_norm=True), "a gpt2 has no qk_norm=True"),
    "qk_norm with biases": (
        replace(CONFIGS["Qwen3, as in week 4's modern recipe"], bias=True),
        "a qwen3 has no bias=True",
    ),
    "grouped queries in a GPT-2": (replace(CONFIGS["GPT-2"], n_kv_head=2), "a gpt2 has no n_kv_head=2"),
}
ONLY_GGUF = {
    "the exact GELU": (replace(CONFIGS["GPT-2"], mlp="gelu"), "a gpt2 has no mlp='gelu'"),
    "a Llama with biases": (
        replace(CONFIGS["Llama with grouped queries"], bias=True),
        "a llama has no bias=True",
    ),
}


@pytest.mark.parametrize("name", [*NO_EQUIVALENT, *ONLY_GGUF])
def test_what_a_format_cannot_hold_is_named_and_nothing_is_written(name, tmp_path):
    config, message = (NO_EQUIVALENT | ONLY_GGUF)[name]
    model = GPT(config)
    with pytest.raises(ValueError, match=f"no exact equivalent in GGUF: .*{message}"):
        to_gguf(tmp_path / "deep" / "m.gguf", model, bpe())
    if name in NO_EQUIVALENT:
        with pytest.raises(ValueError, match=f"no exact equivalent at Hugging Face: .*{message}"):
            save_hf_folder(tmp_path / "deep" / "m", model, bpe())
    assert list(tmp_path.iterdir()) == []


TO = {
    "hf": lambda path, model, tokenizer: save_hf_folder(path, model, tokenizer),
    "gguf": lambda path, model, tokenizer: to_gguf(path, model, tokenizer),
    "onnx": lambda path, model, tokenizer: to_onnx(path, model),
}


@pytest.mark.parametrize(
    "change",
    [lambda m: quantize_model(m, "int8"), lambda m: add_lora(m, LoRAConfig())],
    ids=["quantized", "with adapters"],
)
@pytest.mark.parametrize("format", TO)
def test_swapped_layers_are_refused(format, change, tmp_path):
    model = GPT(CONFIGS["GPT-2"])
    change(model)
    with pytest.raises(ValueError, match="merge adapters, or export it before it is quantized"):
        TO[format](tmp_path / "m", model, bpe())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "a model is exported with its tokenizer"),
        (bpe(special=(), size=330), "the tokenizer has 330 tokens and the model 320"),
        (BPETokenizer.train(TEXT, 300, r"\S+|\s+"), "for cutting text"),
        (
            BPETokenizer([(b"a", b"b")], special_tokens=["ab"]),
            "the special token 'ab' is written like an ordinary one",
        ),
    ],
    ids=["none", "too large", "a rule of its own", "a special token like a word"],
)
@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_tokenizers_that_do_not_fit_are_refused(format, tokenizer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TO[format](tmp_path / "m", made("GPT-2"), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_more_that_gguf_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="for cutting text is none of llama.cpp's"):
        to_gguf(tmp_path / "m", made("GPT-2"), bpe(GPT4_PATTERN))
    with pytest.raises(ValueError, match="kind='Q5_K' is not one of F32, F16, Q8_0, Q4_0"):
        to_gguf(tmp_path / "m", made("GPT-2"), bpe(), "Q5_K")
    narrow = GPT(GPTConfig(vocab_size=320, block_size=8, n_layer=1, n_head=2, n_embd=40))
    with pytest.raises(
        ValueError,
        match=(
            "Q8_0 packs 32 weights of a row together: token_embd.weight has rows of 40, no multiple of 32:"
            " use F16"
        ),
    ):
        to_gguf(tmp_path / "m", narrow, bpe(), "Q8_0")
    vocab = {i: bytes([i]) for i in range(128)}
    with pytest.raises(ValueError, match="llama.cpp needs a token that ends a text"):
        to_gguf(tmp_path / "m", made("GPT-2"), BPETokenizer([], vocab=vocab))
    assert list(tmp_path.iterdir()) == []
    for format in ("gguf", "onnx"):
        with pytest.raises(ValueError, match="is a folder: give the name of a file"):
            TO[format](tmp_path, made("GPT-2"), bpe())


@pytest.mark.parametrize(
    ("format", "where"),
    [
        ("hf", "shared.export.huggingface.model_card"),
        ("gguf", "shared.export.gguf.quantize"),
        ("onnx", "torch.onnx.export"),
    ],
)
def test_an_export_that_fails_leaves_what_was_there_and_nothing_else(format, where, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if format == "hf":
        save_hf_folder(tmp_path / "m", made("GPT-2"), bpe())
    else:
        (tmp_path / "m").write_bytes(b"before")
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match="No space left"):
        TO[format](tmp_path / "m", made("Llama with grouped queries"), CHARACTERS)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before and len(
        list(tmp_path.iterdir())
    ) == 1


# ---- the hub


class Hub:
    """Stands for HfApi: what is asked of it, and a repository as the hub would keep it."""

    def __init__(self, private: bool | None = None, error: Exception | None = None):
        self.private, self.error, self.files, self.asked = private, error, {}, []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.asked.append(repo_id)
        if self.error:
            raise self.error
        assert exist_ok
        self.private = private if self.private is None else self.private
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir() if p.name in allow_patterns}


def test_a_folder_is_pushed_privately_unless_told_and_without_other_files(tmp_path):
    folder = save_hf_folder(tmp_path / "m", made("GPT-2"), bpe())
    expected = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "secret.txt").write_text("mine")
    hub = Hub()
    assert push_to_hub(folder, "ada/mine", api=hub) == "https://huggingface.co/ada/mine"
    assert hub.private is True and hub.files == expected
    hub = Hub()
    push_to_hub(folder, "ada/mine", private=False, api=hub)
    assert hub.private is False


def test_what_the_hub_cannot_take_is_said(tmp_path):
    folder = save_hf_folder(tmp_path / "m", made("GPT-2"), bpe())
    hub = Hub(private=False)
    with pytest.raises(ValueError, match="ada/mine exists and is public, not private as asked"):
        push_to_hub(folder, "ada/mine", api=hub)
    assert hub.files == {}
    refusal = HfHubHTTPError("401 Client Error", response=SimpleNamespace(headers={}, request=None))
    with pytest.raises(ValueError, match="log in with `hf auth login`"):
        push_to_hub(folder, "ada/mine", api=Hub(error=refusal))
    (folder / "README.md").unlink()
    hub = Hub()
    with pytest.raises(ValueError, match="it has no README.md"):
        push_to_hub(folder, "ada/mine", api=hub)
    assert hub.asked == []


# ---- the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return checkpoint.save(
        tmp_path_factory.mktemp("c") / "best",
        made("Qwen3, as in week 4's modern recipe"),
        bpe(),
        {"val_loss": 1.2345},
    )


def run(*args: str) -> list[str]:
    said: list[str] = []
    export.main(parse_args(export.Settings, list(args)), said.append)
    return said


@pytest.mark.parametrize("format", ["hf", "gguf", "onnx"])
def test_a_checkpoint_is_exported_from_the_command_line(format, saved, tmp_path):
    out = tmp_path / "out"
    said = run(
        "--checkpoint", str(saved), "--format", format, "--kind", "F32", "--out", str(out), "--title", "Mine"
    )
    assert sorted(said) == sorted(
        f"wrote {path} ({path.stat().st_size:,} bytes)" for path in tmp_path.rglob("*") if path.is_file()
    )
    name = "Qwen3, as in week 4's modern recipe"
    if format == "onnx":
        assert OnnxModel(out).generate([prompt(name)], NEW) == [greedy(name)]
        assert Tokenizer.load(tmp_path / "out.tokenizer.json").fingerprint == bpe().fingerprint
        return
    back = {"hf": from_hf, "gguf": from_gguf}[format](out)
    assert same_tensors(back, made(name))
    if format == "hf":
        card = (out / "README.md").read_text()
        assert "# Mine" in card and "| val loss | 1.234 |" in card


def test_the_command_runs_in_a_process_of_its_own(saved, tmp_path):
    command = [
        sys.executable,
        "-m",
        "shared.export",
        "--checkpoint",
        str(saved),
        "--format",
        "gguf",
        "--kind",
        "F32",
        "--out",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "m.gguf"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.startswith("wrote m.gguf ("), done.stderr
    assert same_tensors(from_gguf(tmp_path / "m.gguf"), made("Qwen3, as in week 4's modern recipe"))
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and "is a folder" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_the_command_line_refuses_what_cannot_be(saved, tmp_path):
    with pytest.raises(ValueError, match="--push uploads a Hugging Face folder, not gguf"):
        run(
            "--checkpoint", str(saved), "--format", "gguf", "--out", str(tmp_path / "m"), "--push", "ada/mine"
        )
    with pytest.raises(ValueError, match="no checkpoint in"):
        run("--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "m"))
    assert os.listdir(tmp_path) == []


def test_a_folder_of_settings_is_json_that_others_read(saved, tmp_path):
    run("--checkpoint", str(saved), "--out", str(tmp_path / "m"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["dtype"] == "float32"
    assert (
        config["eos_token_id"]
        == json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"]
        == 309
    )
