"""shared/export/huggingface.py: transformers loads the folder, and it comes back as ours."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared import checkpoint
from shared.export import huggingface, save_hf_folder, to_gguf
from shared.export.huggingface import Card
from shared.models.chat import IM_END, chat_prompt
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import from_gguf, from_hf, load_smollm2
from shared.models.tokenizer_gguf import DEFAULT_PATTERN
from shared.sampling import generate
from shared.tokenizers import gpt2_tokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from shared.tokenizers.patterns import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    SMOLLM_PATTERN,
)
from tests.expectations.make_smollm2 import CONVERSATIONS
from tests.export.helpers import (
    CHARACTERS,
    CONFIGS,
    NEW,
    TEXT,
    bpe,
    greedy,
    idx,
    made,
    prompt,
    same_logits,
    tokenizer_of,
    with_zeros,
)
from tests.helpers import fuzz, shake

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
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
    "Llama 3": LLAMA3_PATTERN,
    "Qwen": QWEN2_PATTERN,
}


# ---- Hugging Face


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), list(zip(CONFIGS, ARCHITECTURES)))
def test_transformers_loads_the_folder_and_writes_the_same_64_tokens(name, architecture, tmp_path):
    folder = save_hf_folder(made(name), tmp_path / "deep" / "m", tokenizer_of(name))
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
    back = from_hf(save_hf_folder(made(name), tmp_path / "m", tokenizer_of(name)))
    expected = with_zeros(made(name))
    assert back.state_dict().keys() == expected.keys() and all(
        torch.equal(t, expected[n]) for n, t in back.state_dict().items()
    )
    assert back.tokenizer.fingerprint == tokenizer_of(name).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_autotokenizer_gives_our_ids_and_our_text(pattern, tmp_path):
    ours = bpe(pattern)
    folder = save_hf_folder(made("GPT-2"), tmp_path / "m", ours)
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
    folder = save_hf_folder(made("GPT-2"), tmp_path / "m", CHARACTERS)
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


@pytest.mark.slow
def test_gpt2s_vocabulary_goes_along(tmp_path):
    ours = gpt2_tokenizer()
    model = GPT(
        GPTConfig(vocab_size=50304, block_size=16, n_layer=1, n_head=1, n_embd=2)
    )  # more rows than tokens, as is usual for speed
    theirs = AutoTokenizer.from_pretrained(save_hf_folder(model, tmp_path / "m", ours))
    for text in DIFFICULT:
        assert theirs(text)["input_ids"] == ours.encode(text, allowed_special="all"), text
    assert from_gguf(to_gguf(model, tmp_path / "m.gguf", ours)).tokenizer.encode(TEXT[:500]) == ours.encode(
        TEXT[:500]
    )


@pytest.mark.parametrize("tokenizer", [CHARACTERS, bpe()], ids=["characters", "BPE"])
def test_the_tokenizers_file_names_the_models_inputs(tmp_path, tokenizer):
    """Where it does not, transformers 4 gives the model `token_type_ids` too."""
    folder = save_hf_folder(made("GPT-2"), tmp_path / "m", tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.slow
def test_smollm2_with_its_chat_template(tmp_path):
    model, tokenizer = load_smollm2()
    folder = save_hf_folder(model, tmp_path / "m", tokenizer, Card(sample="Hello."))
    theirs, their_tokens = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    for messages in CONVERSATIONS:
        got = their_tokens.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert got == chat_prompt(tokenizer, messages)
        in_parts = [
            {
                "role": m["role"],
                "content": [{"type": "text", "text": part} for part in m["content"].split("n")],
            }
            for m in messages
        ]
        got = their_tokens.apply_chat_template(in_parts, add_generation_prompt=True, return_dict=False)
        joined = [{"role": m["role"], "content": m["content"].replace("n", "")} for m in messages]
        assert got == chat_prompt(tokenizer, joined)
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
    theirs = AutoModelForCausalLM.from_pretrained(save_hf_folder(model, tmp_path / "m", CHARACTERS))
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}


def test_the_card_is_one_for_the_hub_and_says_what_is_known(tmp_path):
    card = Card("Mine", {"Trained on": "plays"}, [{"measured": "loss", "value": "1.50"}], license="mit")
    text = (save_hf_folder(made("GPT-2"), tmp_path / "m", bpe(), card) / "README.md").read_text()
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
    folder = save_hf_folder(made("GPT-2"), tmp_path / "m", bpe())
    save_hf_folder(made("Llama with grouped queries"), folder, CHARACTERS)
    assert from_hf(folder).tokenizer.fingerprint == CHARACTERS.fingerprint
    (folder / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="holds something else \\(notes.txt\\): choose a new folder"):
        save_hf_folder(made("GPT-2"), folder, bpe())
    saved = checkpoint.save(made("GPT-2"), tmp_path / "c", bpe())
    with pytest.raises(ValueError, match="checkpoint"):
        save_hf_folder(made("GPT-2"), saved, bpe())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and checkpoint.load(
        saved
    ).tokenizer is not None


# ---- ONNX


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
        run = llama_cpp(to_gguf(made(name), tmp_path / "m.gguf", tokenizer_of(name), "F32"))
        assert run.complete(prompt(name), NEW)["tokens"] == greedy(name)
        tokenizer = tokenizer_of(name)
        texts = [TEXT[:60] + "\u00e9\u20ac\\\t\r'1"] if tokenizer is CHARACTERS else DIFFICULT[1:]
        for text in texts:
            everything = {} if tokenizer is CHARACTERS else {"allowed_special": "all"}
            assert run.tokenize(text) == tokenizer.encode(text, **everything), text

    @pytest.mark.parametrize(
        "pattern",
        [SMOLLM_PATTERN, DEFAULT_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN],
        ids=["SmolLM", "default", "Llama 3", "Qwen"],
    )
    def test_llama_cpp_cuts_text_alike_by_the_other_rules(pattern, tmp_path):
        run = llama_cpp(to_gguf(made("GPT-2"), tmp_path / "m.gguf", bpe(pattern)))
        for text in DIFFICULT[1:]:
            assert run.tokenize(text) == bpe(pattern).encode(text, allowed_special="all"), text

    @pytest.mark.parametrize(("kind", "tolerance"), {"F16": 0.01, "Q8_0": 0.1, "Q4_0": 0.1}.items())
    @pytest.mark.parametrize("name", CONFIGS)
    def test_llama_cpp_reads_packed_weights_as_gguf_does(name, kind, tolerance, tmp_path):
        """Probabilities of the next token; llama.cpp also rounds what it multiplies by, so they are close and
        not equal.
        """
        path = to_gguf(made(name), tmp_path / "m.gguf", tokenizer_of(name), kind)
        with torch.inference_mode():
            expected = from_gguf(path)(torch.tensor([prompt(name)]))[0, -1].log_softmax(-1)
        best = llama_cpp(path).complete(prompt(name), 1)["completion_probabilities"][0]["top_logprobs"]
        assert len(best) == 10
        for token in best:
            assert abs(token["logprob"] - expected[token["id"]].item()) < tolerance, token
