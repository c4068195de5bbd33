"""Week 12. A GPT as a GGUF file for llama.cpp. Source: the GGUF specification in ggml's repository."""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from shared.export.huggingface import ready_to_export
from shared.export.tokenizers import gguf_tokenizer
from shared.models.families import GGUF_FAMILIES, exact_family, refuse
from shared.models.gpt import GPT
from shared.models.weights import plain_tensors
from shared.tokenizers import Tokenizer

# ---- GGUF

KINDS = ("F32", "F16", "Q8_0", "Q4_0")
_FLOAT32 = GGMLQuantizationType.F32


def to_gguf(
    path: str | Path,
    model: GPT,
    tokenizer: Tokenizer,
    kind: Literal["F32", "F16", "Q8_0", "Q4_0"] = "F16",
    name: str | None = None,
) -> Path:
    """Writes a GPT and its tokenizer as a GGUF file (architecture gpt2, llama or qwen3), and returns the
    path.

    kind: how matrices are stored, the embedding among them: 32 or 16 bits each, or 8 or 4 with a 16-bit scale
    for 32 of a row (gguf's own rounding). Norms, biases and positions stay in fp32. A GPT-2 without biases is
    given biases of zero. name: what the model is called in the file; None takes the file's own. Raises
    ValueError for a GPT or a tokenizer that llama.cpp has no equivalent of, rows that are no multiple of 32,
    and values that the kind cannot hold.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file, such as {path / 'model.gguf'}")
    model = ready_to_export(model, tokenizer)
    config = model.config
    arch = exact_family(config, GGUF_FAMILIES, "in GGUF")
    layout = GGUF_FAMILIES[arch].layout
    metadata = gguf_tokenizer(tokenizer, config.vocab_size)
    own = plain_tensors(model)
    groups = layout.groups(own)
    rows = {
        theirs: (sum(own[n].shape[0] for n in names), *own[names[0]].shape[1:])
        for theirs, names in groups.items()
    }
    chosen = GGMLQuantizationType[kind]
    types = {
        n: chosen if len(shape) == 2 and n != "position_embd.weight" else _FLOAT32
        for n, shape in rows.items()
    }
    block, size = GGML_QUANT_SIZES[chosen]
    uneven = [
        f"{n} has rows of {rows[n][-1]}"
        for n, type_ in types.items()
        if type_ == chosen and rows[n][-1] % block
    ]
    refuse(
        [f"{problem}, no multiple of {block}: use F16" for problem in uneven],
        f"{kind} packs {block} weights of a row together",
    )

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
            writer.add_tensor_info(
                theirs, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, types[theirs]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for theirs, names in groups.items():
            values = (
                layout.theirs({n: own[n].detach().cpu().float() for n in names}, config.head_dim)[theirs]
                .contiguous()
                .numpy()
            )
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
    values = {theirs: getattr(config, ours) for ours, theirs in GGUF_FAMILIES[arch].fields.items()} | {
        "feed_forward_length": config.hidden
    }
    values |= {"attention.head_count_kv": config.kv_heads, "vocab_size": config.vocab_size}
    if config.position == "rope":
        sizes = ("rope.dimension_count", "attention.key_length", "attention.value_length")
        values |= {"rope.freq_base": float(config.rope_theta)} | dict.fromkeys(sizes, config.head_dim)
    for key, value in values.items():
        _add(writer, f"{arch}.{key}", value)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A setting, in the type that llama.cpp expects of such a value."""
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }[type(value)]
    add(key, value)


def _packed(name: str, values: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    largest = np.abs(values).max()
    if not np.isfinite(largest):
        raise ValueError(f"{name} has values that are not finite: the model is broken")
    if type_ != _FLOAT32 and largest > np.finfo(np.float16).max:
        raise ValueError(
            f"{name} has values up to {largest:.3g}, and {type_.name} can hold {np.finfo(np.float16).max} at"
            " most: use F32"
        )
    return quantize(values, type_)
