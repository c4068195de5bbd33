"""Week 9. Adapters: a few trainable numbers beside a model that stays as it is."""

from shared.adapters.attach import add_lora, merge_lora
from shared.adapters.files import load_adapter, save_adapter
from shared.adapters.lora import LoRAConfig

__all__ = ["LoRAConfig", "add_lora", "load_adapter", "merge_lora", "save_adapter"]
