"""What week 8 measures of a model: how good it still is, how small it is, how fast it may become."""

import math
import statistics
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from names import GPTQ, GROUP, label_of
from shared import checkpoint
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus, TokenDataset
from shared.evaluation import Evaluation, evaluate, perplexity
from shared.models.gpt import GPT
from shared.models.pretrained import load_model
from shared.quantization import quantize
from shared.quantization.gptq import gptq
from shared.quantization.modules import num_bytes, quantization_of, save_quantized
from shared.quantization.packing import GROUP_SIZES
from shared.registry import fast_reader
from shared.runtime import table

if TYPE_CHECKING:
    from run import Settings

COLUMNS = {
    "bits": ("bits/weight", 1),
    "megabytes": ("MB", 1),
    "file_megabytes": ("file MB", 1),
    "of_fp32": ("of fp32", 3),
    "perplexity": ("perplexity", 2),
    "decoder_perplexity": ("as it decodes", 2),
    "bits_per_byte": ("bits/byte", 3),
    "prefill_tokens_per_second": ("prefill tok/s", 0),
    "first_token_ms": ("first token ms", 0),
    "decode_tokens_per_second": ("decode tok/s", 1),
    "over_transformers": ("times transformers", 2),
    "memory_limit": ("memory allows tok/s", 0),
}
"""The printed table: by metric, its heading and its digits."""


def load_studied(settings: "Settings") -> GPT:
    """The model of the studies, `--model`, on the CPU in fp32. Raises ValueError for one without a tokenizer,
    and for windows that are longer than it can read.
    """
    model = load_model(settings.model, "cpu", torch.float32, blocks=settings.blocks)
    if model.tokenizer is None:
        raise ValueError(f"{settings.model} has no tokenizer of ours: the text cannot be cut into its tokens")
    if settings.study_block_size > model.config.block_size:
        raise ValueError(
            f"study_block_size={settings.study_block_size}: {settings.model} reads at most"
            f" {model.config.block_size} tokens"
        )
    return model


def _silent(line: str) -> None:
    pass


def quantized(model: GPT, calibration: Tensor, group_size: int) -> dict[str, GPT]:
    """The model itself and its quantized forms, by row.

    "wide" is the largest group that divides the in_features of all linear layers.
    """
    widths = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    wide = max(size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    return {
        "fp32": model,
        "int8": quantize(deepcopy(model), "int8"),
        "int8-groups": quantize(deepcopy(model), "int8", GROUP, say=_silent),
        "int4": quantize(deepcopy(model), "int4", group_size),
        "int4-gptq": gptq(deepcopy(model), calibration, group_size, say=_silent),  # int4 has said it
        "int4-wide": quantize(deepcopy(model), "int4", wide, say=_silent),
        "int4-wide-gptq": gptq(deepcopy(model), calibration, wide, say=_silent),
        "nf4": quantize(deepcopy(model), "nf4"),
    }


def window_by_window(
    model: nn.Module, corpus: Corpus, block_size: int, windows: int | None
) -> list[Evaluation]:
    """`evaluate`, window by window of the held-out text, so that two models can be compared on each."""
    dataset = TokenDataset(corpus.val, block_size)
    count = (len(corpus.val) - 1) // block_size
    if count < 2:
        raise ValueError(
            f"the held-out text has {count} window of {block_size} tokens, and to compare takes 2: give a"
            " longer text"
        )
    starts = np.linspace(0, count - 1, min(windows or count, count)).round().astype(int) * block_size
    evaluations = []
    for start in starts:
        tokens = dataset.tokens[start : start + block_size + 1]
        evaluations.append(evaluate(model, tokens, block_size, corpus.token_bytes))
    return evaluations


class AsItDecodes(nn.Module):
    """A model that reads through what writes its texts: with packed weights, decoder.c also rounds what a
    layer reads, to 8 bits.
    """

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, idx: Tensor) -> Tensor:
        """int64 [batch, time] -> logits [batch, time, vocab_size].

        Raises RuntimeError where PyTorch decodes.
        """
        reader = fast_reader(self.model, len(idx), idx.size(1))
        if reader is None:
            raise RuntimeError("PyTorch decodes here: there is no other perplexity to measure")
        rows = reader.read(list(enumerate(idx.tolist())), every=True)
        return rows.view(*idx.shape, -1)


def as_it_decodes(
    model: GPT, corpus: Corpus, block_size: int, windows: int | None, base: Sequence[Evaluation]
) -> dict[str, float]:
    """`compared` through what writes texts, its names behind `decoder_`; {} where PyTorch does that."""
    if quantization_of(model) is None or fast_reader(model, 1, block_size) is None:
        return {}
    evaluations = window_by_window(AsItDecodes(model), corpus, block_size, windows)
    figures = compared(evaluations, base)
    return {f"decoder_{key}": figures[key] for key in ("perplexity", "worse", "worse_error")}


def compared(evaluations: Sequence[Evaluation], base: Sequence[Evaluation]) -> dict[str, float]:
    """Loss, perplexity and bits per byte over all windows.

    `worse` is the perplexity's increase over `base`'s, `worse_error` the standard error of that.
    """
    bits = [e.loss * e.tokens / math.log(2) for e in evaluations]
    text_bytes = [b / e.bits_per_byte for b, e in zip(bits, evaluations)]
    loss = statistics.fmean(e.loss for e in evaluations)  # windows are of one size
    increase = [e.loss - b.loss for e, b in zip(evaluations, base)]
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": sum(bits) / sum(text_bytes),
        "worse": math.expm1(statistics.fmean(increase)),
        "worse_error": statistics.stdev(increase) / math.sqrt(len(increase)),
        "tokens": sum(e.tokens for e in evaluations),
    }


def recovered(rows: dict[str, dict[str, float]], name: str, row: dict[str, float]) -> dict[str, float]:
    """For a row of GPTQ's, the share that it brings back of the perplexity that rounding to nearest loses.

    1 is all of it, 0 nothing. Other rows have no such figure.
    """
    if not name.endswith(GPTQ):
        return {}
    nearest = rows[name.removesuffix(GPTQ)]["perplexity"]
    base = rows["fp32"]["perplexity"]
    if nearest == base:
        return {"recovered": 0.0}
    return {"recovered": (nearest - row["perplexity"]) / (nearest - base)}


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors in the state dict, others' packed ones included, what is shared counted once."""
    sizes: dict[int, int] = {}

    def add(tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's: a tensor of tensors
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        elif tensor.numel():
            sizes[tensor.data_ptr()] = tensor.nbytes

    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            add(value)
    return sum(sizes.values())


def size_of(model: nn.Module, original: GPT) -> dict[str, float]:
    """Megabytes, bits for each parameter of the `original` in fp32, and the share of its size."""
    if model is original or quantization_of(model):
        size = num_bytes(model)
    else:
        size = stored_bytes(model)
    return {
        "megabytes": size / 1e6,
        "bits": 8 * size / original.num_parameters(),
        "of_fp32": size / num_bytes(original),
    }


def file_bytes(model: GPT) -> int:
    """Bytes of the checkpoint's model.safetensors, as it is really written."""
    save = save_quantized if quantization_of(model) else checkpoint.save
    with tempfile.TemporaryDirectory() as folder:
        saved = save(model, Path(folder) / "model")
        return (saved / "model.safetensors").stat().st_size


def memory_limit(model: nn.Module, bandwidth: float | None, size: int | None = None) -> dict[str, float]:
    """Tokens per second that memory allows, where each token reads every weight once.

    Of an embedding table only a row is read; the KV cache is left out. bandwidth: bytes per second, None
    where it was not measured. size: the model's bytes, None counts them.
    """
    tables = {m.weight.data_ptr(): m.weight.nbytes for m in model.modules() if isinstance(m, nn.Embedding)}
    tied = set()
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter:
            tied.add(module.weight.data_ptr())
    unread = sum(nbytes for place, nbytes in tables.items() if place not in tied)
    read = (size or num_bytes(model)) - unread
    limits = {"read_megabytes": read / 1e6}
    if bandwidth:
        limits["memory_limit"] = bandwidth / read
    return limits


def keep(
    work: Workspace, name: str, settings: "Settings", row: dict[str, float], **artifacts: Any
) -> dict[str, float]:
    """A row as a run of its own in the logs."""
    with work.log(name, settings) as log:
        log.artifact(**artifacts)
        return log.finish(**row)


def show(rows: dict[str, dict[str, float]]) -> None:
    """Prints the table, and what GPTQ brings back."""
    shown = []
    for name, row in rows.items():
        cells = {label: f"{row[key]:,.{digits}f}" for key, (label, digits) in COLUMNS.items() if key in row}
        if name not in ("fp32", "transformers-fp32"):
            cells["perplexity worse by"] = f"{100 * row['worse']:.2f} ± {100 * row['worse_error']:.2f} %"
        shown.append({"row": label_of(name)} | cells)
    print("\n" + table(shown))
    for name, row in rows.items():
        if "recovered" in row:
            share = f"{row['recovered']:.0%}"
            print(f"{label_of(name)}: brings back {share} of the perplexity that rounding to nearest loses")
