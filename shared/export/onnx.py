"""Week 12. A GPT as an ONNX file with its keys and values as inputs and outputs, and a small runner for ONNX
Runtime.

    to_onnx("model.onnx", model)
    OnnxModel("model.onnx").generate([[1, 2, 3]], 64)

The graph is the model's own `forward`, handed another cache: one whose past comes in as tensors and goes out
longer. So every GPT of the course can be exported, whatever its configuration. Names of inputs and outputs
are those of Hugging Face's Optimum. Source: onnx.ai.
"""

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared.models.gpt import GPT, GPTConfig
from shared.models.weights import plain_tensors

LARGEST_FILE = 1_900_000_000
"""Bytes of weights that go into the file itself: what holds an ONNX graph cannot be larger than 2 GB. More go
into a file beside it.
"""
CONFIG_KEY = "llm_weeks.config"


class _Past:
    """A cache (as `KVCache`) whose past is given and whose tensors grow: without preallocated memory, which a
    graph cannot write to.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]):
        self.pairs = list(pairs)
        self.length = pairs[0][0].size(2)

    def positions(self, time: int) -> Tensor:
        return torch.arange(self.length, self.length + time)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.pairs[layer]
        self.pairs[layer] = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        return self.pairs[layer]

    def mask(self, time: int, window: int | None) -> Tensor:
        """As `causal_mask`, by comparing positions: `tril` of a size that is not known yet cannot be
        exported.
        """
        query, key = self.positions(time)[:, None], torch.arange(self.length + time)
        return key <= query if window is None else (key <= query) & (key > query - window)

    def advance(self, time: int) -> None:
        """Nothing: each run of the graph has a past of its own."""


class _Flat(nn.Module):
    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = _Past(list(zip(past[::2], past[1::2])))
        logits = self.model(input_ids, cache)
        return logits, *(tensor for pair in cache.pairs for tensor in pair)


def _names(kind: str, n_layer: int) -> list[str]:
    return [f"{kind}.{i}.{part}" for i in range(n_layer) for part in ("key", "value")]


def weights_of(path: Path) -> Path:
    """The file beside an ONNX file that holds the weights which are too large for it."""
    return path.with_name(path.name + ".data")


def to_onnx(path: str | Path, model: GPT) -> Path:
    """Writes a GPT as ONNX, in fp32, and returns the path.

    Inputs: `input_ids` int64 [batch, time]; for each layer `past_key_values.N.key` and `.value`, fp32 [batch,
    n_kv_head, past, head_dim], where past may be 0. Outputs: `logits` [batch, time, vocab_size], and
    `present.N.key` and `.value`, past and new. batch, time and past are free. Weights over 1.9 GB go into a
    second file, `weights_of(path)`; one that an earlier export left is removed. Raises ValueError for a model
    whose layers were swapped (adapters, quantization).
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file, such as {path / 'model.onnx'}")
    weights, config = plain_tensors(model), model.config
    large = 4 * sum(tensor.numel() for tensor in weights.values()) > LARGEST_FILE
    fp32 = GPT(config).eval()
    fp32.load_state_dict(
        {name: t.detach() for name, t in weights.items()}, strict=False
    )  # a tied weight has one name there
    # Sizes of at least 2: the exporter takes a 1 for a constant.
    past = [torch.zeros(2, config.kv_heads, 2, config.head_dim) for _ in range(2 * config.n_layer)]
    free = torch.export.Dim.DYNAMIC
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, on its own inner workings
            logging.getLogger("torch.onnx").setLevel(
                logging.ERROR
            )  # it misses torchvision, which has no part in this
            program = torch.onnx.export(
                _Flat(fp32).eval(),
                (torch.zeros(2, 2, dtype=torch.int64), past),
                dynamo=True,
                verbose=False,
                input_names=["input_ids", *_names("past_key_values", config.n_layer)],
                output_names=["logits", *_names("present", config.n_layer)],
                dynamic_shapes=({0: free, 1: free}, [{0: free, 2: free} for _ in past]),
            )
        program.model.metadata_props[CONFIG_KEY] = json.dumps(asdict(config))
        program.save(folder / path.name, external_data=large)
        for file in sorted(folder.iterdir(), reverse=True):  # the weights beside it first
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(file, path.with_name(file.name))
        if not large:
            weights_of(path).unlink(missing_ok=True)  # an earlier export's
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


class OnnxModel:
    """A file of `to_onnx` in ONNX Runtime, on the CPU. Raises ValueError for another file.

    threads: how many it computes with; None leaves the choice to the runtime.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        import onnxruntime  # here, so that a model can be exported where there is no runtime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            self.config = GPTConfig(
                **json.loads(self.session.get_modelmeta().custom_metadata_map[CONFIG_KEY])
            )
        except KeyError:
            raise ValueError(f"{path} is an ONNX file, but none of shared.export.onnx.to_onnx") from None
        except Exception as error:  # the runtime's errors have no base class of their own
            raise ValueError(
                f"{path} is missing, cut or damaged ({' '.join(str(error).split())}): export the model again"
            ) from None

    def new_cache(self, batch_size: int = 1) -> list[np.ndarray]:
        """The past of nothing: a key and a value for each layer, fp32 [batch, n_kv_head, 0, head_dim]."""
        shape = (batch_size, self.config.kv_heads, 0, self.config.head_dim)
        return [np.zeros(shape, np.float32) for _ in range(2 * self.config.n_layer)]

    def __call__(self, idx: np.ndarray, past: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """int64 [batch, time] and the past -> logits [batch, time, vocab_size] and the past of the next call."""
        total = past[0].shape[2] + idx.shape[1]
        if total > self.config.block_size:
            raise ValueError(
                f"{total} tokens do not fit in block_size={self.config.block_size}: start again from the last"
                " part of the text"
            )
        names = _names("past_key_values", self.config.n_layer)
        logits, *present = self.session.run(None, {"input_ids": idx, **dict(zip(names, past))})
        return logits, present

    def generate(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The likeliest next tokens, one after the other, for prompts [batch, time] of one length: [batch,
        max_new_tokens].
        """
        if not ids or not ids[0] or len({len(row) for row in ids}) > 1:
            raise ValueError(
                "generate takes at least one prompt, all of the same length, of at least one token"
            )
        idx, past, new = np.array(ids, np.int64), self.new_cache(len(ids)), []
        for _ in range(max_new_tokens):
            logits, past = self(idx, past)
            idx = logits[:, -1].argmax(-1)[:, None]
            new.append(idx)
        return np.concatenate(new, axis=1).tolist() if new else [[] for _ in ids]
