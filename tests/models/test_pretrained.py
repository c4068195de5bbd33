"""shared/models/pretrained.py, families.py, formats.py and weights.py against transformers: logits, text,
folders, and what is wrong with them.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from shared import checkpoint
from shared.models import pretrained
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import from_hf, hf_tensors, load_gpt2, to_hf
from shared.sampling import generate
from shared.tokenizers import gpt2_tokenizer
from tests.helpers import shake
from tests.models.helpers import (
    BLOCK,
    GPT2,
    OURS,
    QWEN3,
    THEIRS,
    TIME,
    build,
    edit,
    ids,
    same_logits,
    same_tensors,
    without,
)


@pytest.mark.parametrize("name", THEIRS)
def test_a_transformers_model_becomes_ours_and_goes_back_bit_for_bit(name, tmp_path):
    theirs = build(name)
    ours = from_hf(theirs)
    assert not ours.training and ours.tokenizer is None and ours.config.dropout == 0
    assert all(p.device.type == "cpu" and p.requires_grad and p.is_contiguous() for p in ours.parameters())
    assert (ours.lm_head.weight is ours.token_embedding.weight) == theirs.config.tie_word_embeddings
    same_logits(ours, theirs)
    back = AutoModelForCausalLM.from_pretrained(to_hf(ours, tmp_path / "m"))
    assert type(back) is type(theirs) and same_tensors(back, theirs)


@pytest.mark.parametrize("name", ["GPT-2", "Llama with grouped queries, tied"])
def test_greedy_text_is_transformers(name):
    theirs = build(name)
    every = torch.ones(1, TIME, dtype=torch.int64)  # without a mask, transformers takes token 0 for padding
    greedy = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = theirs.generate(ids()[:1], attention_mask=every, **greedy)[0, TIME:].tolist()
    assert list(generate(from_hf(theirs), ids()[0].tolist(), 20, temperature=0)) == expected


def test_our_model_shares_no_memory_with_theirs():
    theirs = build("Llama")
    ours = from_hf(theirs)
    before = ours(ids())
    shake(theirs, seed=5)
    assert torch.equal(ours(ids()), before)


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_that_transformers_wrote_is_read(name, shards, tmp_path):
    theirs = build(name)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "1GB")
    files = [path.name for path in tmp_path.glob("*.safetensors")]
    assert len(files) > 3 if shards else files == ["model.safetensors"]
    ours = from_hf(str(tmp_path))
    assert same_tensors(ours, from_hf(theirs)) and ours.config == from_hf(theirs).config


@pytest.mark.parametrize("name", OURS)
def test_a_model_of_ours_becomes_transformers_and_comes_back_bit_for_bit(name, tmp_path):
    torch.manual_seed(0)
    ours = shake(GPT(OURS[name]))
    folder = to_hf(ours, tmp_path / "deep" / "m")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    same_logits(ours, AutoModelForCausalLM.from_pretrained(folder))
    back = from_hf(folder)
    assert same_tensors(back, ours)
    assert replace(back.config, mlp_hidden=back.config.hidden) == replace(
        OURS[name], mlp_hidden=OURS[name].hidden, dropout=0.0, zero_init=False
    )


def test_half_precision_goes_out_and_comes_in_as_it_is(tmp_path):
    ours = shake(GPT(OURS["Llama"])).bfloat16()
    to_hf(ours, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    back = from_hf(tmp_path)
    assert same_tensors(back, ours) and {p.dtype for p in back.parameters()} == {torch.bfloat16}


def test_gpt2_as_the_hub_has_it_is_read(tmp_path):
    """Without the outermost name, without the head, and with the masks as buffers."""
    theirs = build("GPT-2")
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in saved.items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, BLOCK, BLOCK).tril() for i in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    edit(tmp_path, tie_word_embeddings="absent", n_inner="absent", n_ctx=BLOCK)
    same_logits(from_hf(tmp_path), theirs)


def test_a_llama_folder_of_older_days_is_read(tmp_path):
    theirs = build("Llama")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    later = "rope_parameters head_dim num_key_value_heads attention_bias mlp_bias tie_word_embeddings".split()
    edit(tmp_path, **dict.fromkeys(later, "absent"), rope_theta=500.0, rope_scaling=None)
    same_logits(from_hf(tmp_path), theirs)


def test_a_compiled_model_is_written_like_the_model_in_it(tmp_path):
    model = shake(GPT(OURS["GPT-2"]))
    assert same_tensors(from_hf(to_hf(torch.compile(model), tmp_path)), model)


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    "rotary",
    [
        dict(rope_parameters=PLAIN_ROPE, rope_theta=9e3),
        dict(rope_parameters={"rope_type": "default"}, rope_theta=9e3),
        dict(rope_parameters=PLAIN_ROPE, rope_scaling={}),
        dict(rope_parameters=PLAIN_ROPE, rope_scaling={"type": "default"}),
        dict(rope_parameters={"rope_type": "linear", "factor": 2.0}, rope_scaling={"rope_type": "default"}),
        dict(rope_parameters="absent", rope_scaling={"rope_type": "default", "rope_theta": 3e3}),
        dict(rope_parameters="absent", rope_scaling=None, rope_theta="absent"),
    ],
)
def test_rotary_settings_in_either_place_are_read_as_transformers_reads_them(tmp_path, rotary):
    build("Llama").save_pretrained(tmp_path)
    edit(tmp_path, **rotary)
    same_logits(from_hf(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path))


def test_a_stored_head_must_be_the_embedding_where_the_two_are_tied(tmp_path):
    theirs = build("GPT-2")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["transformer.wte.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    same_logits(from_hf(tmp_path), theirs)
    save_file(tensors | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    message = "lm_head.weight is not the embedding, but tie_word_embeddings is true"
    with pytest.raises(ValueError, match=message):
        from_hf(tmp_path)


# ---- what cannot be expressed


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(qk_norm=True), ["qk_norm=True"]),
        (dict(window=8), ["window=8"]),
        (dict(bias=False), ["a gpt2 has no bias=False"]),
        (dict(n_kv_head=2), ["a gpt2 has no n_kv_head=2"]),
        (
            dict(norm="rmsnorm"),
            ["a gpt2 has no norm='rmsnorm'", "a llama has no position='learned', mlp='gelu_tanh'"],
        ),
        (dict(position="rope"), ["a gpt2 has no position='rope'"]),
        (dict(mlp="swiglu"), ["a gpt2 has no mlp='swiglu'"]),
        (dict(norm="rmsnorm", position="rope", mlp="relu2"), ["a llama has no mlp='relu2'"]),
    ],
)
def test_a_gpt_without_an_equivalent_is_refused_with_the_fields_in_the_way(changes, named, tmp_path):
    with pytest.raises(ValueError) as error:
        to_hf(GPT(replace(OURS["GPT-2"], **changes)), tmp_path / "m")
    assert all(part in str(error.value) for part in named), error.value
    assert not (tmp_path / "m").exists()


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [2.0]}
NOT_WHOLE = {"type": "linear"}
DEEPSEEK_YARN = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
NOT_AN_ACTIVATION = "activation_function='silu' is not one of gelu_pytorch_tanh, gelu_new, gelu, relu2"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama", dict(model_type="mixtral"), "model_type='mixtral' is not one of gpt2, llama"),
        ("Llama", dict(model_type="gemma3", text_config={}), "with more than text (text_config)"),
        ("Llama", dict(num_local_experts=8), "num_local_experts=8: a mixture of experts"),
        ("Llama", dict(model_type="absent"), "model_type=None"),
        ("Llama", dict(rope_parameters=LONG_ROPE), "RoPE scaling 'longrope'"),
        ("Llama", dict(rope_parameters="absent", rope_scaling=NOT_WHOLE), "(in rope_scaling) is not whole"),
        ("Llama", dict(rope_scaling=DEEPSEEK_YARN), "cannot express mscale in rope_scaling"),
        ("Llama", dict(rope_parameters={"full_attention": NOT_WHOLE}), "full_attention in rope_parameters"),
        ("Llama", dict(rope_parameters=PARTIAL_ROPE), "partial_rotary_factor=0.5"),
        ("Llama", dict(rope_parameters=[1]), "rope_parameters"),
        ("Llama", dict(attention_bias=True), "attention_bias=True with mlp_bias=False"),
        ("Llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
        ("Llama", dict(head_dim=32), "self_attn.q_proj.weight is [64, 64], not [128, 64]"),
        ("Llama", dict(head_dim="wide"), "head_size='wide' is of the wrong kind"),
        (QWEN3, dict(head_dim="absent"), "self_attn.q_norm.weight is [16], not [128]"),
        (QWEN3, dict(layer_types=["full_attention"]), "for each of 2 layers"),
        (QWEN3, dict(layer_types=["linear_attention"] * 2), "layer_types=['linear_attention', "),
        (QWEN3, dict(attention_bias=True), "attention_bias=True"),
        ("Llama", dict(num_hidden_layers="2"), "n_layer='2' is of the wrong kind"),
        ("Llama", dict(num_hidden_layers=2.5), "n_layer=2.5 is of the wrong kind"),
        ("Llama", dict(num_attention_heads=0), "n_head=0"),
        ("Llama", dict(num_hidden_layers=10**9), "21 tensors are too few for 1000000000 layers"),
        ("Llama", dict(intermediate_size=2**62), "its settings are those of no model"),
        ("Llama", dict(rms_norm_eps=None), "norm_eps=None"),
        ("Llama", dict(tie_word_embeddings="yes"), "tie_weights='yes'"),
        ("Llama", dict(intermediate_size="absent"), "intermediate_size is missing"),
        ("GPT-2", dict(activation_function="silu"), NOT_AN_ACTIVATION),
        ("GPT-2", dict(scale_attn_weights=False), "scale_attn_weights=False"),
        ("GPT-2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        ("GPT-2", dict(add_cross_attention=True), "add_cross_attention=True"),
    ],
)
def test_settings_that_our_gpt_does_not_have_are_named(name, changes, message, tmp_path):
    build(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        from_hf(edit(tmp_path, **changes))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_other_kinds_of_models_are_refused():
    classifier = transformers.GPT2ForSequenceClassification(GPT2Config(**GPT2, pad_token_id=0))
    with pytest.raises(ValueError, match="score.weight is not in such a model"):
        from_hf(classifier)
    with pytest.raises(ValueError, match="not a GPT"):
        from_hf(GPT(OURS["GPT-2"]))


# ---- damaged folders


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Llama as transformers writes it."""
    build("Llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("keep", [0, 4, 0.3, 0.99])
def test_a_cut_file_is_named(folder, name, keep):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ValueError, match=f"{name} is missing, cut or damaged"):
        from_hf(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: without(t, "lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t | {"model.extra": torch.ones(2)}, "model.extra is not in such a model"),
        (
            lambda t: t | {"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)},
            "layers.2.mlp.up_proj.weight is not in such a model",
        ),
        (lambda t: t | {"model.norm.weight": torch.ones(63)}, r"model.norm.weight is \[63\], not \[64\]"),
        (
            lambda t: t | {"model.norm.weight": torch.ones(64, dtype=torch.int8)},
            "model.norm.weight is of type torch.int8",
        ),
        (lambda t: {n: torch.ones(3) for n in t}, r"\(and \d+ more\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        from_hf(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f, shards, index: shards[1].unlink(), "is missing, cut or damaged"),
        (
            lambda f, shards, index: shards[1].write_bytes(shards[1].read_bytes()[:-9]),
            "is missing, cut or damaged",
        ),
        (lambda f, shards, index: shutil.copy(shards[0], shards[1]), "is not in model-00002"),
        (
            lambda f, shards, index: index["weight_map"].pop("model.norm.weight"),
            "model.norm.weight is in model-",
        ),
        (
            lambda f, shards, index: index["weight_map"].update({"model.norm.weight": "../x.safetensors"}),
            "does not give a file of this folder",
        ),
        (lambda f, shards, index: index.update(weight_map=["x"]), "does not give a file of this folder"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, message):
    build("Llama").save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    damage(tmp_path, sorted(tmp_path.glob("*.safetensors")), index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        from_hf(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_nested_too_deeply_is_named(folder, name):
    (folder / name).write_text('{"a":' * 10**5)
    with pytest.raises(ValueError, match=f"{name} is missing, cut or damaged .it is nested too deeply"):
        from_hf(folder)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", QWEN3])
def test_settings_that_a_config_leaves_out_are_transformers_defaults(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    absent = (
        "activation_function",
        "hidden_act",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "n_inner",
    )
    edit(tmp_path, **dict.fromkeys(absent, "absent"))
    same_logits(from_hf(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_a_folder_without_safetensors_is_refused_and_no_pickle_is_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="read from safetensors only, never from pickles"):
        from_hf(folder)


def test_a_checkpoint_of_the_course_is_told_from_a_hugging_face_folder_both_ways(tmp_path):
    ours = GPT(OURS["GPT-2"])
    checkpoint.save(ours, tmp_path / "c")
    with pytest.raises(ValueError, match="load it with GPT.from_checkpoint"):
        from_hf(tmp_path / "c")
    with pytest.raises(ValueError, match="would be overwritten"):
        to_hf(ours, tmp_path / "c")
    assert same_tensors(GPT.from_checkpoint(tmp_path / "c"), ours)


def test_a_write_that_fails_leaves_no_model_and_no_temporary_file(tmp_path, monkeypatch):
    ours = GPT(OURS["GPT-2"])
    to_hf(ours, tmp_path)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise pretrained.SafetensorError("Error: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        to_hf(ours, tmp_path)
    assert error.value.errno == 28
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="config.json is missing"):
        from_hf(tmp_path)


def test_writing_again_replaces_the_model_and_leaves_other_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    first, second = shake(GPT(OURS["GPT-2"])), shake(GPT(OURS["Llama"]))
    to_hf(first, tmp_path)
    to_hf(second, tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "kept")
    assert same_tensors(from_hf(tmp_path), second)


def test_a_model_with_swapped_layers_is_refused(tmp_path):
    model = GPT(OURS["GPT-2"])
    model.blocks[0].attn.q_proj = torch.nn.Sequential(model.blocks[0].attn.q_proj)
    with pytest.raises(ValueError, match=r"not the GPT of its config \(blocks.0.attn.q_proj.*merge adapters"):
        to_hf(model, tmp_path)


# ---- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one GPT-2, of GPT-2's vocabulary but tiny; and what it was asked for."""
    torch.manual_seed(0)
    shake(
        GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=16, n_layer=1, n_head=2, n_embd=8))
    ).save_pretrained(tmp_path)
    asked = []

    def download(name, revision, allow_patterns, local_files_only):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    return asked


@pytest.mark.slow
def test_gpt2_comes_from_the_hub_at_a_fixed_commit_with_its_tokenizer(hub):
    model, tokenizer = load_gpt2("gpt2-medium")
    ((name, commit),) = hub
    assert name == "openai-community/gpt2-medium" and len(commit) == 40
    assert model.tokenizer is tokenizer and tokenizer.fingerprint == gpt2_tokenizer().fingerprint
    new = list(generate(model, tokenizer.encode("Hello"), 3, temperature=0))
    assert model.generate("Hello", 3, temperature=0) == tokenizer.decode(new)
    assert same_tensors(from_hf("gpt2-medium"), model)
    from_hf("someone/gpt2-tuned")
    assert hub[1:] == [(name, commit), ("someone/gpt2-tuned", None)]


@pytest.mark.slow
def test_another_name_or_vocabulary_is_refused(hub, tmp_path):
    with pytest.raises(
        ValueError, match="no GPT-2 is called 'gpt3'; there are: gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    ):
        load_gpt2("gpt3")
    build("GPT-2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model has 96 tokens, and GPT-2's tokenizer 50257"):
        load_gpt2()


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("no\nconnection"), ConnectionError("offline mode"), ValueError("not a repo id")],
)
def test_without_a_network_the_message_says_what_to_do(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(pretrained, "snapshot_download", fail)
    with pytest.raises(
        ValueError,
        match=(
            "neither a folder here nor a model that the Hugging Face hub gives .*Without a network: download"
        ),
    ) as raised:
        from_hf("gpt2")
    assert "\n" not in str(raised.value)


def test_the_tensors_of_a_folder_come_as_they_are_stored(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=30, block_size=8, n_layer=1, n_head=2, n_embd=8))
    config, tensors = hf_tensors(to_hf(model, tmp_path / "tiny"))
    assert config == model.config
    c_attn = tensors["transformer.h.0.attn.c_attn.weight"]
    assert c_attn.shape == (8, 24)  # a Conv1D's
    assert torch.equal(c_attn[:, :8].T, model.blocks[0].attn.q_proj.weight)
    with pytest.raises(ValueError, match="'someone/never-made' is not on this machine, and must not be"):
        hf_tensors("someone/never-made", download=False)
