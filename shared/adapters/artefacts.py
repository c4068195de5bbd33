"""Week 9. A fine-tuned model as others load it at one call: the adapter, with the name of its base, its
tokenizer, its chat template and its card in one folder.

    AutoPeftModelForCausalLM.from_pretrained("my-adapter")     # PEFT's: loads the base that is named there
    AutoTokenizer.from_pretrained("my-adapter")                # transformers'

A base that only this course can read (a checkpoint, a GGUF file) is written beside the adapter, in the folder
`base`, in Hugging Face's form.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from shared import checkpoint
from shared.adapters.attach import adapters_of
from shared.adapters.files import save_adapter
from shared.adapters.peft_lora import with_their_biases
from shared.adapters.prompts import PromptTuned
from shared.models.card import model_card
from shared.models.chat import is_chat
from shared.models.families import hf_config
from shared.models.gpt import GPT, GPTConfig
from shared.models.names import BY_NAME, HUB_NAME
from shared.models.pretrained import HUB, stored_model_type, to_hf
from shared.models.tokenizer_writing import hf_tokenizer_config
from shared.models.weights import with_biases
from shared.quantization.modules import dequantize, quantization_of
from shared.registry import LanguageModel
from shared.runtime import write_atomically, write_json
from shared.tokenizers.base import Tokenizer

PLAY_JINJA = (
    "{% for message in messages %}"
    "{{ {'system': 'SCENE', 'user': 'QUESTION', 'assistant': 'ANSWER'}[message['role']] + ':\\n' }}"
    "{% for line in message['content'].splitlines() if line.strip() %}{{ line + '\\n' }}{% endfor %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ANSWER:\\n' }}{% endif %}"
)
"""What `PlayTemplate` writes, in Jinja, which drops line breaks that stand behind a block."""


@dataclass(frozen=True)
class AdapterCard:
    """What a card says beside what can be read off the model itself."""

    title: str
    facts: Mapping[str, str]
    """A line each: what it was trained on, and how."""
    figures: Sequence[Mapping[str, str]]
    """The rows of a table of measurements, their keys its heading."""


def base_on_the_hub(name: str, config: GPTConfig) -> str | None:
    """The name by which PEFT finds the base that `load_model(name)` loads: the hub's, or a folder of Hugging
    Face's form. None for what only this course reads.

    config: the model's, which says what family an adapter's layers are written as. None where the base is
    stored as another: a Phi-3 without anything of its own is a Llama here, and has other layers there.

    >>> base_on_the_hub("gemma3-270m", GPTConfig())
    'google/gemma-3-270m'
    """
    path = Path(name)
    if name in BY_NAME:
        return BY_NAME[name].hub
    if not (path / "config.json").exists() and not (HUB_NAME.fullmatch(name) and not path.exists()):
        return None
    stored_as = stored_model_type(name)
    if stored_as is None or stored_as != hf_config(with_their_biases(config))[0]["model_type"]:
        return None
    return str(path.resolve()) if path.exists() else HUB.get(name, (name,))[0]


def save_whole(model: GPT, folder: Path) -> Path:
    """Writes a plain model and its tokenizer in Hugging Face's form, and returns the folder.

    A GPT-2 without biases is given biases of zero. Raises ValueError for a model that has no exact equivalent
    there.
    """
    config, tokenizer = model.config, model.tokenizer
    if with_their_biases(config) != config:
        model = with_biases(model)
    to_hf(model, folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder, config.block_size)
    return folder


def save_base(model: GPT, folder: Path) -> str | None:
    """Writes a base that only this course reads for PEFT to find, and returns its folder's full path.

    A quantized base is written as what it stands for. None, and nothing written, for a model without an exact
    equivalent at Hugging Face: PEFT has no base to put its adapter on.
    """
    try:
        hf_config(with_their_biases(model.config))
    except ValueError:
        return None
    if quantization_of(model) is not None:
        model = dequantize(deepcopy(model))
    return str(save_whole(model, folder).resolve())


def save_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the chat template in it: what AutoTokenizer loads.

    Raises ValueError for a tokenizer that has no exact equivalent.
    """
    config = hf_tokenizer_config(tokenizer, block_size)
    if not is_chat(tokenizer):
        config["chat_template"] = PLAY_JINJA
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", tokenizer.to_hf_json())
    write_json(folder / "tokenizer_config.json", config)


def save_artefact(model: LanguageModel, folder: Path, base: str | None, card: AdapterCard) -> str:
    """Writes an adapter, or a model all of whose weights were trained, so that others load it at one call,
    and returns this call: Python.

    base: the adapter's, as `base_on_the_hub` or `save_base` give it. A whole model without an equivalent at
    Hugging Face is saved as a checkpoint of this course.
    """
    is_adapter = isinstance(model, PromptTuned) or bool(adapters_of(model))
    if is_adapter:
        save_adapter(model, folder, base_model=base)
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder, model.config.block_size)
        load = _load_with_peft(folder) if base else _load_with_ours(folder)
    else:
        assert isinstance(model, GPT)
        try:
            save_whole(model, folder)
            load = _load_with_transformers(folder)
        except ValueError:
            checkpoint.save(model, folder, model.tokenizer)
            load = f'from shared.models.gpt import GPT\n\nmodel = GPT.from_checkpoint("{folder}")'
    _write_card(folder / "README.md", card, base if is_adapter else None, load)
    return load


def _load_with_peft(folder: Path) -> str:
    """Python that loads an adapter, its base and its tokenizer."""
    return (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    )


def _load_with_transformers(folder: Path) -> str:
    """Python that loads a whole model and its tokenizer."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    )


def _load_with_ours(folder: Path) -> str:
    """Python that puts an adapter on a base that only this course reads."""
    return (
        "from shared.adapters import load_adapter\nfrom shared.models.pretrained import load_model\n\n"
        f'model = load_adapter(load_model("the base"), "{folder}")'
    )


def _write_card(path: Path, card: AdapterCard, base: str | None, usage: str) -> None:
    """The card in Markdown, headed by the metadata that the hub reads."""
    model_card(path, card.title, card.facts, figures=card.figures, usage=usage)
    metadata = {"library_name": "peft" if base else "transformers", "pipeline_tag": "text-generation"}
    if base:
        metadata["base_model"] = base
    lines = "".join(f"{key}: {value}\n" for key, value in metadata.items())
    write_atomically(path, f"---\n{lines}---\n\n{path.read_text(encoding='utf-8')}")
