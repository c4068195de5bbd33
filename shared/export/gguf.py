"""Week 12. A GPT as a GGUF file for llama.cpp, its weights in 32, 16, 8 or 4 bits.

    to_gguf(model, "my-model.gguf", kind="Q8_0")

A GPT becomes one of llama.cpp's architectures in `shared.models.gguf_families`. Where none of them is exactly
the same model, the export is refused: the error names the fields in the way, and nothing is written. A
quantized GPT keeps its codes. Source: the GGUF specification in ggml's repository.
"""

import math
import os
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor

from shared.export.packed import gguf_blocks, gguf_type, packed_weights
from shared.export.preparation import ready_to_export
from shared.models.config import GPTConfig
from shared.models.family import refuse
from shared.models.formats import Layout
from shared.models.gguf_families import FACTORS, gguf_settings, llama3_factors
from shared.models.gpt import GPT
from shared.models.tokenizer_writing import gguf_tokenizer
from shared.models.weights import plain_tensors
from shared.quantization.modules import dequantize
from shared.quantization.packing import PackedWeight
from shared.tokenizers import Tokenizer

KINDS = ("F32", "F16", "Q8_0", "Q4_0")
"""How matrices can be stored, by GGUF's names."""
_FLOAT32 = GGMLQuantizationType.F32


class _TensorInfo(NamedTuple):
    """A tensor as the file will hold it."""

    parameters: list[str]
    """Our parameters that it consists of, one after the other."""
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    packed: Mapping[str, PackedWeight]
    """Those of the parameters that are quantized already: all, or none."""

    @property
    def num_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes


def to_gguf(
    model: GPT,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    kind: Literal["F32", "F16", "Q8_0", "Q4_0"] = "F16",
    name: str | None = None,
) -> Path:
    """Writes a GPT and its tokenizer as a GGUF file, and returns the path.

    kind: how matrices are stored, the embedding among them: 32 or 16 bits each, or 8 or 4 with a 16-bit scale
    for 32 of a row (gguf's own rounding). What is quantized already, by int8 or int4 (GPTQ too), keeps its
    codes, as Q8_0 or Q4_1. Norms, biases and positions stay in fp32. A GPT-2 without biases is given biases
    of zero. name: what the model is called in the file; None takes the file's own. Raises ValueError for a
    GPT or a tokenizer that llama.cpp has no equivalent of, rows that are no multiple of 32, weights in NF4,
    and values that the kind cannot hold.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file, such as {path / 'model.gguf'}")
    packed = packed_weights(model)
    model, tokenizer = ready_to_export(dequantize(deepcopy(model)) if packed else model, tokenizer)
    config = model.config
    architecture, settings, layout = gguf_settings(config)
    tokenizer_metadata = gguf_tokenizer(tokenizer, config.vocab_size)
    parameters = plain_tensors(model)
    tensors = _tensor_infos(parameters, layout, kind, packed)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = GGUFWriter(temporary, architecture)
    try:
        _add_general(writer, name or path.stem, kind)
        for key, value in settings.items():
            _add(writer, key, value)
        _add_tokenizer(writer, tokenizer_metadata)
        _write_tensors(writer, tensors, parameters, config, layout)
        for file in writer.fout or ():
            file.flush()
            os.fsync(file.fileno())
        writer.close()
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return path


def _write_tensors(
    writer: GGUFWriter,
    tensors: Mapping[str, _TensorInfo],
    parameters: Mapping[str, Tensor],
    config: GPTConfig,
    layout: Layout,
) -> None:
    """Ends the file's head with what it says of the tensors, and writes them, one in memory at a time."""
    factors = llama3_factors(config)
    if factors is not None:
        size, in_bytes = tuple(factors.shape), factors.nbytes
        writer.add_tensor_info(FACTORS, size, np.dtype(np.float32), in_bytes, _FLOAT32)
    for theirs, info in tensors.items():
        writer.add_tensor_info(theirs, info.shape, np.dtype(np.float32), info.num_bytes, info.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for theirs, info in tensors.items():
        joined = partial(_joined, layout, config.head_dim)
        if info.packed:
            data = gguf_blocks(info.packed, joined)
        else:
            ours = {name: parameters[name].detach().cpu().float() for name in info.parameters}
            data = _rounded(theirs, joined(ours).contiguous().numpy(), info.kind)
        writer.write_tensor_data(data)


def _tensor_infos(
    parameters: Mapping[str, Tensor], layout: Layout, kind: str, packed: Mapping[str, PackedWeight]
) -> dict[str, _TensorInfo]:
    """The file's tensors by name. Raises ValueError for rows that cannot be packed as `kind`."""
    matrix_kind = GGMLQuantizationType[kind]
    block = GGML_QUANT_SIZES[matrix_kind][0]
    tensors = {}
    problems = []
    for theirs, names in layout.groups(parameters).items():
        rows = sum(parameters[name].shape[0] for name in names)
        shape = (rows, *parameters[names[0]].shape[1:])
        is_matrix = len(shape) == 2 and theirs != "position_embd.weight"
        own_packed = {name: packed[name] for name in names if name in packed}
        if own_packed:
            tensor_kind = gguf_type(own_packed)
            if len(own_packed) < len(names):
                problems.append(f"{theirs} is made of {', '.join(names)}: quantize all of them, or skip all")
        else:
            tensor_kind = matrix_kind if is_matrix else _FLOAT32
        tensors[theirs] = _TensorInfo(names, shape, tensor_kind, own_packed)
        if is_matrix and not own_packed and shape[-1] % block:
            problems.append(f"{theirs} has rows of {shape[-1]}, no multiple of {block}: use F16")
    refuse(problems, f"{kind} packs {block} weights of a row together")
    return tensors


def _joined(layout: Layout, head_dim: int, ours: Mapping[str, Tensor]) -> Tensor:
    """The rows of the one tensor of the file that these are."""
    (tensor,) = layout.theirs(ours, head_dim).values()
    return tensor


def _add_general(writer: GGUFWriter, name: str, kind: str) -> None:
    writer.add_name(name)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(2)


def _add_tokenizer(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        prefix = "tokenizer" if key == "chat_template" else "tokenizer.ggml"
        _add(writer, f"{prefix}.{key}", value)


def _add(writer: GGUFWriter, key: str, value: bool | int | float | str | list) -> None:
    """Adds a setting in the type that llama.cpp expects of such a value."""
    if isinstance(value, bool):  # before int, which a bool is too
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _rounded(name: str, values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The values as `kind` stores them. Raises ValueError for those that it cannot hold."""
    largest = np.abs(values).max()
    if not np.isfinite(largest):
        raise ValueError(f"{name} has values that are not finite: the model is broken")
    limit = np.finfo(np.float16).max  # of the scales too
    if kind != _FLOAT32 and largest > limit:
        raise ValueError(
            f"{name} has values up to {largest:.3g}, and {kind.name} can hold {limit} at most: use F32"
        )
    return quantize(values, kind)
