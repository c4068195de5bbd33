"""Week 12. What the Hugging Face and GGUF exports demand of a model and its tokenizer."""

from shared.models.gpt import GPT
from shared.models.weights import plain_tensors, with_biases
from shared.registry import unwrapped
from shared.tokenizers import Tokenizer


def ready_to_export(model: GPT, tokenizer: Tokenizer | None) -> tuple[GPT, Tokenizer]:
    """A model and its tokenizer (None: the model's own) as other programs can hold them.

    A GPT-2 without biases comes back with biases of zero, which other programs expect. Raises ValueError for
    a model whose layers were swapped (adapters, quantization), and for a tokenizer that is missing or has
    more tokens than the model.
    """
    model = unwrapped(model)
    plain_tensors(model)  # raises where layers were swapped
    if tokenizer is None:
        tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            "a model is exported with its tokenizer, and this one has none: give the one it was trained with"
        )
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: this is not"
            " its tokenizer"
        )
    like_gpt2 = config.norm == "layernorm" and config.position == "learned"
    if like_gpt2 and not config.bias:
        model = with_biases(model)
    return model, tokenizer
