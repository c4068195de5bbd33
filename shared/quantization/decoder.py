"""Week 8. A GPT's forward pass in C: the next logits of one text or of many, in one call.

    decoder = Decoder(model, slots=2)
    logits = decoder.read([(0, prompt), (1, other_prompt)])  # [2, vocab_size]: what follows each
    logits = decoder.read([(0, [token])])                    # one more token of the first

PyTorch takes some 200 operations for a token, each of which costs more than its arithmetic where a model is
small. decoder.c goes through the whole model in one call, with weights as they are packed. Its logits are the
model's own up to rounding: of sums, and with packed weights of activations (see `native.product`). Source of
the idea of a model in one file of C: Karpathy, llama2.c (2023).

Once `shared.quantization` is imported, `shared.sampling` and `shared.serving` read by it where they can.
"""

import ctypes
import logging
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from shared.devices import device_of
from shared.models.attention import CausalSelfAttention
from shared.models.cache import KVCache, checked_length
from shared.models.gpt import GPT, MLP, Block
from shared.models.layers import Linear, RMSNorm, RMSNormPlusOne
from shared.models.rotary import Rotary
from shared.quantization import native
from shared.quantization.modules import QuantizedEmbedding, QuantizedLinear
from shared.quantization.native import KINDS, Change, Matrix
from shared.quantization.panels import PANEL
from shared.registry import LanguageModel, register_reader
from shared.sampling.generate import check_ids

ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu", "geglu")
"""In the order of decoder.c."""
INT32 = np.int32
log = logging.getLogger(__name__)


class _Norm(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("is_layer_norm", c_int32)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attention_norm", "q_norm", "k_norm")),
        *((name, _Norm) for name in ("attention_post_norm", "mlp_norm", "mlp_post_norm")),
        *((name, Matrix) for name in ("q", "k", "v", "o", "up", "gate", "down")),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, c_int32) for name in ("rope_dim", "window")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "hidden")),
        *((name, c_int32) for name in ("activation", "norms_heads")),
        *((name, c_float) for name in ("attention_scale", "attention_softcap", "embedding_scale")),
        ("logit_softcap", c_float),
        *((name, Matrix) for name in ("embedding", "head")),
        ("position_embedding", c_void_p),
        ("largest_r", c_int32),
        ("norm", _Norm),
        ("layers", POINTER(_Layer)),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in "kv"),
        *((name, c_int64) for name in ("layer", "slot", "head")),
        ("places", c_int32),
    ]


class _Tokens(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("ids", "slots", "positions", "changes", "wanted")),
        ("count", c_int32),
    ]


class NotForC(ValueError):
    """The model has something that decoder.c does not know."""


class LowRankLinear(Protocol):
    """A linear layer with adapters: it computes base(x) + Σ share · B A x over those in use. Week 9's are."""

    base: nn.Module
    merged: nn.Module | None
    """What computes in the place of the sum."""
    in_use: dict[str, float]
    """Shares, by the adapters' names."""

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r], scaled, of an adapter; None where this layer has none of the name.

        Raises ValueError for an adapter of another form.
        """


class _Translation:
    """A GPT as decoder.c reads it. It keeps what the structures point to."""

    def __init__(self, model: GPT, adapters: Sequence[str]):
        self.config = model.config
        self.kept: list[Any] = []
        self.adapters = tuple(adapters)
        self.largest_r = 0
        self.layers = (_Layer * model.config.n_layer)()
        rotations = [self._rotary(rotary) for rotary in model.rotaries]
        for number, block in enumerate(model.blocks):
            rotation = model._rotation_of[number]
            self.layers[number] = self._layer(block, rotations[rotation] if rotation >= 0 else None)
        config = model.config
        position = model.position_embedding.weight if config.position == "learned" else None
        self.model = _Model(
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            n_head=config.n_head,
            n_kv_head=config.kv_heads,
            head_dim=config.head_dim,
            hidden=config.hidden,
            activation=ACTIVATIONS.index(config.mlp),
            norms_heads=config.qk_norm_over == "head",
            attention_scale=config.attention_scale or config.head_dim**-0.5,
            attention_softcap=config.attention_softcap or 0,
            embedding_scale=config.embedding_scale,
            logit_softcap=config.logit_softcap or 0,
            embedding=self._matrix(model.token_embedding),
            head=self._matrix(model.lm_head),
            position_embedding=None if position is None else self._address(position.float()),
            largest_r=self.largest_r,
            norm=self._norm(model.norm),
            layers=self.layers,
        )

    def _address(self, tensor: Tensor) -> int:
        """Where its numbers lie, for as long as this object lives."""
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, module: nn.Module | None) -> Matrix:
        if module is None:
            return Matrix()
        if hasattr(module, "low_rank"):
            return self._changed_matrix(cast(LowRankLinear, module))
        if type(module) in (QuantizedLinear, QuantizedEmbedding):
            assert isinstance(module, QuantizedLinear | QuantizedEmbedding)
            if module.packed.kernel != "native":
                raise NotForC(f"its {module.packed.settings['scheme']} weights are not in the order for C")
            matrix = module.packed.matrix()
            self.kept.append(matrix)
            bias = module.bias if isinstance(module, QuantizedLinear) else None
        elif type(module) in (Linear, nn.Linear, nn.Embedding):
            assert isinstance(module, nn.Linear | nn.Embedding)
            matrix = self._plain_matrix(module.weight)
            bias = module.bias if isinstance(module, nn.Linear) else None
        else:
            raise NotForC(f"it has a {type(module).__name__}")
        if bias is not None:
            matrix.bias = self._address(bias.float())
        return matrix

    def _changed_matrix(self, layer: LowRankLinear) -> Matrix:
        """Change 0 is of the adapters in use, the others of each alone, in the order of `adapters`."""
        if layer.merged is not None:
            return self._matrix(layer.merged)
        matrix = self._matrix(layer.base)
        changes = (Change * (1 + len(self.adapters)))()
        for number, shares in enumerate([layer.in_use, *({name: 1.0} for name in self.adapters)]):
            try:
                parts = [(layer.low_rank(name), share) for name, share in shares.items()]
            except ValueError as error:
                raise NotForC(str(error)) from None
            pairs = [(pair[0].float(), pair[1].float() * share) for pair, share in parts if pair is not None]
            if pairs:
                a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
                changes[number] = Change(self._address(a), self._address(b), len(a))
                self.largest_r = max(self.largest_r, len(a))
        self.kept.append(changes)
        matrix.changes = changes
        return matrix

    def _plain_matrix(self, weight: Tensor) -> Matrix:
        name = str(weight.dtype).removeprefix("torch.")
        if name not in KINDS:
            raise NotForC(f"it has weights in {name}")
        n_out, n_in = weight.shape
        return Matrix(kind=KINDS[name], n_out=n_out, n_in=n_in, codes=self._address(weight))

    def _norm(self, norm: nn.Module | None) -> _Norm:
        if norm is None:
            return _Norm()
        known = type(norm) in (nn.LayerNorm, nn.RMSNorm, RMSNorm, RMSNormPlusOne)
        if not known or norm.weight is None:
            raise NotForC(f"it has a {type(norm).__name__}")
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        weight = norm.weight.float()
        bias = None
        if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
            bias = self._address(norm.bias.float())
        plus_one = isinstance(norm, RMSNormPlusOne)
        return _Norm(
            weight=self._address(1 + weight if plus_one else weight),
            bias=bias,
            eps=torch.finfo(torch.float32).eps if norm.eps is None else norm.eps,
            is_layer_norm=isinstance(norm, nn.LayerNorm),
        )

    def _rotary(self, rotary: nn.Module) -> tuple[int, int]:
        if not isinstance(rotary, Rotary) or rotary.table_length < self.config.block_size:
            raise NotForC("its angles depend on the length of the text")
        return self._address(rotary.cos.float()), self._address(rotary.sin.float())

    def _layer(self, block: nn.Module, rotation: tuple[int, int] | None) -> _Layer:
        if (
            type(block) is not Block
            or type(block.attn) is not CausalSelfAttention
            or type(block.mlp) is not MLP
        ):
            raise NotForC(f"it has a {type(block).__name__} with a part of another kind")
        attention, mlp = block.attn, block.mlp
        cos, sin = rotation or (None, None)
        return _Layer(
            attention_norm=self._norm(block.attn_norm),
            q_norm=self._norm(attention.q_norm),
            k_norm=self._norm(attention.k_norm),
            attention_post_norm=self._norm(block.attn_post_norm),
            mlp_norm=self._norm(block.mlp_norm),
            mlp_post_norm=self._norm(block.mlp_post_norm),
            q=self._matrix(attention.q_proj),
            k=self._matrix(attention.k_proj),
            v=self._matrix(attention.v_proj),
            o=self._matrix(attention.o_proj),
            up=self._matrix(mlp.up_proj),
            gate=self._matrix(mlp.gate_proj),
            down=self._matrix(mlp.down_proj),
            cos=cos,
            sin=sin,
            rope_dim=self.config.rope_dim,
            window=attention.window or 0,
        )


def _check_forward(model: GPT) -> None:
    """Raises NotForC for a model whose forward does more than GPT's, or lies elsewhere."""
    if type(model) is not GPT or device_of(model).type != "cpu":
        raise NotForC(f"it is a {type(model).__name__} on {device_of(model)}")
    if model.cache_type is not KVCache or "new_cache" in vars(model):
        raise NotForC("it has a cache of its own")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise NotForC(f"there is a hook on {name or 'it'}, which wants to see PyTorch's tensors")


def _library() -> ctypes.CDLL:
    functions = native.library()
    functions.forward.argtypes = [
        *(POINTER(_Model), POINTER(_Cache), POINTER(_Tokens)),
        *(c_void_p, c_int),  # logits, threads
    ]
    return functions


class Decoder:
    """Reads texts with a GPT on a CPU, by decoder.c: each in a slot of its own, whose keys and values it
    keeps.

    slots: how many texts at once. max_length: of each, in tokens; the model's block_size if not given.
    adapters: names that `use_adapter` may give; without it those in use count. The model's weights are not
    copied: while it is trained, make a new decoder. Raises NotForC for what decoder.c does not know (DoRA,
    hooks, a model in fp16, packed weights that are not in the order for C, angles that depend on the text's
    length), and RuntimeError where there is no compiler.
    """

    batch_invariant = True
    """See `SlotReader`."""

    def __init__(
        self, model: GPT, slots: int = 1, max_length: int | None = None, *, adapters: Sequence[str] = ()
    ):
        _check_forward(model)
        config = model.config
        self.max_length = checked_length(config, max_length)
        self._forward = _library().forward
        self._translation = _Translation(model, adapters)
        self._model = model
        self.lengths = [0] * slots
        """How many tokens each slot holds."""
        self._changes = [0] * slots
        places = self._places = PANEL * -(-self.max_length // PANEL)
        shape = (config.n_layer, slots, config.kv_heads, places * config.head_dim)
        self._k, self._v = torch.empty(shape), torch.empty(shape)  # nothing counts before it is written
        layer, slot, head, _ = self._k.stride()
        self._cache = _Cache(self._k.data_ptr(), self._v.data_ptr(), layer, slot, head, places)

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values."""
        return self._k.nbytes + self._v.nbytes

    def read(self, new: Sequence[tuple[int, Sequence[int]]], every: bool = False) -> Tensor:
        """Reads the next tokens of some slots, each given once, and returns logits in their order.

        new: slots, each with at least one token. Returns fp32 [len(new), vocab_size], what follows the last
        token of each; with `every`, what follows each token, [tokens, vocab_size]. Raises ValueError for
        tokens that do not fit, ids outside the vocabulary, no tokens, and slots that are not there or are
        given twice.
        """
        self._check_slots([slot for slot, _ in new])
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        changes: list[int] = []
        wanted: list[bool] = []
        for slot, tokens in new:
            length, count = self.lengths[slot], len(tokens)
            if not count or length < 0:
                raise ValueError(f"slot {slot} holds {length} tokens and is given {count}: give at least one")
            if length + count > self.max_length:
                raise ValueError(
                    f"a slot holds {length} of {self.max_length} tokens, and {count} more do not fit"
                )
            check_ids(tokens, self._model)
            ids += tokens
            slots += [slot] * count
            positions += range(length, length + count)
            changes += [self._changes[slot]] * count
            wanted += [every] * (count - 1) + [True]
        arrays = [np.array(numbers, dtype=INT32) for numbers in (ids, slots, positions, changes)]
        arrays.append(np.array(wanted, dtype=np.uint8))
        logits = torch.empty(sum(wanted), self._model.config.vocab_size)
        failed = self._forward(
            byref(self._translation.model),
            byref(self._cache),
            byref(_Tokens(*(array.ctypes.data for array in arrays), len(ids))),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory left to read {len(ids)} tokens")
        for slot, tokens in new:
            self.lengths[slot] += len(tokens)
        return logits

    def _check_slots(self, slots: Sequence[int]) -> None:
        """Raises ValueError for slots that are not there, where C would write into other memory, or are given
        twice.
        """
        count = len(self._changes)
        if len(self.lengths) != count or not all(0 <= slot < count for slot in slots):
            raise ValueError(f"slots {list(slots)}: this decoder's are numbered from 0 to {count - 1}")
        if len(set(slots)) < len(slots):
            raise ValueError(f"slots {list(slots)}: each can be given once")

    def use_adapter(self, slot: int, name: str | None) -> None:
        """From here on this slot's tokens go through the adapter of this name alone, None being the base;
        instead of those in use.
        """
        self._check_slots([slot])
        self._changes[slot] = -1 if name is None else 1 + self._translation.adapters.index(name)

    def copy(self, source: int, target: int, length: int) -> None:
        """Makes `target` hold the first `length` tokens of `source`."""
        self._check_slots([source])
        self._check_slots([target])
        head_dim = self._k.size(3) // self._places
        whole = PANEL * -(-length // PANEL)  # keys lie in panels
        for tensor, count in ((self._k, whole * head_dim), (self._v, length * head_dim)):
            tensor[:, target, :, :count] = tensor[:, source, :, :count]
        self.lengths[target] = length

    def clear(self, slot: int) -> None:
        """Forgets all that a slot holds."""
        self.lengths[slot] = 0

    def close(self) -> None:
        """Does nothing: the model is as it was."""


@register_reader
def native_reader(
    model: LanguageModel, slots: int, max_length: int, adapters: Sequence[str] = ()
) -> Decoder | None:
    """A `Decoder`, or None, with a line in the log, where decoder.c cannot be used."""
    if not isinstance(model, GPT):
        return None
    try:
        return Decoder(model, slots, max_length, adapters=adapters)
    except (NotForC, RuntimeError) as error:
        log.info("PyTorch reads with this model, not decoder.c: %s", error)
        return None
