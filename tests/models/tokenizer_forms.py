"""Small tokenizers of the forms that today's families have, made with Hugging Face's library `tokenizers`.

Each has the sections of a real tokenizer.json, with a vocabulary of a few hundred tokens.
"""

import json
import random
from functools import cache

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tests.helpers import fuzz, synthetic_text

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
TEXT = [
    line + "."
    for line in (
        synthetic_text() + "12 123 1234 don't I'LL we've \u00e9\u00e0 naïve 中文字 мир  <b> </b>"
    ).split(".")
]


def added(token: str, i: int, special: bool = True, **flags) -> dict:
    """As tokenizer.json lists an added token."""
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {"id": i, "content": token, **plain, "special": special, **flags}


def template(token: str, i: int) -> dict:
    """A post_processor that puts a token before every text."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    own = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": own}


def metaspace(scheme: str, split: bool) -> dict:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


@cache
def _merged_bytes(split: str) -> str:
    made = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    return made.to_str()


def byte_level(split: str, special=(), plain=(), *, isolated=True, **sections) -> dict:
    """A byte-level tokenizer.json; special and plain tokens follow the vocabulary."""
    values = json.loads(_merged_bytes(split))
    how = {"behavior": "Isolated", "invert": False} if isolated else {"behavior": "Removed", "invert": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cuts = [{"type": "Split", "pattern": {"Regex": split}, **how}, {**level, "use_regex": False}]
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": cuts}
    values["decoder"] = {**level, "use_regex": True}
    size = len(values["model"]["vocab"])
    values["added_tokens"] = [added(token, size + i) for i, token in enumerate(special)]
    values["added_tokens"] += [added(token, size + len(special) + i, False) for i, token in enumerate(plain)]
    values["model"] |= sections.pop("model", {})
    return values | sections


def llama3() -> dict:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    values = byte_level(LLAMA3_SPLIT, special, model={"ignore_merges": True})
    vocab = values["model"]["vocab"]
    for token in ("Ġunmerged", "xyzzy", "Ġ12"):  # to which no merges lead
        vocab[token] = len(vocab)
    for token in values["added_tokens"]:
        token["id"] += 3
    offsets = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    first = template(special[0], len(vocab))
    return values | {"post_processor": {"type": "Sequence", "processors": [offsets, first]}}


def qwen() -> dict:
    return byte_level(
        QWEN2_SPLIT,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>", "<think>"],
        normalizer={"type": "NFC"},
        model={"continuing_subword_prefix": "", "end_of_word_suffix": ""},
    )


@cache
def _merged_characters() -> str:
    """The <unk> <s> </s>, 256 bytes and characters of Llama 2, learned from lines that are one piece each."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=first, initial_alphabet=[SPACE], limit_alphabet=60, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made.to_str()


def sentencepiece(prefix: bool, special=(), plain=(), **sections) -> dict:
    """A tokenizer.json with byte fallback. prefix: whether its decoder takes a space off."""
    values = json.loads(_merged_characters())
    size = len(values["model"]["vocab"])
    values["added_tokens"] = [added(token, i) for i, token in enumerate(("<unk>", "<s>", "</s>"))]
    values["added_tokens"] += [added(token, size + i) for i, token in enumerate(special)]
    values["added_tokens"] += [added(token, size + len(special) + i, False) for i, token in enumerate(plain)]
    replaced = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    steps = [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}] + ([STRIP] if prefix else [])
    values["decoder"] = {"type": "Sequence", "decoders": steps}
    values["post_processor"] = template("<s>", 1)
    return values | {"normalizer": None, "pre_tokenizer": None} | sections


LLAMA2 = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}


def phi3() -> dict:
    values = sentencepiece(True, ["<|user|>", "<|end|>"], normalizer=LLAMA2)
    for token in values["added_tokens"]:
        token["rstrip"] = token["content"] in ("</s>", "<|user|>", "<|end|>")
    return values


def gemma() -> dict:
    runs = ["\n\n", "\n\n\n", "\t\t", SPACE * 2, SPACE * 4, "<b>", "</b>", "[multimodal]"]
    values = sentencepiece(
        False, ["<start_of_turn>", "<end_of_turn>"], runs, normalizer=REPLACE, pre_tokenizer=AT_SPACES
    )
    vocab = values["model"]["vocab"]
    vocab |= {token["content"]: token["id"] for token in values["added_tokens"]}
    values["model"]["merges"] += [[SPACE, SPACE], [SPACE * 2, SPACE * 2], ["<", "b"]]
    vocab["<b"] = len(vocab)
    return values


def mask() -> dict:
    values = byte_level(LLAMA3_SPLIT, ["<mask>", "<s>"])
    values["added_tokens"][0]["lstrip"] = True
    return values


FORMS = {
    "Llama 3": llama3,
    "Qwen": qwen,
    "OLMo 2": lambda: byte_level(LLAMA3_SPLIT, ["<|endoftext|>"], ["|||EMAIL|||"], isolated=False),
    "GPT-4o": lambda: byte_level(GPT4O_SPLIT, ["<|endoftext|>"]),
    "a pattern with gaps": lambda: byte_level(r"\p{L}+|\d{1,2}(?=x)", ["<|endoftext|>"]),
    "a token that takes the space before it": mask,
    "Llama 2": lambda: sentencepiece(True, normalizer=LLAMA2),
    "Mistral": lambda: sentencepiece(True, ["[INST]", "[/INST]"], pre_tokenizer=metaspace("first", False)),
    "a space before every part": lambda: sentencepiece(True, pre_tokenizer=metaspace("always", False)),
    "every space by itself": lambda: sentencepiece(False, pre_tokenizer=metaspace("never", True)),
    "Phi-3": phi3,
    "Gemma": gemma,
}


def theirs_of(values: dict) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def texts_with_tokens(values: dict, count: int, seed: int) -> list[str]:
    """Random strings, in every other one special and added tokens, and parts of them."""
    draw = random.Random(seed)
    tokens = [token["content"] for token in values["added_tokens"]] + [SPACE, "<0x0A>", "ba<", "ıſ'ſ"]
    texts = fuzz(count, seed)
    for at in range(0, count, 2):
        text = texts[at]
        cut = draw.randint(0, len(text))
        middle = "".join(draw.choices([*tokens, " ", "\n", text[:3]], k=draw.randint(1, 3)))
        texts[at] = text[:cut] + middle + text[cut:]
    return texts
