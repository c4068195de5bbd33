"""Week 12. The learner's model for everybody else's programs: a Hugging Face folder, a GGUF file for
llama.cpp, an ONNX file.

    save_hf_folder("my-model", model, tokenizer)          # transformers' from_pretrained, vLLM, and others
    to_gguf("my-model.gguf", model, tokenizer, "Q8_0")    # llama.cpp
    to_onnx("my-model.onnx", model)                       # ONNX Runtime
    push_to_hub("my-model", "someone/my-model")           # the folder, with its card, to the Hugging Face hub

From the command line, with a checkpoint of week 4 or later, or SmolLM2:

    python -m shared.export --checkpoint checkpoints/06_gpt2/laptop/tinyshakespeare/gpt2/best --format gguf --kind Q8_0 --out my-model.gguf

Each is exact or refused: a GPT becomes a GPT-2, a Llama or a Qwen3 (a Llama with qk_norm), and where a format
has no such model the fields in the way are named and nothing is written. ONNX takes every GPT. Sources:
transformers; the GGUF specification in ggml's repository; onnx.ai.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from shared import checkpoint
from shared.course.report import model_card
from shared.export.tokenizers import hf_tokenizer, hf_tokenizer_config, special_roles
from shared.models.families import hf_config
from shared.models.gpt import GPT
from shared.models.pretrained import refuse_checkpoint, to_hf
from shared.models.weights import plain_tensors, with_biases
from shared.runtime import write_atomically, write_json
from shared.sampling.generate import generate
from shared.tokenizers import Tokenizer


def ready_to_export(model: GPT, tokenizer: Tokenizer) -> GPT:
    """The model as other programs can have it, checked against its tokenizer."""
    plain_tensors(model)  # or refuse it
    if tokenizer is None:
        raise ValueError(
            "a model is exported with its tokenizer, and this one has none: give the one it was trained with"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: this"
            " is not its tokenizer"
        )
    like_gpt2 = model.config.norm == "layernorm" and model.config.position == "learned"
    return with_biases(model) if like_gpt2 and not model.config.bias else model


# ---- Hugging Face

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
)


@dataclass(frozen=True)
class Card:
    """What a model's card says beside what can be read off the model itself."""

    title: str = "A small language model"
    facts: Mapping[str, str] = field(default_factory=dict)
    """A line each: what it was trained on, what it is for."""
    figures: Sequence[Mapping[str, str]] = ()
    """The rows of a table of what was measured, their keys its heading."""
    sample: str | None = None
    """Text by the model; None lets it write some."""
    license: str | None = None
    """Such as "mit", as the hub spells it; None leaves it open."""


def save_hf_folder(folder: str | Path, model: GPT, tokenizer: Tokenizer, card: Card | None = None) -> Path:
    """Writes a folder that transformers loads with `from_pretrained`, model and tokenizer, and returns it.

    In it: weights in their own type, tokenizer.json for the library `tokenizers`, settings, SmolLM2's chat
    template where the tokenizer has its tokens, and the model's card. A GPT-2 without biases is given biases
    of zero. An earlier export in `folder` is replaced once the new one is whole. Raises ValueError for a GPT
    or a tokenizer without an exact equivalent, and for a folder that holds something else.
    """
    folder, card = Path(folder), card or Card()
    exported = ready_to_export(model, tokenizer)
    hf_config(exported.config)  # or refuse it
    tokens = hf_tokenizer(tokenizer)
    refuse_checkpoint(folder)
    strange = (
        sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
    )
    if strange or folder.is_file():
        raise ValueError(
            f"{folder} holds something else ({', '.join(strange[:3]) or 'it is a file'}): choose a new folder"
        )
    roles = {
        f"{role}_token_id": tokenizer.special_tokens[token]
        for role, token in special_roles(tokenizer).items()
    }
    with checkpoint.whole_folder(folder) as new:
        to_hf(exported, new)
        settings = json.loads((new / "config.json").read_text())
        settings |= roles | {"dtype": str(exported.norm.weight.dtype).removeprefix("torch.")}
        write_json(new / "config.json", settings)
        write_json(new / "generation_config.json", roles)
        write_json(new / "tokenizer.json", tokens)
        write_json(new / "tokenizer_config.json", hf_tokenizer_config(tokenizer, model.config.block_size))
        _write_card(new / "README.md", model, tokenizer, card, folder.name, settings["architectures"][0])
    return folder


def _write_card(
    path: Path, model: GPT, tokenizer: Tokenizer, card: Card, name: str, architecture: str
) -> None:
    config = model.config
    facts = {
        "What": (
            "a language model that goes on with a text. It was made to learn how such models work: do not"
            " rely on what it says"
        ),
        "Architecture": (
            f"{architecture}, {config.n_layer} layers, {config.n_embd} wide, {config.block_size} tokens of"
            " context"
        ),
        "Parameters": f"{model.num_parameters():,}",
        "Tokenizer": f"{tokenizer.vocab_size:,} tokens",
    }
    figures = card.figures or [{"": "parameters", "value": f"{model.num_parameters():,}"}]
    start = next((i for i, token in tokenizer.vocab.items() if token == b"\n"), 0)
    usage = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")  # this folder, or its name on the hub\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'ids = tokenizer({json.dumps(tokenizer.decode([start]))}, return_tensors="pt",'
        " return_token_type_ids=False)\n"
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))"
    )
    model_card(
        path,
        card.title,
        facts | dict(card.facts),
        figures=figures,
        usage=usage,
        sample=card.sample or _sample(model, tokenizer, start),
    )
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"} | (
        {"license": card.license} if card.license else {}
    )
    front = "".join(f"{key}: {value}\n" for key, value in head.items())
    write_atomically(path, f"---\n{front}---\n\n{path.read_text(encoding='utf-8')}")


def _sample(model: GPT, tokenizer: Tokenizer, start: int) -> str:
    return tokenizer.decode(
        [i for i in generate(model, [start], 64, temperature=0.8, seed=1) if i < tokenizer.vocab_size]
    )


def push_to_hub(folder: str | Path, repo_id: str, private: bool = True, api: HfApi | None = None) -> str:
    """Uploads a folder of `save_hf_folder` to the Hugging Face hub as `repo_id` ("someone/my-model"), made if
    needed. Returns its address.

    Only the export's own files are sent. Raises ValueError for a folder that is none, for a repository that
    others can see where `private` was asked for (and the other way round), and where the hub refuses: without
    being logged in, for one.
    """
    folder, api = Path(folder), api or HfApi()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no folder of save_hf_folder: it has no {', '.join(missing)}")
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if api.repo_info(repo_id).private != private:
            raise ValueError(
                f"{repo_id} exists and is {'public' if private else 'private'}, not"
                f" {'private' if private else 'public'} as asked: change it on the hub, or say private="
                + str(not private)
            )
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Model, tokenizer and card",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise ValueError(
            f"the hub did not take {repo_id} ({' '.join(str(error).split())}): log in with `hf auth login`"
        ) from None
    return str(url)
