"""Week 6. Weights that others have trained, as our one GPT: Hugging Face's models and folders, both ways, and
GGUF files.

Reading is strict: every tensor is used, none is missing, every shape is checked, and what our GPT cannot
express is refused by name. Nothing here needs the library transformers; it is what the tests compare with.

    model = from_hf("gpt2")                     # a hub name, a folder, or a transformers object
    to_hf(model, "my-gpt2")                     # what transformers' from_pretrained loads
    model, tokenizer = load_smollm2()
    ids = chat_prompt(tokenizer, [{"role": "user", "content": "Why is the sky blue?"}])
    answer = generate(model, ids, 200, temperature=0, stop=[tokenizer.special_tokens[IM_END]])

Sources: Radford et al. (GPT-2, 2019); Touvron et al. (Llama, 2023); Allal et al. (SmolLM2, 2025).
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared import checkpoint
from shared.assets import fetch
from shared.checkpoint import unshared
from shared.models.formats import (
    Layout,
    config_from_gguf,
    config_from_hf,
    hf_config,
    refuse,
    tokenizer_from_gguf,
    tokenizer_from_json,
    tokenizer_from_merges,
)
from shared.models.gpt import GPT, GPTConfig, Rotary
from shared.runtime import write_json
from shared.tokenizers import BPETokenizer, Tokenizer, gpt2_tokenizer

# ---- building


class _Stored(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _build(config: GPTConfig, layout: Layout, stored: Mapping[str, _Stored], where: str) -> GPT:
    """The GPT of `config` with the stored tensors, one of them in memory at a time besides the model itself."""
    if config.n_layer > len(stored):
        raise ValueError(f"{where}: {len(stored)} tensors are too few for {config.n_layer} layers")
    try:
        model = _shapes(config)
    except RuntimeError as error:
        raise ValueError(f"{where}: its settings are those of no model ({error})") from None
    own = unshared(model)
    expected = layout.theirs(own, config.head_dim)
    problems = [f"{n} is missing" for n in expected if n not in stored]
    problems += [f"{n} is not in such a model" for n in stored if n not in expected]
    problems += [
        f"{n} is {list(stored[n].shape)}, not {list(t.shape)}"
        for n, t in expected.items()
        if n in stored and stored[n].shape != t.shape
    ]
    refuse(problems, where)
    weights: dict[str, Tensor] = {}
    for theirs, names in layout.groups(own).items():
        try:
            tensor = stored[theirs].read()
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{where}: {theirs} cannot be read: {error}") from None
        if not tensor.is_floating_point():
            raise ValueError(
                f"{where}: {theirs} is of type {tensor.dtype}: load the model before it was quantized"
            )
        weights |= layout.ours(tensor, {n: own[n].shape for n in names}, config.head_dim)
    return _filled(model, weights)  # strict by the check above


def _filled(model: GPT, weights: dict[str, Tensor]) -> GPT:
    """`_shapes` with these tensors, one for each name; a tied weight has one name there."""
    config = model.config
    model.load_state_dict(weights, assign=True, strict=False)
    if config.tie_weights:
        model.lm_head.weight = model.token_embedding.weight
    if config.position == "rope":
        model.rotary = Rotary(config.head_dim, config.block_size, config.rope_theta)
    return model.eval()


def _shapes(config: GPTConfig) -> GPT:
    """The GPT without memory: shapes, and no random values that would be thrown away."""
    with torch.device("meta"):
        return GPT(config)


# ---- Hugging Face

BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)
"""Masks and frequencies that older files carry: worked out from the settings, not trained."""
HUB = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}
"""Where GPT-2 lies on the hub, and the commit."""


def from_hf(source: Any, say: Callable[[str], None] = print) -> GPT:
    """A GPT-2, Llama or Qwen3 of Hugging Face's as our GPT, in fp32 on the CPU, in eval mode, its tokenizer
    (if it has one) under `tokenizer`.

    source: a GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM of transformers; a folder with config.json
    and model.safetensors (or shards with their index); or a hub name such as "gpt2". The tokenizer is set
    where it is one such as ours; where it is another, `say` tells why not. Dropout is 0. Raises ValueError
    for anything our GPT cannot express and for missing, left-over, wrong or damaged parts, naming them.
    """
    if hasattr(source, "state_dict") and hasattr(getattr(source, "config", None), "to_dict"):
        stored = {name: _Stored(tuple(t.shape), t.detach) for name, t in source.state_dict().items()}
        return _from_hf(source.config.to_dict(), stored, type(source).__name__)
    if not isinstance(source, (str, Path)):
        raise ValueError(
            "from_hf takes a GPT-2, Llama or Qwen3 of transformers, a folder or a hub name, not a"
            f" {type(source).__name__}"
        )
    folder = Path(source) if Path(source).is_dir() else _snapshot(str(source))
    model = _from_hf(_read_json(folder / "config.json"), _open_folder(folder), str(folder))
    model.tokenizer = _folder_tokenizer(folder, model.config.vocab_size, say)
    return model


def _from_hf(values: dict[str, Any], stored: dict[str, _Stored], where: str) -> GPT:
    config, layout = config_from_hf(values, where)
    if "wte.weight" in stored:  # saved without the outermost name, as GPT-2 on the hub is
        stored = {
            name if name == "lm_head.weight" else f"transformer.{name}": t for name, t in stored.items()
        }
    stored = {name: t for name, t in stored.items() if not BUFFERS.fullmatch(name)}
    if config.tie_weights and "lm_head.weight" in stored:
        head, embedding = stored.pop("lm_head.weight"), stored.get(layout.name("token_embedding.weight"))
        if embedding and not torch.equal(head.read(), embedding.read()):
            raise ValueError(
                f"{where}: lm_head.weight is not the embedding, but tie_word_embeddings is true: set it to"
                " false in the configuration"
            )
    return _build(config, layout, stored, where)


def _open_folder(folder: Path) -> dict[str, _Stored]:
    """The tensors in model.safetensors, or in the shards that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return _open_safetensors(folder / "model.safetensors")
    if not index.exists():
        raise ValueError(
            f"{folder} has neither model.safetensors nor {index.name}: weights are read from safetensors"
            " only, never from pickles"
        )
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in where.values()
    ):
        raise ValueError(
            f"{index} is damaged: its weight_map does not give a file of this folder for each tensor"
        )
    stored: dict[str, _Stored] = {}
    for shard in sorted(set(where.values())):
        found = _open_safetensors(folder / shard)
        expected = {name for name, file in where.items() if file == shard}
        refuse(
            [f"{n} is not in {shard}" for n in expected - found.keys()]
            + [f"{n} is in {shard}" for n in found.keys() - expected],
            str(index),
        )
        stored |= found
    return stored


def _open_safetensors(path: Path) -> dict[str, _Stored]:
    try:
        file = safe_open(path, framework="pt")
        return {
            name: _Stored(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
            for name in file.keys()
        }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing, cut or damaged ({error}): download it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing, cut or damaged ({error}): download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object")
    return values


def _snapshot(name: str) -> Path:
    """The folder of a model on the hub, downloaded on the first call."""
    hub_name, commit = HUB.get(name, (name, None))
    try:
        return Path(
            snapshot_download(
                hub_name, revision=commit, allow_patterns=["*.json", "merges.txt", "model*.safetensors"]
            )
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name!r} is neither a folder here nor a model that the Hugging Face hub gives ({reason}). "
            "Without a network: download the model elsewhere, and give the path of its folder"
        ) from None


def _folder_tokenizer(folder: Path, vocab_size: int, say: Callable[[str], None]) -> Tokenizer | None:
    """The folder's tokenizer as ours, or None where there is none, or `say` why it cannot be ours."""
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.exists():
            found = tokenizer_from_json(_read_json(whole))
        elif vocab.exists() and merges.exists():
            found = tokenizer_from_merges(_read_json(vocab), merges.read_text(encoding="utf-8"))
        else:
            return None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{folder}: {whole.name if whole.exists() else vocab.name} is damaged ({error!r}): download it"
            " again"
        ) from None
    if isinstance(found, Tokenizer) and found.vocab_size > vocab_size:
        found = f"it has {found.vocab_size} tokens, and the model {vocab_size}"
    if isinstance(found, str):
        say(f"{folder}: the model comes without its tokenizer, which ours cannot be: {found}")
        return None
    return found


def plain_tensors(model: GPT) -> dict[str, Tensor]:
    """The tensors of a GPT by name, a tied one once. Raises ValueError for another model, and for swapped
    layers (adapters, quantization).
    """
    if not isinstance(model, GPT):
        raise ValueError(
            f"a {type(model).__name__} cannot be exported: other programs have an equivalent of our GPT only"
        )
    own = unshared(model)
    strange = {(n, t.shape) for n, t in own.items()} ^ {
        (n, t.shape) for n, t in unshared(_shapes(model.config)).items()
    }
    if strange:
        raise ValueError(
            f"this model is not the GPT of its config ({min(strange)[0]}): merge adapters, or export it"
            " before it is quantized"
        )
    return own


def with_biases(model: GPT) -> GPT:
    """The same function with biases of zero where it has none: a GPT-2 elsewhere always has some. The weights
    are shared, not copied.
    """
    own, other = plain_tensors(model), _shapes(replace(model.config, bias=True))
    zeros = {n: model.norm.weight.new_zeros(t.shape) for n, t in unshared(other).items() if n not in own}
    return _filled(other, own | zeros)


def refuse_checkpoint(folder: Path) -> None:
    """Raises ValueError for a folder with a checkpoint of this course, whose files have the names of Hugging
    Face's.
    """
    if (folder / "config.json").exists() and "model_type" not in _read_json(folder / "config.json"):
        raise ValueError(
            f"{folder} holds a checkpoint of this course, which would be overwritten: choose another folder"
        )


def to_hf(model: GPT, folder: str | Path) -> Path:
    """Writes config.json and model.safetensors for transformers' `from_pretrained`, and returns the folder.

    Tensors keep their type. Of a killed call the folder is left without config.json. Raises ValueError,
    naming the fields that stand in the way, for a GPT that is none of GPT-2, Llama and Qwen3; and for one
    whose layers were swapped (adapters, quantization).
    """
    folder, config = Path(folder), model.config
    settings, layout = hf_config(config)
    own = plain_tensors(model)
    refuse_checkpoint(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    temporary = folder / f".model.safetensors.{os.getpid()}.tmp"
    try:
        save_file(
            {n: t.contiguous() for n, t in layout.theirs(own, config.head_dim).items()},
            temporary,
            metadata={"format": "pt"},
        )
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, folder / "model.safetensors")
    except SafetensorError as error:
        raise OSError(f"{folder / 'model.safetensors'} could not be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    write_json(folder / "config.json", settings)
    return folder


# ---- GGUF


class _Reader(GGUFReader):
    """The library's reader, which takes a quarter of a million slices of its file: three times as fast on a
    plain array as on a memmap, and a slice beyond the end is an error (the library goes on with empty ones,
    for as long as a damaged length says).
    """

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> np.ndarray:
        if self.byte_order != "I":
            raise ValueError("its bytes are in the order of another kind of machine")
        end = offset + np.dtype(dtype).itemsize * int(count)
        if end > len(self._data):
            raise ValueError(f"it ends before byte {end}")
        return self._data[offset:end].view(dtype)


def from_gguf(path: str | Path) -> GPT:
    """A Llama, GPT-2 or Qwen3 in a GGUF file as our GPT, in fp32 on the CPU, in eval mode, its tokenizer (if
    it has one) under `tokenizer`.

    Raises ValueError for a file that is cut, damaged or none, for another architecture or tokenizer, for
    settings that our GPT does not have, and for tensors that are missing, left over, or of a type that the
    library gguf cannot dequantize.
    """
    try:
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise ValueError(
            f"{path} is cut, damaged or no GGUF file that the library gguf can read ({error}): download it"
            " again"
        ) from None
    where = str(path)
    stored = {
        t.name: _Stored(tuple(map(int, reversed(t.shape))), partial(_dequantized, t)) for t in reader.tensors
    }
    vocab_size = (
        stored["token_embd.weight"].shape[0] if "token_embd.weight" in stored else 1
    )  # `_build` will say that it is missing
    config, layout = config_from_gguf(metadata, vocab_size, "output.weight" not in stored, where)
    model = _build(config, layout, stored, where)
    model.tokenizer = tokenizer_from_gguf(metadata, vocab_size, where)
    return model


def _dequantized(tensor: ReaderTensor) -> Tensor:
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(
            f"{tensor.name} is of type {tensor.tensor_type.name}, which the library gguf cannot dequantize"
        ) from None
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


# ---- the models of the course

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a short poem about the sea.",
)
"""What the course asks a model that talks, to see what it says."""
ROLES = ("system", "user", "assistant")


def load_model(name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """A GPT with its tokenizer under `tokenizer` (None where it has none of ours), in eval mode.

    name: "smollm2"; the folder of a checkpoint (of a quantized model too, once shared.quantization is
    imported); a GGUF file; a Hugging Face model's folder; or a name on the hub. dtype: of its weights, None
    for what they have (fp32 but for quantized ones). Raises ValueError for anything else, and for files that
    are damaged or that our GPT cannot express.
    """
    path = Path(name)
    folder = checkpoint.find(path)
    if name == "smollm2":
        model = load_smollm2()[0]
    elif path.is_file():
        model = from_gguf(path)
    elif folder and "model_type" not in _read_json(
        folder / "config.json"
    ):  # which all of Hugging Face's have
        model = GPT.from_checkpoint(path)
    else:
        model = from_hf(name)
    return model.to(device=device, dtype=dtype)


def load_smollm2(blocks: int | None = None) -> tuple[GPT, BPETokenizer]:
    """SmolLM2-135M-Instruct, fetched on the first call, and its tokenizer. It answers what `chat_prompt`
    asks, and ends with `IM_END`.

    blocks: only so many of its 30 blocks, from the first. What it then writes makes no sense, but it takes
    the same paths, faster.
    """
    model = from_gguf(fetch("smollm2"))
    if blocks is not None:
        if not 1 <= blocks <= model.config.n_layer:
            raise ValueError(
                f"blocks={blocks}: SmolLM2 has {model.config.n_layer}, so it must be from 1 to that"
            )
        whole, model = model, GPT(replace(model.config, n_layer=blocks)).eval()
        model.load_state_dict(
            {name: weight for name, weight in whole.state_dict().items() if name in model.state_dict()}
        )
        model.tokenizer = whole.tokenizer
    return model, model.tokenizer


def load_gpt2(name: str = "gpt2") -> tuple[GPT, BPETokenizer]:
    """GPT-2 from the Hugging Face hub ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") at a fixed commit, and
    its tokenizer.
    """
    if name not in HUB:
        raise ValueError(f"no GPT-2 is called {name!r}; there are: {', '.join(HUB)}")
    model = from_hf(_snapshot(name))
    model.tokenizer = gpt2_tokenizer()
    if model.config.vocab_size != model.tokenizer.vocab_size:
        raise ValueError(
            f"{name}: the model has {model.config.vocab_size} tokens, and GPT-2's tokenizer"
            f" {model.tokenizer.vocab_size}"
        )
    return model, model.tokenizer


def is_chat(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the special tokens of SmolLM2's chat template."""
    return {IM_START, IM_END} <= getattr(tokenizer, "special_tokens", {}).keys()


def chat_prompt(tokenizer: BPETokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation in SmolLM2's chat template, up to where the assistant's answer begins.

    messages: {"role": "system" | "user" | "assistant", "content": text}, oldest first; without a system
    message at the beginning SmolLM2's own is put there. A special token's text inside a message stays plain
    text, so that no message can end itself and speak for another role. Raises ValueError for another role, no
    messages, and a tokenizer without the template's tokens.
    """
    missing = [token for token in (IM_START, IM_END) if token not in getattr(tokenizer, "special_tokens", {})]
    if missing:
        raise ValueError(f"this tokenizer has no {' and '.join(missing)}: the chat template is SmolLM2's")
    if not messages:
        raise ValueError("a conversation needs at least one message")
    start, end = tokenizer.special_tokens[IM_START], tokenizer.special_tokens[IM_END]
    if messages[0].get("role") != "system":
        messages = [{"role": "system", "content": SMOLLM_SYSTEM}, *messages]
    ids: list[int] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"a message needs a text as content and a role of {', '.join(ROLES)}, not {role!r} and"
                f" {type(content).__name__}"
            )
        ids += [start, *tokenizer.encode(f"{role}\n{content}"), end, *tokenizer.encode("\n")]
    return [*ids, start, *tokenizer.encode("assistant\n")]
