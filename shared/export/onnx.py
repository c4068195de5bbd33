"""Week 12. A GPT as an ONNX file, and a small runner for it on ONNX Runtime.

    to_onnx(model, "model.onnx")
    OnnxModel("model.onnx").generate([[1, 2, 3]], 64)

The graph is the model's own `forward` with a cache of another kind: keys and values of the past are inputs of
the graph, and those of past and new tokens are outputs. So every GPT of the course can be exported, whatever
its configuration. Inputs and outputs have the names of Hugging Face's Optimum. Source: onnx.ai.
"""

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared.extras import needs
from shared.models.gpt import GPT, GPTConfig
from shared.models.weights import filled, gpt_without_memory, plain_tensors

LARGEST_FILE = 1_900_000_000
"""Bytes of weights up to which they go into the ONNX file itself, and above which into a second file beside
it: the message that holds an ONNX graph cannot be larger than 2 GB.
"""
CONFIG_KEY = "llm_weeks.config"
"""The metadata of the file under which the model's configuration is kept, as JSON."""


class _GrowingCache:
    """A `KVCache` whose past is given, and which grows by concatenation.

    A graph has no preallocated memory that it could write to.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]):
        self.pairs = list(pairs)
        self.length = pairs[0][0].size(2)

    def positions(self, time: int) -> Tensor:
        return torch.arange(self.length, self.length + time)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.pairs[layer]
        pair = (torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2))
        self.pairs[layer] = pair
        return pair

    def mask(self, time: int, window: int | None) -> Tensor:
        """As `causal_mask`, by comparing positions: `tril` of a size not yet known cannot be exported."""
        query = self.positions(time)[:, None]
        key = torch.arange(self.length + time)
        visible = key <= query
        if window is not None:
            visible = visible & (key > query - window)
        return visible

    def advance(self, time: int) -> None:
        """Does nothing: each run of the graph has a past of its own."""


class _Graph(nn.Module):
    """What is exported.

    The past of all layers goes in as one list of tensors, and comes out behind the logits.
    """

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = _GrowingCache(list(zip(past[::2], past[1::2])))
        logits = self.model(input_ids, cache)
        return logits, *(tensor for pair in cache.pairs for tensor in pair)


def _cache_names(kind: str, n_layer: int) -> list[str]:
    """Names of all layers' keys and values. kind: "past_key_values" or "present"."""
    return [f"{kind}.{i}.{part}" for i in range(n_layer) for part in ("key", "value")]


def weights_of(path: Path) -> Path:
    """The file beside an ONNX file that has the weights which are too large for it."""
    return path.with_name(path.name + ".data")


def to_onnx(model: GPT, path: str | Path) -> Path:
    """Writes a GPT as ONNX, in fp32, and returns the path.

    Inputs: `input_ids` int64 [batch, time]; for each layer `past_key_values.N.key` and `.value`, fp32 [batch,
    n_kv_head, past, head_dim], where past may be 0. Outputs: `logits` [batch, time, vocab_size], and
    `present.N.key` and `.value`, past and new. batch, time and past are free. Weights over 1.9 GB go into a
    second file, `weights_of(path)`; one that an earlier export left is removed. Raises ValueError for a model
    whose layers were swapped (adapters, quantization), and for dynamic RoPE scaling.
    """
    path = Path(path)
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        raise ValueError("dynamic scaling of RoPE depends on the text's length, and cannot be a fixed graph")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file, such as {path / 'model.onnx'}")
    weights = plain_tensors(model)
    separate = 4 * sum(tensor.numel() for tensor in weights.values()) > LARGEST_FILE
    program = _program(model.config, weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        program.save(folder / path.name, external_data=separate)
        for file in sorted(folder.iterdir(), reverse=True):  # the weights beside it first
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(file, path.with_name(file.name))
        if not separate:
            weights_of(path).unlink(missing_ok=True)  # an earlier export's
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def _program(config: GPTConfig, weights: Mapping[str, Tensor]) -> torch.onnx.ONNXProgram:
    """The graph of a GPT with these weights, in fp32, with its configuration in the metadata."""
    values = {name: tensor.detach().float() for name, tensor in weights.items()}
    model = filled(gpt_without_memory(config), values)
    # Sizes of at least 2: the exporter takes a 1 for a constant.
    ids = torch.zeros(2, 2, dtype=torch.int64)
    past = [torch.zeros(2, config.kv_heads, 2, config.head_dim) for _ in range(2 * config.n_layer)]
    free = torch.export.Dim.DYNAMIC
    with needs("export"), torch.no_grad(), _quiet_exporter():
        import onnxscript  # noqa: F401 (the exporter imports it, and would say less of its absence)

        program = torch.onnx.export(
            _Graph(model).eval(),
            (ids, past),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", *_cache_names("past_key_values", config.n_layer)],
            output_names=["logits", *_cache_names("present", config.n_layer)],
            dynamic_shapes=({0: free, 1: free}, [{0: free, 2: free} for _ in past]),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing: it does so only without dynamo=True")
    program.model.metadata_props[CONFIG_KEY] = json.dumps(asdict(config))
    return program


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Inside, PyTorch's exporter does not warn of its own inner workings, nor that torchvision is missing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class OnnxModel:
    """A file of `to_onnx` in ONNX Runtime, on the CPU. Raises ValueError for another file.

    threads: how many it computes with; None leaves the choice to the runtime.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        with needs("export"):
            import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.config = GPTConfig(**json.loads(metadata[CONFIG_KEY]))
        except KeyError:
            raise ValueError(f"{path} is an ONNX file, but none of shared.export.onnx.to_onnx") from None
        except Exception as error:  # the runtime's errors have no base class of their own
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path} is missing, cut or damaged ({reason}): export the model again"
            ) from None

    def new_cache(self, batch_size: int = 1) -> list[np.ndarray]:
        """An empty past: a key and a value for each layer, fp32 [batch, n_kv_head, 0, head_dim] each."""
        shape = (batch_size, self.config.kv_heads, 0, self.config.head_dim)
        return [np.zeros(shape, np.float32) for _ in range(2 * self.config.n_layer)]

    def __call__(self, idx: np.ndarray, past: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [batch, time, vocab_size] of idx, int64 [batch, time], and the past of the next call.

        Raises ValueError where past and idx are longer than the model's block_size.
        """
        total = past[0].shape[2] + idx.shape[1]
        if total > self.config.block_size:
            raise ValueError(
                f"{total} tokens do not fit in block_size={self.config.block_size}: start again from the last"
                " part of the text"
            )
        names = _cache_names("past_key_values", self.config.n_layer)
        logits, *present = self.session.run(None, {"input_ids": idx, **dict(zip(names, past))})
        return logits, present

    def generate(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The likeliest next tokens, one after the other: [batch, max_new_tokens].

        ids: prompts [batch, time], all of one length. Raises ValueError for none, and for different lengths.
        """
        if not ids or not ids[0] or len({len(row) for row in ids}) > 1:
            raise ValueError(
                "generate takes at least one prompt, all of the same length, of at least one token"
            )
        idx = np.array(ids, np.int64)
        past = self.new_cache(len(ids))
        new: list[list[int]] = [[] for _ in ids]
        for _ in range(max_new_tokens):
            logits, past = self(idx, past)
            idx = logits[:, -1].argmax(-1)[:, None]
            for row, token in zip(new, idx[:, 0].tolist()):
                row.append(token)
        return new
