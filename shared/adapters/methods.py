"""Week 9. The ways to fine-tune, as what they make of a model: what is trained requires gradients, the rest
does not.

>>> from shared.models.gpt import GPT, GPTConfig
>>> model = make_trainable(GPT(GPTConfig.preset("nano")), "lora", LoRAConfig(r=4))
>>> count_trained_and_frozen(model)
(8192, 804096)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from shared.adapters.attach import adapted_layers, add_lora
from shared.adapters.lora import LoRAConfig
from shared.adapters.prompts import add_prompt
from shared.models.gpt import GPT
from shared.quantization import quantize
from shared.quantization.modules import num_bytes
from shared.quantization.packing import PackedWeight
from shared.registry import LanguageModel
from shared.training.config import TrainConfig
from shared.training.memory import estimate_memory

Method = Literal["full", "lora", "qlora", "dora", "prompt"]


def make_trainable(
    model: GPT,
    method: Method,
    adapter: LoRAConfig,
    *,
    scheme: str = "nf4",
    virtual_tokens: int = 16,
    prompt: Sequence[int] | None = None,
    seed: int = 0,
) -> LanguageModel:
    """The model as the method wants it: all its weights trained, an adapter on it (qlora: on its weights
    packed by `scheme`), or a soft prompt before its texts.

    prompt: the tokens that the soft prompt begins with. seed: of the first values. Raises ValueError for
    targets that the model does not have.
    """
    torch.manual_seed(seed)
    if method == "full":
        return model.requires_grad_(True)
    if method == "prompt":
        return add_prompt(model, virtual_tokens, prompt)
    if method == "qlora":
        model = quantize(model, scheme)
    return add_lora(model, replace(adapter, use_dora=method == "dora" or adapter.use_dora))


def count_trained_and_frozen(model: nn.Module) -> tuple[int, int]:
    """Parameters that are trained, and those that are not; packed weights count as what they stand for."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    packed = {module for module in model.modules() if isinstance(module, PackedWeight)}  # a shared one once
    return trained, frozen + sum(weight.in_features * weight.out_features for weight in packed)


@dataclass(frozen=True)
class TuningMemory:
    """About the bytes of a fine-tuning step's tensors, in one process."""

    weights: int
    """All of the model's, packed ones as they lie."""
    learned: int
    """Gradients of what is trained, and AdamW's two moments."""
    activations: int
    """What the forward keeps for the backward."""
    logits: int
    """Two more tensors of this size's half live beside them where the backward begins."""

    @property
    def peak(self) -> int:
        """All of it at once."""
        return self.weights + self.learned + self.activations + self.logits

    def in_words(self) -> str:
        """A line for people.

        >>> TuningMemory(5 * 10**8, 10**8, 10**9, 4 * 10**8).in_words()
        'about 2.0 GB: weights 0.50, gradients and moments 0.10, activations 1.00, at the loss 0.40'
        """
        gb = [part / 1e9 for part in (self.peak, self.weights, self.learned, self.activations, self.logits)]
        return (
            f"about {gb[0]:.1f} GB: weights {gb[1]:.2f}, gradients and moments {gb[2]:.2f}, activations"
            f" {gb[3]:.2f}, at the loss {gb[4]:.2f}"
        )


def estimate_tuning_memory(
    model: LanguageModel, train: TrainConfig, dtype: torch.dtype = torch.float32, recompute: bool = False
) -> TuningMemory:
    """What fine-tuning this model takes: week 7's count of activations, and what an adapter adds to them.

    Where only some layers have adapters, fewer inputs are kept than is counted here. Raises ValueError where
    `estimate_memory` does.
    """
    full = estimate_memory(model.config, train, dtype, recompute)
    tokens = train.batch_size * train.block_size
    trained, _ = count_trained_and_frozen(model)
    ranks = [
        layer.adapter(name).config.r for layer in adapted_layers(model).values() for name in layer.in_use
    ]
    width = 4 if dtype == torch.float32 else 2
    thin = 0 if recompute else 2 * width * tokens * sum(ranks)  # A's product, and the same scaled
    logits = 4 * tokens * model.config.vocab_size
    return TuningMemory(num_bytes(model), 12 * trained, full.activations + thin, 2 * logits)
