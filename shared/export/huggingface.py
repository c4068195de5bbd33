"""Week 12. A GPT as a Hugging Face folder, with its tokenizer and a model card, and its upload to the hub.

    save_hf_folder(model, "my-model")      # transformers' from_pretrained, vLLM, and others
    push_to_hub("my-model", "someone/my-model")       # the folder, with its card, to the Hugging Face hub

A GPT becomes a GPT-2, a Llama or a Qwen3 (a Llama with qk_norm). Where none of them is exactly the same
model, the export is refused: the error names the fields in the way, and nothing is written. Source:
transformers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from shared import checkpoint
from shared.export.preparation import ready_to_export
from shared.models.card import model_card
from shared.models.families import hf_config
from shared.models.gpt import GPT
from shared.models.pretrained import refuse_checkpoint, to_hf
from shared.models.tokenizer_writing import hf_tokenizer_config, special_roles
from shared.runtime import read_json, write_atomically, write_json
from shared.sampling.generate import generate
from shared.tokenizers import Tokenizer

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
)
"""The files of an exported folder."""


@dataclass(frozen=True)
class Card:
    """What a model's card says beside what can be read off the model itself."""

    title: str = "A small language model"
    facts: Mapping[str, str] = field(default_factory=dict)
    """A line each: what it was trained on, what it is for."""
    figures: Sequence[Mapping[str, str]] = ()
    """The rows of a table of measurements, their keys its heading."""
    sample: str | None = None
    """Text by the model; None lets it write some."""
    license: str | None = None
    """Such as "mit", as the hub spells it; None leaves it open."""


def save_hf_folder(
    model: GPT, folder: str | Path, tokenizer: Tokenizer | None = None, card: Card | None = None
) -> Path:
    """Writes a folder that transformers loads with `from_pretrained`, model and tokenizer, and returns it.

    It holds the weights in their own type, tokenizer.json for the library `tokenizers`, settings, SmolLM2's
    chat template where the tokenizer has its tokens, and the model's card. A GPT-2 without biases is given
    biases of zero. An earlier export in `folder` is replaced once the new one is complete. Raises ValueError
    for a GPT or a tokenizer without an exact equivalent, and for a folder that holds something else.
    """
    folder = Path(folder)
    exported, tokenizer = ready_to_export(model, tokenizer)
    hf_config(exported.config)  # raises where there is no exact equivalent
    tokenizer_json = tokenizer.to_hf_json()
    refuse_checkpoint(folder)
    _refuse_other_content(folder)
    role_ids = {}
    for role, token in special_roles(tokenizer).items():
        role_ids[f"{role}_token_id"] = tokenizer.special_tokens[token]
    with checkpoint.whole_folder(folder) as new:
        to_hf(exported, new)
        settings = read_json(new / "config.json")
        settings |= role_ids
        settings["dtype"] = str(exported.norm.weight.dtype).removeprefix("torch.")
        write_json(new / "config.json", settings)
        write_json(new / "generation_config.json", role_ids)
        write_json(new / "tokenizer.json", tokenizer_json)
        write_json(new / "tokenizer_config.json", hf_tokenizer_config(tokenizer, model.config.block_size))
        _write_card(
            new / "README.md",
            model,
            tokenizer,
            card or Card(),
            name=folder.name,
            architecture=settings["architectures"][0],
        )
    return folder


def _refuse_other_content(folder: Path) -> None:
    """Raises ValueError for a file, and for a folder with files that are not an export's."""
    if folder.is_file():
        raise ValueError(f"{folder} holds something else (it is a file): choose a new folder")
    if not folder.is_dir():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
    if others:
        raise ValueError(f"{folder} holds something else ({', '.join(others[:3])}): choose a new folder")


def _write_card(
    path: Path, model: GPT, tokenizer: Tokenizer, card: Card, *, name: str, architecture: str
) -> None:
    """The card in Markdown, headed by the metadata that the hub reads. name: what the model is loaded by."""
    config = model.config
    parameters = f"{model.num_parameters():,}"
    facts = {
        "What": (
            "a language model that goes on with a text. It was made to learn how such models work: do not"
            " rely on what it says"
        ),
        "Architecture": (
            f"{architecture}, {config.n_layer} layers, {config.n_embd} wide, {config.block_size} tokens of"
            " context"
        ),
        "Parameters": parameters,
        "Tokenizer": f"{tokenizer.vocab_size:,} tokens",
        **card.facts,
    }
    start = next((i for i, token in tokenizer.vocab.items() if token == b"\n"), 0)
    model_card(
        path,
        card.title,
        facts,
        figures=card.figures or [{"": "parameters", "value": parameters}],
        usage=_usage(name, prompt=tokenizer.decode([start])),
        sample=card.sample or _sample(model, tokenizer, start),
    )
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if card.license:
        metadata["license"] = card.license
    lines = "".join(f"{key}: {value}\n" for key, value in metadata.items())
    write_atomically(path, f"---\n{lines}---\n\n{path.read_text(encoding='utf-8')}")


def _usage(name: str, prompt: str) -> str:
    """Python that loads the model by `name` and goes on with `prompt`."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")  # this folder, or its name on the hub\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'ids = tokenizer({json.dumps(prompt)}, return_tensors="pt", return_token_type_ids=False)\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))"
    )


def _sample(model: GPT, tokenizer: Tokenizer, start: int) -> str:
    """64 tokens by the model, without those that the tokenizer does not know."""
    ids = generate(model, [start], 64, temperature=0.8, seed=1)
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


def push_to_hub(folder: str | Path, repo_id: str, private: bool = True, api: HfApi | None = None) -> str:
    """Uploads a folder of `save_hf_folder` to the Hugging Face hub, and returns its address.

    repo_id: such as "someone/my-model"; the repository is created if needed. Only the export's own files are
    sent. Raises ValueError for a folder that is no export, for a repository that others can see where
    `private` was asked for (and the other way round), and where the hub refuses, such as without a login.
    """
    folder = Path(folder)
    api = api or HfApi()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no folder of save_hf_folder: it has no {', '.join(missing)}")
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if api.repo_info(repo_id).private != private:
            actual, asked = ("public", "private") if private else ("private", "public")
            raise ValueError(
                f"{repo_id} exists and is {actual}, not {asked} as asked: change it on the hub, or say"
                f" private={not private}"
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
