"""Week 12. The learner's model for everybody else's programs: a Hugging Face folder, a GGUF file for llama.cpp, an ONNX file.

    save_hf_folder("my-model", model, tokenizer)          # transformers' from_pretrained, vLLM, and others
    to_gguf("my-model.gguf", model, tokenizer, "Q8_0")    # llama.cpp
    to_onnx("my-model.onnx", model)                       # ONNX Runtime
    push_to_hub("my-model", "someone/my-model")           # the folder, with its card, to the Hugging Face hub

From the command line, with a checkpoint of week 4 or later, or SmolLM2:

    python -m shared.export --checkpoint checkpoints/06_gpt2/laptop/tinyshakespeare/gpt2/best --format gguf --kind Q8_0 --out my-model.gguf

Each is exact or refused: a GPT becomes a GPT-2, a Llama or a Qwen3 (a Llama with qk_norm), and where a format has no such model the fields in
the way are named and nothing is written. ONNX takes every GPT. Sources: transformers; the GGUF specification in ggml's repository; onnx.ai.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from shared import checkpoint
from shared.commandline import errors_for_people, parse_args
from shared.models.formats import GGUF_FAMILIES, exact_family, hf_config, refuse
from shared.models.gpt import GPT
from shared.models.pretrained import load_smollm2, plain_tensors, refuse_checkpoint, to_hf, with_biases
from shared.onnx_export import OnnxModel, to_onnx, weights_of
from shared.report import model_card
from shared.runtime import write_atomically, write_json
from shared.sampling import generate
from shared.token_formats import gguf_tokenizer, hf_tokenizer, hf_tokenizer_config, special_roles
from shared.tokenizers import Tokenizer

__all__ = ["Card", "OnnxModel", "push_to_hub", "save_hf_folder", "to_gguf", "to_onnx"]


def _ready(model: GPT, tokenizer: Tokenizer) -> GPT:
    """The model as other programs can have it, checked against its tokenizer."""
    plain_tensors(model)  # or refuse it
    if tokenizer is None:
        raise ValueError("a model is exported with its tokenizer, and this one has none: give the one it was trained with")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: this is not its tokenizer")
    like_gpt2 = model.config.norm == "layernorm" and model.config.position == "learned"
    return with_biases(model) if like_gpt2 and not model.config.bias else model


# ---- Hugging Face

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")


@dataclass(frozen=True)
class Card:
    """What a model's card says beside what can be read off the model itself."""

    title: str = "A small language model"
    facts: Mapping[str, str] = field(default_factory=dict)
    """A line each: what it was trained on, what it is for."""
    figures: Sequence[Mapping[str, str]] = ()
    """The rows of a table of what was measured, their keys its heading."""
    sample: str | None = None
    """Text by the model; None lets it write some."""
    license: str | None = None
    """Such as "mit", as the hub spells it; None leaves it open."""


def save_hf_folder(folder: str | Path, model: GPT, tokenizer: Tokenizer, card: Card | None = None) -> Path:
    """Writes a folder that transformers loads with `from_pretrained`, model and tokenizer, and returns it.

    In it: weights in their own type, tokenizer.json for the library `tokenizers`, settings, SmolLM2's chat template where the tokenizer has its
    tokens, and the model's card. A GPT-2 without biases is given biases of zero. An earlier export in `folder` is replaced once the new one
    is whole. Raises ValueError for a GPT or a tokenizer without an exact equivalent, and for a folder that holds something else.
    """
    folder, card = Path(folder), card or Card()
    exported = _ready(model, tokenizer)
    hf_config(exported.config)  # or refuse it
    tokens = hf_tokenizer(tokenizer)
    refuse_checkpoint(folder)
    strange = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
    if strange or folder.is_file():
        raise ValueError(f"{folder} holds something else ({', '.join(strange[:3]) or 'it is a file'}): choose a new folder")
    roles = {f"{role}_token_id": tokenizer.special_tokens[token] for role, token in special_roles(tokenizer).items()}
    with checkpoint.whole_folder(folder) as new:
        to_hf(exported, new)
        settings = json.loads((new / "config.json").read_text())
        settings |= roles | {"dtype": str(exported.norm.weight.dtype).removeprefix("torch.")}
        write_json(new / "config.json", settings)
        write_json(new / "generation_config.json", roles)
        write_json(new / "tokenizer.json", tokens)
        write_json(new / "tokenizer_config.json", hf_tokenizer_config(tokenizer, model.config.block_size))
        _write_card(new / "README.md", model, tokenizer, card, folder.name, settings["architectures"][0])
    return folder


def _write_card(path: Path, model: GPT, tokenizer: Tokenizer, card: Card, name: str, architecture: str) -> None:
    config = model.config
    facts = {
        "What": "a language model that goes on with a text. It was made to learn how such models work: do not rely on what it says",
        "Architecture": f"{architecture}, {config.n_layer} layers, {config.n_embd} wide, {config.block_size} tokens of context",
        "Parameters": f"{model.num_parameters():,}",
        "Tokenizer": f"{tokenizer.vocab_size:,} tokens",
    }
    figures = card.figures or [{"": "parameters", "value": f"{model.num_parameters():,}"}]
    start = next((i for i, token in tokenizer.vocab.items() if token == b"\n"), 0)
    usage = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")  # this folder, or its name on the hub\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'ids = tokenizer({json.dumps(tokenizer.decode([start]))}, return_tensors="pt", return_token_type_ids=False)\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))"
    )
    model_card(path, card.title, facts | dict(card.facts), figures, usage, card.sample or _sample(model, tokenizer, start))
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"} | ({"license": card.license} if card.license else {})
    front = "".join(f"{key}: {value}\n" for key, value in head.items())
    write_atomically(path, f"---\n{front}---\n\n{path.read_text(encoding='utf-8')}")


def _sample(model: GPT, tokenizer: Tokenizer, start: int) -> str:
    return tokenizer.decode([i for i in generate(model, [start], 64, temperature=0.8, seed=1) if i < tokenizer.vocab_size])


def push_to_hub(folder: str | Path, repo_id: str, private: bool = True, api: HfApi | None = None) -> str:
    """Uploads a folder of `save_hf_folder` to the Hugging Face hub as `repo_id` ("someone/my-model"), made if needed. Returns its address.

    Only the export's own files are sent. Raises ValueError for a folder that is none, for a repository that others can see where
    `private` was asked for (and the other way round), and where the hub refuses: without being logged in, for one.
    """
    folder, api = Path(folder), api or HfApi()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no folder of save_hf_folder: it has no {', '.join(missing)}")
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if api.repo_info(repo_id).private != private:
            raise ValueError(
                f"{repo_id} exists and is {'public' if private else 'private'}, not {'private' if private else 'public'} as asked: "
                "change it on the hub, or say private=" + str(not private)
            )
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="Model, tokenizer and card")
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise ValueError(f"the hub did not take {repo_id} ({' '.join(str(error).split())}): log in with `hf auth login`") from None
    return str(url)


# ---- GGUF

KINDS = ("F32", "F16", "Q8_0", "Q4_0")
_FLOAT32 = GGMLQuantizationType.F32


def to_gguf(path: str | Path, model: GPT, tokenizer: Tokenizer, kind: Literal["F32", "F16", "Q8_0", "Q4_0"] = "F16", name: str | None = None) -> Path:
    """Writes a GPT and its tokenizer as a GGUF file (architecture gpt2, llama or qwen3), and returns the path.

    kind: how matrices are stored, the embedding among them: 32 or 16 bits each, or 8 or 4 with a 16-bit scale for 32 of a row (gguf's own
    rounding). Norms, biases and positions stay in fp32. A GPT-2 without biases is given biases of zero. name: what the model is called in
    the file; None takes the file's own. Raises ValueError for a GPT or a tokenizer that llama.cpp has no equivalent of, rows that are no
    multiple of 32, and values that the kind cannot hold.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file, such as {path / 'model.gguf'}")
    model = _ready(model, tokenizer)
    config = model.config
    arch = exact_family(config, GGUF_FAMILIES, "in GGUF")
    layout = GGUF_FAMILIES[arch].layout
    metadata = gguf_tokenizer(tokenizer, config.vocab_size)
    own = plain_tensors(model)
    groups = layout.groups(own)
    rows = {theirs: (sum(own[n].shape[0] for n in names), *own[names[0]].shape[1:]) for theirs, names in groups.items()}
    chosen = GGMLQuantizationType[kind]
    types = {n: chosen if len(shape) == 2 and n != "position_embd.weight" else _FLOAT32 for n, shape in rows.items()}
    block, size = GGML_QUANT_SIZES[chosen]
    uneven = [f"{n} has rows of {rows[n][-1]}" for n, type_ in types.items() if type_ == chosen and rows[n][-1] % block]
    refuse([f"{problem}, no multiple of {block}: use F16" for problem in uneven], f"{kind} packs {block} weights of a row together")

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = GGUFWriter(temporary, arch)
    try:
        writer.add_name(name or path.stem)
        writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
        writer.add_quantization_version(2)
        _add_settings(writer, model, arch)
        for key, value in metadata.items():
            _add(writer, f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}", value)
        for theirs, shape in rows.items():
            block, size = GGML_QUANT_SIZES[types[theirs]]
            writer.add_tensor_info(theirs, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, types[theirs])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for theirs, names in groups.items():
            values = layout.theirs({n: own[n].detach().cpu().float() for n in names}, config.head_dim)[theirs].contiguous().numpy()
            writer.write_tensor_data(_packed(theirs, values, types[theirs]))
        for file in writer.fout:
            file.flush()
            os.fsync(file.fileno())
        writer.close()
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return path


def _add_settings(writer: GGUFWriter, model: GPT, arch: str) -> None:
    config = model.config
    values = {theirs: getattr(config, ours) for ours, theirs in GGUF_FAMILIES[arch].fields.items()} | {"feed_forward_length": config.hidden}
    values |= {"attention.head_count_kv": config.kv_heads, "vocab_size": config.vocab_size}
    if config.position == "rope":
        sizes = ("rope.dimension_count", "attention.key_length", "attention.value_length")
        values |= {"rope.freq_base": float(config.rope_theta)} | dict.fromkeys(sizes, config.head_dim)
    for key, value in values.items():
        _add(writer, f"{arch}.{key}", value)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A setting, in the type that llama.cpp expects of such a value."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[type(value)]
    add(key, value)


def _packed(name: str, values: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    largest = np.abs(values).max()
    if not np.isfinite(largest):
        raise ValueError(f"{name} has values that are not finite: the model is broken")
    if type_ != _FLOAT32 and largest > np.finfo(np.float16).max:
        raise ValueError(f"{name} has values up to {largest:.3g}, and {type_.name} can hold {np.finfo(np.float16).max} at most: use F32")
    return quantize(values, type_)


# ---- from the command line


@dataclass(frozen=True)
class Settings:
    """Exports a checkpoint for other programs."""

    checkpoint: str
    """A folder that training saved, or "smollm2"."""
    out: str
    """The folder (hf) or file (gguf, onnx) to write."""
    format: Literal["hf", "gguf", "onnx"] = "hf"
    kind: Literal["F32", "F16", "Q8_0", "Q4_0"] = "F16"
    """gguf: how matrices are stored."""
    title: str = "A small language model"
    """hf: the heading of the model's card."""
    license: str | None = None
    """hf: the model's licence, as the hub spells it ("mit")."""
    push: str | None = None
    """hf: also upload the folder to the hub under this name ("someone/my-model"); log in first with `hf auth login`."""
    public: bool = False
    """With push: a repository that everyone can see."""

    def __post_init__(self) -> None:
        if self.push and self.format != "hf":
            raise ValueError(f"--push uploads a Hugging Face folder, not {self.format}: use --format hf")


def main(settings: Settings, say: Callable[[str], None] = print) -> Path:
    """Loads, exports, and says what was written."""
    if settings.checkpoint == "smollm2":
        (model, tokenizer), metrics = load_smollm2(), {}
    else:
        loaded = checkpoint.load(settings.checkpoint)
        model, tokenizer, metrics = loaded.model, loaded.tokenizer, loaded.metrics
    out = Path(settings.out)
    beside = out.with_name(out.name + ".tokenizer.json")
    if settings.format == "hf":
        figures = [{"measured": name.replace("_", " "), "value": f"{value:.4g}"} for name, value in metrics.items()]
        save_hf_folder(out, model, tokenizer, Card(settings.title, figures=figures, license=settings.license))
    elif settings.format == "gguf":
        to_gguf(out, model, tokenizer, settings.kind)
    else:
        to_onnx(out, model)
        if tokenizer is not None:
            tokenizer.save(beside)
    written = {"hf": [out / name for name in FILES], "gguf": [out], "onnx": [out, weights_of(out), beside]}[settings.format]
    for path in filter(Path.exists, written):
        say(f"wrote {path} ({path.stat().st_size:,} bytes)")
    if settings.push:
        say(f"uploaded to {push_to_hub(out, settings.push, private=not settings.public)}")
    return out


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
