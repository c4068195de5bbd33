"""Tokenizers, models and task files that the tests of zero-shot evaluation share."""

import json
from pathlib import Path

import lm_eval
import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shared.commandline import parse_args
from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers import BPETokenizer
from shared.tokenizers.bpe import END_OF_TEXT, to_printable
from shared.zero_shot.__main__ import Settings
from tests.helpers import shake, synthetic_text
from tests.models.test_gpt import from_gpt2, from_llama

BLOCK, VOCAB = 48, 360
TEXT = synthetic_text(600) + "\n\nQuestion: How do you bake a cake?\nAnswer: Mix the flour, then stir.\n" * 5
TOKENIZER = BPETokenizer.train(TEXT, VOCAB, special_tokens=[END_OF_TEXT])


def same_tokenizer() -> PreTrainedTokenizerFast:
    """TOKENIZER as Hugging Face's class."""
    end = TOKENIZER.special_tokens[END_OF_TEXT]
    theirs = tokenizers.ByteLevelBPETokenizer(
        {END_OF_TEXT if i == end else to_printable(token): i for i, token in TOKENIZER.vocab.items()},
        [(to_printable(a), to_printable(b)) for a, b in TOKENIZER.merges],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=theirs._tokenizer,
        eos_token=END_OF_TEXT,
        model_max_length=BLOCK,
        clean_up_tokenization_spaces=False,
    )


def copy(theirs: nn.Module, rename, config: GPTConfig) -> GPT:
    ours = GPT(config).eval()
    weights = rename(dict(theirs.named_parameters()))
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(weights[name])
    return ours


def gpt2() -> tuple[GPT, nn.Module]:
    sizes = dict(vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=32)
    theirs = shake(
        GPT2LMHeadModel(GPT2Config(n_positions=BLOCK, bos_token_id=None, eos_token_id=None, **sizes))
    )
    return copy(theirs, from_gpt2, GPTConfig(block_size=BLOCK, **sizes)), theirs


def llama() -> tuple[GPT, nn.Module]:
    theirs = shake(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
                max_position_embeddings=BLOCK,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                hidden_size=32,
                intermediate_size=88,
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
            )
        )
    )
    config = GPTConfig(
        vocab_size=VOCAB,
        block_size=BLOCK,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        norm="rmsnorm",
        position="rope",
        mlp="swiglu",
        mlp_hidden=88,
        bias=False,
        tie_weights=False,
    )
    return copy(theirs, from_llama, config), theirs


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def greedy_continuation(model: GPT, ids: list[int], n: int) -> list[int]:
    for _ in range(n):
        with torch.no_grad():
            ids = [*ids, model(torch.tensor([ids]))[0, -1].argmax().item()]
    return ids[-n:]


def one_token(model: nn.Module, ids: list[int] | Tensor) -> tuple[float, bool]:
    """The plain way: the log-probability of the last id, and whether it is the likeliest."""
    with torch.no_grad():
        logits = model(torch.as_tensor(ids)[None, :-1])[0, -1].double()
    return logits.log_softmax(-1)[ids[-1]].item(), logits.argmax().item() == ids[-1]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def hellaswag_rows() -> list[dict]:
    words = TEXT.split(" ")
    rows = [
        {
            "ind": i,
            "activity_label": ["Baking a cake", "Home [and] Garden"][i % 2],
            "ctx_a": " ".join(words[i : i + 4]) + " [title] How to MIX.",
            "ctx_b": ["", "the BAKER  then", "[step] stir"][i % 3],
            "label": i % 4,
            "endings": [
                f"{'[substeps] ' * (k == 2)}{' '.join(words[i + 9 * k : i + 9 * k + 2 + k % 2])} [title]"
                " Stir.  "
                for k in range(4)
            ],
        }
        for i in range(40)
    ]
    rows[3]["endings"][1] = " [step] "  # nothing is left of it
    rows[4]["endings"][0], rows[5]["endings"][0] = "Stir [title]", " Stir [title]Mix  it   well"
    return rows


def settings(*flags: str) -> Settings:
    return parse_args(Settings, ["--device", "cpu", *flags])


def piqa_rows() -> list[dict]:
    words = TEXT.split(" ")
    rows = [
        {
            "goal": " ".join(words[9 * i : 9 * i + 3]),
            "sol1": " ".join(words[9 * i + 3 : 9 * i + 4 + i % 3]),
            "sol2": " ".join(words[9 * i + 5 : 9 * i + 7]),
        }
        for i in range(30)
    ]
    return [
        *rows,
        {"goal": "Bake ", "sol1": " Mix  it ", "sol2": "Bär"},
        {"goal": "'a' \"b\" {c}", "sol1": "\\n", "sol2": "x\ny"},
    ]


YAML = {
    "lambada": ("lambada/lambada_openai", "test"),
    "piqa": ("piqa/piqa", "validation"),
    "hellaswag": ("hellaswag/hellaswag", "validation"),
}


def by_lm_eval(adapter: LM, task: str, path: Path) -> dict:
    """The task as lm-eval defines it, but on a local file."""
    yaml, split = YAML[task]
    data = {"data_files": {split: str(path)}, "cache_dir": str(path.parent / "cache")}
    include = str(Path(lm_eval.__file__).parent / "tasks" / f"{yaml}.yaml")
    local = {
        "task": "local",
        "include": include,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": data,
        "training_split": None,
    }
    (path.parent / "local.yaml").write_text(json.dumps(local))  # JSON is YAML
    tasks = TaskManager(include_path=path.parent, include_defaults=False)
    return lm_eval.simple_evaluate(
        model=adapter, tasks=["local"], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
