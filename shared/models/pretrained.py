"""Week 6. Weights that others have trained, as our one GPT: Hugging Face's models and folders, both ways, and
GGUF files.

Reading is strict: every tensor is used, none is missing, every shape is checked, and what our GPT cannot
express is refused by name. Nothing here needs the library transformers; it is what the tests compare with.

    model = from_hf("gpt2")                     # a hub name, a folder, or a transformers object
    to_hf(model, "my-gpt2")                     # what transformers' from_pretrained loads
    model, tokenizer = load_smollm2()
    model = load_model("checkpoints/mine/best") # or any of these: whatever holds a GPT
    tokenizer = load_tokenizer("gpt2")          # from all of them, and from a tokenizer.json

Sources: Radford et al. (GPT-2, 2019); Touvron et al. (Llama, 2023); Allal et al. (SmolLM2, 2025).
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared import checkpoint
from shared.assets import fetch
from shared.devices import resolve_device
from shared.models.families import config_from_hf, hf_config
from shared.models.family import refuse
from shared.models.gguf_families import FACTORS, config_from_gguf, llama3_scaling
from shared.models.gguf_reader import is_gguf, read_gguf
from shared.models.gpt import GPT, GPTConfig
from shared.models.names import BY_NAME, HUB_NAME
from shared.models.tokenizer_files import TokenizerFound, read_hf_json, tokenizer_in_file, tokenizer_in_folder
from shared.models.tokenizer_gguf import tokenizer_from_gguf
from shared.models.weights import Each, StoredTensor, build_gpt, plain_tensors
from shared.network import network_failure
from shared.registry import made_by
from shared.runtime import os_error_in, write_json
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bpe import BPETokenizer, gpt2_tokenizer
from shared.tokenizers.patterns import UnlikeOurs

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
"""Where GPT-2 lies on the Hugging Face hub, and the commit."""


class _Config(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


class TransformersModel(Protocol):
    """What `from_hf` needs of a model of transformers'."""

    @property
    def config(self) -> _Config: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


def from_hf(
    source: str | Path | TransformersModel,
    say: Callable[[str], None] = print,
    *,
    dtype: torch.dtype | None = None,
    each: Each | None = None,
) -> GPT:
    """A model of Hugging Face's, of one of the families of `shared.models.families`, as our GPT: on the CPU,
    in eval mode, with its tokenizer under `tokenizer`.

    source: a model of transformers, such as a LlamaForCausalLM; a folder with config.json and
    model.safetensors (or shards with their index); or a hub name such as "gpt2". The tokenizer stays None
    where there is none, and where ours cannot be it: `say` then gets the reason, and what of it ours does not
    do. dtype: of the weights; None leaves them in fp32, bf16 or fp16, as they are stored. each: see
    `shared.models.weights.Each`. Dropout is 0. Raises ValueError for anything our GPT cannot express and for
    missing, left-over, wrong or damaged parts, naming them.
    """
    if isinstance(source, (str, Path)):
        folder = Path(source) if Path(source).is_dir() else _snapshot(str(source))
        values = read_hf_json(folder / "config.json")
        model = _from_hf(values, _open_folder(folder), str(folder), dtype, each)
        model.tokenizer = _folder_tokenizer(folder, model.config.vocab_size, say)
        return model
    if not hasattr(source, "state_dict") or not hasattr(getattr(source, "config", None), "to_dict"):
        raise ValueError(
            "from_hf takes a language model of transformers, a folder or a hub name, not a"
            f" {type(source).__name__}"
        )
    stored = {
        name: StoredTensor(tuple(tensor.shape), tensor.detach, tensor.dtype)
        for name, tensor in source.state_dict().items()
    }
    return _from_hf(source.config.to_dict(), stored, type(source).__name__, dtype, each)


def _from_hf(
    values: Mapping[str, Any],
    stored: dict[str, StoredTensor],
    where: str,
    dtype: torch.dtype | None,
    each: Each | None,
) -> GPT:
    config, layout = config_from_hf(values, where)
    if "wte.weight" in stored:  # saved without the outermost name, as GPT-2 on the hub is
        stored = {
            name if name == "lm_head.weight" else f"transformer.{name}": t for name, t in stored.items()
        }
    stored = {name: t for name, t in stored.items() if not BUFFERS.fullmatch(name)}
    if config.tie_weights and "lm_head.weight" in stored:
        head = stored.pop("lm_head.weight")
        embedding = stored.get(layout.name("token_embedding.weight"))
        if embedding and not torch.equal(head.read(), embedding.read()):
            raise ValueError(
                f"{where}: lm_head.weight is not the embedding, but tie_word_embeddings is true: set it to"
                " false in the configuration"
            )
    return build_gpt(config, layout, stored, where, dtype=dtype, each=each)


def hf_tensors(source: str | Path, download: bool = True) -> tuple[GPTConfig, dict[str, Tensor]]:
    """A Hugging Face model's configuration as ours, and its tensors as they are stored: for a loader of one's
    own. `from_hf` does both and loads.

    source: a folder, or a hub name such as "gpt2". download: whether what is not on this machine yet is
    fetched. Raises ValueError where `from_hf` does, and for what would have to be fetched and must not be.
    """
    folder = Path(source) if Path(source).is_dir() else _snapshot(str(source), download)
    config, _ = config_from_hf(read_hf_json(folder / "config.json"), str(folder))
    return config, {name: stored.read() for name, stored in _open_folder(folder).items()}


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By the names that safetensors has for them; all others are none that a model computes in."""


def _tensor_in(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _open_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors in model.safetensors, or in the shards that model.safetensors.index.json names."""
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if whole.exists():
        return _open_safetensors(whole)
    if not index.exists():
        raise ValueError(
            f"{folder} has neither model.safetensors nor {index.name}: weights are read from safetensors"
            " only, never from pickles"
        )
    return _open_shards(index)


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    shard_of = read_hf_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(map(_is_file_name, shard_of.values())):
        raise ValueError(
            f"{index} is damaged: its weight_map does not give a file of this folder for each tensor"
        )
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        tensors = _open_safetensors(index.parent / shard)
        expected = {name for name, file in shard_of.items() if file == shard}
        missing = [f"{name} is not in {shard}" for name in expected - tensors.keys()]
        left_over = [f"{name} is in {shard}" for name in tensors.keys() - expected]
        refuse(missing + left_over, str(index))
        stored |= tensors
    return stored


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, mapped into memory one at a time, each when it is read: pages of the file that
    were read count as this program's memory for as long as it is open.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: StoredTensor(
                    tuple(part.get_shape()),
                    partial(_tensor_in, path, name),
                    DTYPES.get(part.get_dtype(), torch.uint8),
                )
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing, cut or damaged ({error}): download it again") from None


def _snapshot(name: str, download: bool = True, weights: bool = True) -> Path:
    """The folder of a model on the hub, downloaded on the first call, if that is allowed.

    weights: whether they are wanted too, or only what is beside them.
    """
    hub_name, commit = HUB.get(name, (name, None))
    wanted = ["*.json", "merges.txt", "chat_template.jinja"]
    if weights:
        wanted.append("model*.safetensors")
    try:
        return Path(
            snapshot_download(hub_name, revision=commit, allow_patterns=wanted, local_files_only=not download)
        )
    except (OSError, ValueError) as error:
        if not download:
            raise ValueError(f"{name!r} is not on this machine, and must not be downloaded here") from None
        reason = network_failure(error) or " ".join(str(error).split())
        raise ValueError(
            f"{name!r} is neither a folder here nor a model that the Hugging Face hub gives ({reason}). "
            "Without a network: download the model elsewhere, and give the path of its folder"
        ) from None


def _folder_tokenizer(folder: Path, vocab_size: int, say: Callable[[str], None]) -> Tokenizer | None:
    """The folder's tokenizer as ours; None where there is none, and, with a word to `say`, where ours cannot
    be it. What of it ours does not do is said too.
    """
    try:
        tokenizer, left_out = tokenizer_in_folder(folder)
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise UnlikeOurs(f"it has {tokenizer.vocab_size} tokens, and the model {vocab_size}")
    except UnlikeOurs as reason:
        say(f"{folder}: the model comes without its tokenizer, which ours cannot be: {reason}")
        return None
    _say_left_out(left_out, str(folder), say)
    return tokenizer


def _say_left_out(left_out: list[str], where: str, say: Callable[[str], None]) -> None:
    if left_out:
        say(f"{where}: of its tokenizer are left out: {'; '.join(left_out)}")


def refuse_checkpoint(folder: Path) -> None:
    """Raises ValueError for a folder with a checkpoint of this course, whose files are named like Hugging
    Face's and would be overwritten.
    """
    if (folder / "config.json").exists() and not is_hugging_faces(folder):
        raise ValueError(
            f"{folder} holds a checkpoint of this course, which would be overwritten: choose another folder"
        )


def is_hugging_faces(folder: Path) -> bool:
    """Whether a folder's config.json is Hugging Face's rather than that of a checkpoint of this course."""
    return "model_type" in read_hf_json(folder / "config.json")


def stored_model_type(name: str | Path) -> str | None:
    """The family that Hugging Face's config.json names, of a folder or of a model of the hub that was loaded
    before; None for a checkpoint of this course. Raises ValueError for a model that is not on this machine.
    """
    folder = Path(name) if Path(name).is_dir() else _snapshot(str(name), download=False)
    return read_hf_json(folder / "config.json").get("model_type")


def to_hf(model: GPT, folder: str | Path) -> Path:
    """Writes config.json and model.safetensors for transformers' `from_pretrained`, and returns the folder.

    Tensors keep their type. A call that is killed leaves the folder without config.json. Raises ValueError,
    naming the fields in the way, for a GPT of none of the families of `shared.models.families`; and for one
    whose layers were swapped (adapters, quantization).
    """
    folder = Path(folder)
    settings, layout = hf_config(model.config)
    tensors = layout.theirs(plain_tensors(model), model.config.head_dim)
    refuse_checkpoint(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    _write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", settings)
    return folder


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that is either all there or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, temporary, metadata={"format": "pt"})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        refused = os_error_in(error)
        if refused is None:
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def from_gguf(
    path: str | Path,
    say: Callable[[str], None] = print,
    blocks: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    each: Each | None = None,
) -> GPT:
    """A model in a GGUF file, of one of the families of `shared.models.gguf_families`, as our GPT: on the
    CPU, in eval mode, its tokenizer (if it has one) under `tokenizer`.

    `say` gets what of the tokenizer ours does not do, such as a token after each text. blocks: only so many
    of the model's blocks are read, from the first. dtype: of the weights; None means fp32, whatever the file
    packs them in. each: see `shared.models.weights.Each`. Raises ValueError for another number of blocks, for
    a file that is cut, damaged or none, for another architecture or tokenizer, for settings that our GPT does
    not have, and for tensors that are missing, left over, or of a type that the library gguf cannot
    dequantize.
    """
    where = str(path)
    metadata, stored = read_gguf(path)
    vocab_size = 1  # where there is no embedding, `build_gpt` says so
    if "token_embd.weight" in stored:
        vocab_size = stored["token_embd.weight"].shape[0]
    config, layout = config_from_gguf(metadata, vocab_size, "output.weight" not in stored, where)
    if FACTORS in stored and config.position == "rope":
        config = llama3_scaling(stored.pop(FACTORS).read(), config, where)
    if blocks is not None:
        _check_blocks(blocks, config, where)
        left_out = tuple(f"blk.{block}." for block in range(blocks, config.n_layer))
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(left_out)}
        config = replace(config, n_layer=blocks)
    model = build_gpt(config, layout, stored, where, dtype=dtype or torch.float32, each=each)
    model.tokenizer, unlike_ours = tokenizer_from_gguf(metadata, vocab_size, where)
    _say_left_out(unlike_ours, where, say)
    return model


def _check_blocks(blocks: int, config: GPTConfig, where: str) -> None:
    if not 1 <= blocks <= config.n_layer:
        raise ValueError(f"blocks={blocks}: {where} has {config.n_layer}, so it must be from 1 to that")


def load_model(
    name: str | Path,
    device: torch.device | str = "auto",
    dtype: torch.dtype | None = None,
    *,
    blocks: int | None = None,
    each: Each | None = None,
) -> GPT:
    """A GPT from wherever it lies, in eval mode, with its tokenizer under `tokenizer` (None where it has none
    of ours).

    name: "smollm2" or "gemma3-270m"; the folder of a checkpoint (of a quantized model too, once
    shared.quantization is imported); a GGUF file; the folder of a Hugging Face model; or a name on the hub,
    such as "gpt2". dtype: of the weights; None leaves them as they are (fp32, bf16, fp16, or packed). blocks:
    only so many of its blocks, from the first; what it then writes makes no sense, but it takes the same
    paths, faster. each: what is done to each part as soon as it is loaded, such as
    `shared.quantization.quantizing("int4")`: then the whole model is never there in full. Raises ValueError
    for anything else, for another number of blocks, and for files that are damaged or that our GPT cannot
    express.
    """
    where = resolve_device(device)
    path = Path(name)
    folder = checkpoint.find(path)
    if name in BY_NAME:
        model = from_gguf(fetch(str(name)), blocks=blocks, dtype=dtype, each=each)
    elif path.is_file():
        model = from_gguf(path, blocks=blocks, dtype=dtype, each=each)
    elif folder is not None and is_hugging_faces(folder):
        model = from_hf(folder, dtype=dtype, each=each)
    elif folder is not None:
        model = GPT.from_checkpoint(path, "cpu")
        if each is not None:
            each(model)
    elif HUB_NAME.fullmatch(str(name)) and not path.exists():
        model = from_hf(name, dtype=dtype, each=each)
    else:
        raise ValueError(
            f"no checkpoint in {name}, nor another model: give 'smollm2', 'gemma3-270m', the folder of a"
            " checkpoint or of a Hugging Face model (with config.json in it), a GGUF file, or a name on the"
            " hub such as 'gpt2'"
            f"{made_by(name)}"
        )
    if blocks is not None and blocks != model.config.n_layer:
        _check_blocks(blocks, model.config, str(name))
        del model.blocks[blocks:]
        model.config = replace(model.config, n_layer=blocks)
    return model.to(device=where, dtype=dtype)


def load_tokenizer(name: str | Path, say: Callable[[str], None] = print) -> Tokenizer:
    """A tokenizer from wherever it lies, without the weights of its model.

    name: a tokenizer.json, Hugging Face's or ours; a folder with one (a checkpoint, an index, a Hugging Face
    model), or with vocab.json and merges.txt; a GGUF file; "smollm2" or "gemma3-270m"; or a name on the hub,
    such as "gpt2", from where only the small files are fetched. A file is read alone: the chat template of a
    Hugging Face model is in another, so give its folder. `say` gets what of it ours does not do, such as a
    token after each text. Raises ValueError, with the reason, for a tokenizer that ours cannot be, for files
    that are damaged, and for anything else.
    """
    path = Path(name)
    where = str(name)
    if name in BY_NAME:
        path = fetch(where)
    try:
        if path.is_file():
            found = _tokenizer_in_gguf(path) if is_gguf(path) else tokenizer_in_file(path)
        elif path.is_dir() or checkpoint.find(path) is not None:
            found = tokenizer_in_folder(checkpoint.find(path) or path)
        elif name in HUB:
            found = TokenizerFound(gpt2_tokenizer(), [])
        elif HUB_NAME.fullmatch(where) and not path.exists():
            found = tokenizer_in_folder(_snapshot(where, weights=False))
        else:
            found = TokenizerFound(None, [])
    except UnlikeOurs as reason:
        raise ValueError(f"{where}: ours cannot be its tokenizer: {reason}") from None
    if found.tokenizer is None:
        raise ValueError(
            f"no tokenizer in {where}: give a tokenizer.json, a folder with one, a GGUF file, 'smollm2', or a"
            f" name on the hub such as 'gpt2'{made_by(name)}"
        )
    _say_left_out(found.left_out, where, say)
    return found.tokenizer


def _tokenizer_in_gguf(path: Path) -> TokenizerFound:
    metadata, _ = read_gguf(path)
    tokens = metadata.get("tokenizer.ggml.tokens")
    return tokenizer_from_gguf(metadata, len(tokens) if isinstance(tokens, list) else 0, str(path))


def load_smollm2(blocks: int | None = None) -> tuple[GPT, BPETokenizer]:
    """SmolLM2-135M-Instruct, fetched on the first call, and its tokenizer.

    It answers what `shared.models.chat.chat_prompt` asks, and ends with `IM_END`. blocks: only so many of its
    30 blocks, from the first; what it then writes makes no sense, but it takes the same paths, faster. Raises
    ValueError for another number of blocks.
    """
    model = from_gguf(fetch("smollm2"), blocks=blocks)
    if not isinstance(model.tokenizer, BPETokenizer):
        raise ValueError("SmolLM2's file has no BPE tokenizer: fetch it again")
    return model, model.tokenizer


def load_gpt2(name: str = "gpt2") -> tuple[GPT, BPETokenizer]:
    """GPT-2 from the Hugging Face hub ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") at a fixed commit, and
    its tokenizer.

    Raises ValueError for another name, and where `from_hf` does.
    """
    if name not in HUB:
        raise ValueError(f"no GPT-2 is called {name!r}; there are: {', '.join(HUB)}")
    model = from_hf(_snapshot(name))
    tokenizer = gpt2_tokenizer()
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{name}: the model has {model.config.vocab_size} tokens, and GPT-2's tokenizer"
            f" {tokenizer.vocab_size}"
        )
    model.tokenizer = tokenizer
    return model, tokenizer
