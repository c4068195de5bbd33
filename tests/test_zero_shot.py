"""shared/zero_shot.py against lm-eval with Hugging Face's models, and against a slow computation of one token
at a time.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shared import checkpoint, zero_shot
from shared.assets import cached
from shared.commandline import parse_args
from shared.evaluation import evaluate
from shared.models.bigram import BigramModel, count_bigrams
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import load_smollm2, to_hf
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer, CharTokenizer
from shared.tokenizers.bpe import END_OF_TEXT, to_printable
from shared.zero_shot import (
    Example,
    Likelihood,
    LMEvalAdapter,
    Record,
    Result,
    Settings,
    encode_pair,
    load_task,
    loglikelihoods,
    main,
    read_hellaswag,
    read_lambada,
    read_piqa,
    run_task,
    score_tokens,
    sliding_window,
)
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


@pytest.fixture(scope="module", params=[gpt2, llama], ids=["GPT-2", "Llama"])
def pair(request) -> tuple[GPT, HFLM]:
    """A random model of ours, and lm-eval's own wrapper round the same one of Hugging Face's."""
    ours, theirs = request.param()
    return ours, HFLM(pretrained=theirs, tokenizer=same_tokenizer(), batch_size=3, max_length=BLOCK)


@pytest.fixture(scope="module")
def model() -> GPT:
    return gpt2()[0]


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


PAIRS = [
    ("Question: How do you bake a cake?\nAnswer:", " Mix the flour"),
    ("Question: How do you bake a cake?\nAnswer: ", "Mix the flour"),  # the space moves over
    ("Mix the \n  ", "  flour"),
    ("M", "ix"),
    ("", "Mix the flour, then stir."),
    ("Der Bär", " läuft 😀 über die Brücke"),
    (TEXT[:300], " the end"),  # longer than the block
    ("a", " " + TEXT[:60]),
]


# ---- log-likelihoods


def test_the_two_tokenizers_are_the_same_one():
    theirs = same_tokenizer()
    for text in [TEXT, *(context + continuation for context, continuation in PAIRS)]:
        assert TOKENIZER.encode(text) == theirs.encode(text)
    assert theirs.eos_token_id == TOKENIZER.special_tokens[END_OF_TEXT]


@pytest.mark.parametrize("context, continuation", [p for p in PAIRS if p[0].strip()])
def test_a_pair_is_cut_where_lm_eval_cuts_it(context, continuation, model):
    assert encode_pair(TOKENIZER, context, continuation) == LMEvalAdapter(model, TOKENIZER)._encode_pair(
        context, continuation
    )


def test_log_likelihoods_equal_lm_evals(pair):
    ours, theirs = pair
    expected = theirs.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    got = loglikelihoods(ours, TOKENIZER, PAIRS)
    adapted = LMEvalAdapter(ours, TOKENIZER).loglikelihood(
        requests("loglikelihood", *PAIRS), disable_tqdm=True
    )
    assert [g.loglikelihood for g in got] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert [g.greedy for g in got] == [e[1] for e in expected]
    assert adapted == got


def greedy_continuation(model: GPT, ids: list[int], n: int) -> list[int]:
    for _ in range(n):
        with torch.no_grad():
            ids = [*ids, model(torch.tensor([ids]))[0, -1].argmax().item()]
    return ids[-n:]


def test_greedy_flags_equal_lm_evals(pair):
    """Continuations that the model would write itself, and the same with one token changed."""
    ours, theirs = pair
    drawn = torch.Generator().manual_seed(0)
    tokens = []
    for n in range(1, 9):
        context = torch.randint(VOCAB, (3 * n,), generator=drawn).tolist()
        greedy = greedy_continuation(ours, context, n)
        other = list(greedy)
        other[n // 2] = (other[n // 2] + 1) % VOCAB
        tokens += [(("", ""), context, greedy), (("", ""), context, other)]
    got = LMEvalAdapter(ours, TOKENIZER)._loglikelihood_tokens(tokens, disable_tqdm=True)
    expected = theirs._loglikelihood_tokens(tokens, disable_tqdm=True)
    assert [g.greedy for g in got] == [e[1] for e in expected] == [True, False] * 8
    assert [g.loglikelihood for g in got] == pytest.approx([e[0] for e in expected], abs=1e-4)


def one_token(model: nn.Module, ids: list[int] | Tensor) -> tuple[float, bool]:
    """The plain way: the log-probability of the last id, and whether it is the likeliest."""
    with torch.no_grad():
        logits = model(torch.as_tensor(ids)[None, :-1])[0, -1].double()
    return logits.log_softmax(-1)[ids[-1]].item(), logits.argmax().item() == ids[-1]


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("max_tokens", [1, 50, 10**6])
def test_scores_are_those_of_one_token_at_a_time_however_texts_are_batched(
    model, monkeypatch, chunk, max_tokens
):
    monkeypatch.setattr(zero_shot, "CHUNK", chunk)
    random = np.random.default_rng(0)
    rows = [
        (random.integers(0, VOCAB, length).tolist(), n)
        for length, n in [(5, 1), (40, 39), (2, 1), (17, 4), (40, 10), (5, 4), (49, 20)]
    ]
    rows.append((greedy_continuation(model, [1], 7), 3))
    for (ids, n), (logprobs, greedy) in zip(rows, score_tokens(model, rows, max_tokens), strict=True):
        expected = [one_token(model, ids[: end + 1]) for end in range(len(ids) - n, len(ids))]
        assert logprobs.tolist() == pytest.approx([e[0] for e in expected], abs=1e-4)
        assert greedy.tolist() == [e[1] for e in expected]


def test_in_bf16_the_probabilities_are_worked_out_in_fp32():
    model, ids = gpt2()[0].to(torch.bfloat16), [3, 1, 4, 1, 5]
    ((logprobs, _),) = score_tokens(model, [(ids, 4)])
    assert logprobs.dtype == torch.float32
    assert logprobs.tolist() == pytest.approx(
        [one_token(model, ids[: end + 1])[0] for end in range(1, 5)], abs=0.05
    )
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0].float()
    torch.testing.assert_close(
        logprobs, logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    )


@pytest.mark.parametrize("max_tokens", [64, 200])
def test_a_forward_pass_holds_at_most_max_tokens(model, max_tokens):
    sizes = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    score_tokens(model, [(list(range(2, 2 + n)), 1) for n in range(2, 49)], max_tokens)
    handle.remove()
    assert max(sizes) <= max_tokens and sum(sizes) >= sum(range(1, 48)) and len(sizes) < 47


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_scored_in_eval_mode_and_comes_back_as_it_was(training):
    torch.manual_seed(0)
    model = shake(
        GPT(GPTConfig(vocab_size=VOCAB, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    ).train(training)
    first = loglikelihoods(model, TOKENIZER, [("Mix", " the flour")])
    assert loglikelihoods(model, TOKENIZER, [("Mix", " the flour")]) == first and model.training == training
    with pytest.raises(ValueError, match="max_tokens=0: must be at least 1"):
        score_tokens(model, [], 0)


def test_a_context_that_is_too_long_loses_its_beginning(model):
    ids = TOKENIZER.encode(TEXT)[: BLOCK + 20]
    context, continuation = TOKENIZER.decode(ids[:-1]), TOKENIZER.decode(ids[-1:])
    assert encode_pair(TOKENIZER, context, continuation) == (ids[:-1], ids[-1:])
    (score,) = loglikelihoods(model, TOKENIZER, [(context, continuation)])
    assert score.loglikelihood == pytest.approx(one_token(model, ids[-BLOCK - 1 :])[0], abs=1e-5)


@pytest.mark.parametrize(
    "tokenizer, context, continuation, message",
    [
        (
            TOKENIZER,
            "Mix",
            " " + TEXT[:400],
            r"a continuation of \d+ tokens does not fit in the model's block_size=48",
        ),
        (TOKENIZER, "Mix", "", "need at least one token each"),
        (CharTokenizer("abc"), " ", "abc", "no <|endoftext|>: give a context"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, tokenizer, context, continuation, message):
    with pytest.raises(ValueError, match=message):
        loglikelihoods(model, tokenizer, [(context, continuation)])


# ---- the adapter


def test_the_adapter_is_a_model_of_lm_evals(model):
    adapter = LMEvalAdapter(model, TOKENIZER)
    assert (
        isinstance(adapter, LM)
        and adapter.eot_token_id == adapter.prefix_token_id == TOKENIZER.special_tokens[END_OF_TEXT]
    )


def test_rolling_log_likelihoods_equal_lm_evals(pair):
    ours, theirs = pair
    texts = [
        ("Mix",),
        (TEXT[:1000],),
        ("Mix the flour. " * 3,),
        (TOKENIZER.decode(TOKENIZER.encode(TEXT)[: 2 * BLOCK]),),
    ]
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    got = LMEvalAdapter(ours, TOKENIZER).loglikelihood_rolling(
        requests("loglikelihood_rolling", *texts), disable_tqdm=True
    )
    assert got == pytest.approx(expected, rel=1e-5)


def test_what_the_adapter_writes_is_what_lm_evals_writes(pair):
    ours, theirs = pair
    ascii = "Mix the flour, then stir."
    (whole,) = theirs.generate_until(
        requests("generate_until", (ascii, {"until": [], "max_gen_toks": 20, "do_sample": False})),
        disable_tqdm=True,
    )
    asked = [
        {"until": [], "max_gen_toks": 20},
        {"until": [whole[5:7], "never"], "max_gen_toks": 20},
        {"until": whole[9], "max_gen_toks": 12},
    ]
    for context in (ascii, TEXT[:300]):
        for settings in asked:
            request = requests("generate_until", (context, settings | {"do_sample": False}))
            adapter = LMEvalAdapter(ours, TOKENIZER)
            assert adapter.generate_until(request, disable_tqdm=True) == theirs.generate_until(
                request, disable_tqdm=True
            )
    with pytest.raises(ValueError, match="max_gen_toks=48 leaves no room for a prompt in block_size=48"):
        adapter.generate_until(requests("generate_until", (ascii, {"max_gen_toks": 48})), disable_tqdm=True)


def test_writing_ends_at_a_special_token():
    ids = TOKENIZER.encode(f"Mix the flour.{END_OF_TEXT}Mix the flour.", allowed_special="all")
    model = BigramModel.from_counts(count_bigrams(np.array(ids), VOCAB))
    (text,) = LMEvalAdapter(model, TOKENIZER).generate_until(
        requests("generate_until", ("Mi", {"until": []})), disable_tqdm=True
    )
    assert text == "x the flour."


def test_all_but_the_adapter_works_without_lm_eval():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from shared.zero_shot import LMEvalAdapter, loglikelihoods\n"
        "from shared.models.gpt import GPT, GPTConfig\nfrom shared.tokenizers import CharTokenizer\n"
        "model, tokenizer = GPT(GPTConfig.preset('nano', vocab_size=2)), CharTokenizer('ab')\n"
        "print(len(loglikelihoods(model, tokenizer, [('a', 'b')])))\nLMEvalAdapter(model, tokenizer)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n"
    assert (
        done.stderr.splitlines()[-1]
        == "ValueError: LMEvalAdapter needs the package lm-eval: pip install lm-eval==0.4.13"
    )


# ---- the tasks


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def wide() -> GPT:
    """With room for the real files' longest texts."""
    return shake(GPT(GPTConfig(vocab_size=VOCAB, block_size=4096, n_layer=1, n_head=2, n_embd=16)))


def lambada_rows(model: GPT) -> list[dict]:
    """Passages, every second one of which ends as the model would end it, where that is a word."""
    rows, words = [], TEXT.split(" ")
    for i in range(60):
        context = " ".join(words[7 * i : 7 * i + 5])
        guess = TOKENIZER.decode(greedy_continuation(model, TOKENIZER.encode(context), 1))
        good = i % 2 and guess.startswith(" ") and len(guess) > 1 and " " not in guess[1:]
        rows.append({"text": context + (guess if good else "  word")})
    return [*rows, {"text": "“A line\u2028separator”  and\n\ntwo  spaces   Bär"}]


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


class Files:
    """A task's files, and where lm-eval finds the same examples."""

    def __init__(self, task: str, folder: Path, model: GPT, real: bool):
        self.task, self.real = task, real
        self.theirs = folder / f"{task}.jsonl"
        if task == "lambada":
            path = cached("lambada") if real else write_lines(self.theirs, lambada_rows(model))
            self.read = lambda: read_lambada(path)
            write_lines(
                self.theirs,
                [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line][:200],
            )
        elif task == "piqa":
            path = cached("piqa") if real else write_lines(folder / "piqa_valid.jsonl", piqa_rows())
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            labels = cached("piqa-labels") if real else folder / "labels.lst"
            if not real:
                labels.write_text("".join(f"{i % 2}\n" for i in range(len(rows))))
            gold = [int(label) for label in labels.read_text().split()]
            self.read = lambda: read_piqa(path, labels)
            write_lines(
                self.theirs, [row | {"label": label} for row, label in zip(rows, gold, strict=True)][:200]
            )
        else:
            path = write_lines(self.theirs, hellaswag_rows())
            self.read = lambda: read_hellaswag(path)


REAL = [
    (task, True) for task in ("lambada", "piqa") if cached(task)
]  # where they are not there, the made ones remain


@pytest.fixture(
    params=[("lambada", False), ("piqa", False), ("hellaswag", False), *REAL],
    ids=lambda p: f"{p[0]}-{'real' if p[1] else 'made'}",
)
def files(request, tmp_path, wide) -> Files:
    return Files(request.param[0], tmp_path, wide, real=request.param[1])


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


def test_our_scorer_and_lm_eval_agree_on_every_example(files, wide):
    examples = files.read()[:200]
    result = run_task(wide, TOKENIZER, files.task, examples)
    theirs = by_lm_eval(LMEvalAdapter(wide, TOKENIZER), files.task, files.theirs)
    samples = sorted(theirs["samples"]["local"], key=lambda s: s["doc_id"])
    assert len(samples) == len(result.records) == len(examples) > 20
    for record, sample in zip(result.records, samples):
        assert sample["arguments"] == [
            (record.example.context, " " + choice) for choice in record.example.choices
        ]
        assert [s.loglikelihood for s in record.scores] == [float(r[0]) for r in sample["filtered_resps"]]
        assert record.right == {metric: sample[metric] for metric in record.right}
    for metric, value in result.metrics.items():
        assert value == pytest.approx(theirs["results"]["local"][f"{metric},none"], rel=1e-9)
    for metric, error in result.standard_errors.items():
        assert error == pytest.approx(mean_stderr([s[metric] for s in samples]), rel=1e-9)
    if (
        files.task != "lambada" or not files.real
    ):  # our little tokenizer cuts a real last word into many tokens
        assert 0 < result.metrics["acc"] < 1  # the comparison is worth something


EASY = [
    (
        "How do you boil an egg?",
        "Put it in boiling water for ten minutes.",
        "Put it in a frozen river for ten minutes.",
    ),
    ("How do you open a locked door?", "Turn the key in the lock.", "Turn the soup in the lock."),
    ("How do you dry wet hair?", "Use a hair dryer.", "Use a garden hose."),
    ("How do you cut a piece of paper?", "Use a pair of scissors.", "Use a bowl of soup."),
    ("How do you keep milk fresh?", "Store it in the refrigerator.", "Store it in the oven."),
    ("How do you clean a dirty window?", "Wipe it with a wet cloth.", "Wipe it with a muddy shoe."),
]


def test_on_a_real_model_too_and_it_knows_something(tmp_path):
    model, tokenizer = load_smollm2()
    rows = [{"goal": goal, "sol1": right, "sol2": wrong} for goal, right, wrong in EASY]
    (tmp_path / "labels.lst").write_text("0\n" * len(EASY))
    result = run_task(
        model,
        tokenizer,
        "piqa",
        read_piqa(write_lines(tmp_path / "easy.jsonl", rows), tmp_path / "labels.lst"),
    )
    theirs = by_lm_eval(
        LMEvalAdapter(model, tokenizer),
        "piqa",
        write_lines(tmp_path / "theirs.jsonl", [row | {"label": 0} for row in rows]),
    )
    samples = sorted(theirs["samples"]["local"], key=lambda s: s["doc_id"])
    assert [r.right for r in result.records] == [
        {"acc": s["acc"], "acc_norm": s["acc_norm"]} for s in samples
    ]
    assert [list(map(tuple, r.scores)) for r in result.records] == [
        [tuple(x) for x in s["filtered_resps"]] for s in samples
    ]
    assert result.metrics["acc"] == 1.0


LIKELY = (Likelihood(-4.0, False), Likelihood(-5.0, True), Likelihood(-9.0, False))


@pytest.mark.parametrize(
    "choices, scores, gold, right",
    [
        (("a",), LIKELY[:1], 0, {"acc": False}),
        (("a",), LIKELY[1:2], 0, {"acc": True}),
        (
            ("ab", "abcdefgh", "abc"),
            LIKELY,
            0,
            {"acc": True, "acc_norm": False},
        ),  # -2, -0.625 and -3 a character
        (("ab", "abcdefgh", "abc"), LIKELY, 1, {"acc": False, "acc_norm": True}),
        (
            ("ab", "äöüßäöü", "abcdefghijklmn"),
            LIKELY,
            1,
            {"acc": False, "acc_norm": False},
        ),  # characters, not bytes: -0.71 and -0.64
        (("", "b", "c"), LIKELY, 0, {"acc": True, "acc_norm": False}),
        (("a", "b", "c"), LIKELY[:1] * 3, 0, {"acc": True, "acc_norm": True}),  # of equals the first
    ],
)
def test_what_counts_as_right(choices, scores, gold, right):
    assert Record(Example("", choices, gold), scores).right == right


def test_a_tasks_accuracy_perplexity_and_standard_error():
    scores = [
        Likelihood(-1.0, True),
        Likelihood(-2.0, False),
        Likelihood(-6.0, False),
        Likelihood(-3.0, True),
    ]
    result = Result("lambada", tuple(Record(Example("a", ("b",)), (s,)) for s in scores), 1.0)
    assert result.metrics == {"acc": 0.5, "perplexity": pytest.approx(math.exp(3))}
    assert result.standard_errors == {"acc": pytest.approx(math.sqrt(0.25 / 3))}
    assert math.isnan(Result("lambada", result.records[:1], 1.0).standard_errors["acc"])
    with pytest.raises(ValueError, match="lambada: no examples to score"):
        run_task(nn.Module(), TOKENIZER, "lambada", [])


GOOD = {
    "lambada": {"text": "the last word"},
    "piqa": {"goal": "bake", "sol1": "mix", "sol2": "stir"},
    "hellaswag": {"activity_label": "Baking", "ctx_a": "A", "ctx_b": "b", "endings": ["c", "d"], "label": 1},
}
READ = {
    "lambada": read_lambada,
    "piqa": lambda path: read_piqa(path, path.with_name("labels.lst")),
    "hellaswag": read_hellaswag,
}


@pytest.mark.parametrize("task", READ)
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda line: line[: len(line) // 2], "not a line of JSON, the file is cut or damaged"),
        (lambda line: b"\xff" + line, "not a line of JSON.*decode"),
        (lambda line: b"", "not a line of JSON"),
        (lambda line: b"[" + line + b"]", "expected an object with"),
        (lambda line: b"{}", "missing or of another kind"),
        (
            lambda line: line.replace(b'": "', b'": 3, "x": "'),
            "missing or of another kind: expected an object with",
        ),
    ],
    ids=["cut", "not UTF-8", "empty", "a list", "no fields", "numbers for texts"],
)
def test_a_damaged_line_is_named(tmp_path, task, damage, message):
    line = json.dumps(GOOD[task]).encode()
    (tmp_path / "labels.lst").write_text("0\n0\n1\n")
    path = tmp_path / "data.jsonl"
    path.write_bytes(line + b"\r\n" + line + b"\n" + line)
    assert len(READ[task](path)) == 3
    path.write_bytes(line + b"\n" + damage(line) + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 2: .*{message}"):
        READ[task](path)


@pytest.mark.parametrize(
    "task, change, message",
    [
        (
            "lambada",
            {"text": "word"},
            "line 1: expected a text that ends in a space and its last word, not 'word'",
        ),
        ("lambada", {"text": "cut off "}, "line 1: expected a text that ends"),
        ("hellaswag", {"endings": []}, "line 1: 'endings' must be a list of texts"),
        ("hellaswag", {"endings": ["a", 2]}, "line 1: 'endings' must be a list of texts"),
        ("hellaswag", {"label": 2}, "line 1: label '2' is not the number of one of 2 endings"),
        ("hellaswag", {"label": ""}, "line 1: label '' is not the number"),
        ("hellaswag", {"label": -1}, "line 1: label '-1' is not the number"),
        ("hellaswag", {"label": True}, "line 1: label 'True' is not the number"),
    ],
)
def test_a_line_that_makes_no_example_is_named(tmp_path, task, change, message):
    path = write_lines(tmp_path / "data.jsonl", [GOOD[task] | change])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, {message}"):
        READ[task](path)


@pytest.mark.parametrize(
    "labels, message",
    [
        ("0\n2\n", "line 2: expected 0 or 1, not '2'"),
        ("0\n", r"ends at line 1, but .*data.jsonl has 2 lines"),
    ],
)
def test_wrong_labels_are_named(tmp_path, labels, message):
    path = write_lines(tmp_path / "data.jsonl", [GOOD["piqa"]] * 2)
    (tmp_path / "labels.lst").write_text(labels)
    with pytest.raises(ValueError, match=rf"labels.lst,? {message}"):
        READ["piqa"](path)


@pytest.mark.parametrize("task", READ)
def test_a_missing_file_is_named(tmp_path, task):
    with pytest.raises(ValueError, match=r"data.jsonl: No such file"):
        READ[task](tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    "task, message",
    [
        ("hellaswag", "not fetched for you: download https.* --hellaswag FILE"),
        ("arc", "no task is called 'arc'"),
    ],
)
def test_a_task_that_cannot_be_had_is_refused(task, message):
    with pytest.raises(ValueError, match=message):
        load_task(task)


# ---- a long text


CHARS = CharTokenizer.train(TEXT + "Bär")


@pytest.fixture(scope="module")
def by_characters() -> GPT:
    return shake(GPT(GPTConfig(vocab_size=CHARS.vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=16)))


@pytest.mark.parametrize(
    "length, block_size, stride",
    [(100, 16, 1), (100, 16, 5), (100, 16, 15), (100, 16, 16), (17, 16, 4), (2, 16, 16), (40, 3, 2)],
)
def test_a_sliding_window_scores_each_token_once_with_enough_before_it(
    by_characters, length, block_size, stride
):
    text = "Bär " + TEXT[: length - 4] if length > 4 else TEXT[:length]
    ids = CHARS.encode(text)
    expected = []
    for i in range(1, length):
        begin = max(
            0, math.ceil((i - block_size) / stride) * stride
        )  # of the first window that reaches token i
        assert min(i, block_size - stride + 1) <= i - begin <= block_size
        expected.append(one_token(by_characters, ids[begin : i + 1]))
    loss = -sum(e[0] for e in expected) / len(expected)
    for max_tokens in (1, 100):
        result = sliding_window(by_characters, CHARS, text, stride, block_size, max_tokens)
        assert result.loss == pytest.approx(loss, rel=1e-5) and result.perplexity == pytest.approx(
            math.exp(loss), rel=1e-4
        )
        assert result.bits_per_byte == pytest.approx(
            loss * (length - 1) / math.log(2) / len(text[1:].encode()), rel=1e-5
        )
        assert (
            result.accuracy == pytest.approx(sum(e[1] for e in expected) / len(expected))
            and result.tokens == length - 1
        )


def test_with_a_stride_of_a_whole_block_it_is_evaluate(by_characters):
    text = TEXT[: 16 * 20 + 1]
    tokens = np.array(CHARS.encode(text), dtype=np.uint16)
    expected = evaluate(
        by_characters, tokens, 16, torch.tensor([len(CHARS.vocab[i]) for i in range(CHARS.vocab_size)])
    )
    got = sliding_window(by_characters, CHARS, text, stride=16)
    assert (
        got.as_metrics() == pytest.approx(expected.as_metrics(), rel=1e-5) and got.tokens == expected.tokens
    )
    assert sliding_window(by_characters, CHARS, text, stride=4).loss != pytest.approx(got.loss, rel=1e-3)


@pytest.mark.parametrize("stride, block_size", [(1, 1), (7, 7), (3, 50), (64, 64), (10**4, None)])
def test_a_model_that_sees_one_token_only_does_not_care_for_the_window(stride, block_size):
    tokens = np.array(CHARS.encode(TEXT), dtype=np.uint16)
    model = BigramModel.from_counts(count_bigrams(tokens[:500], CHARS.vocab_size))
    expected = evaluate(
        model, tokens, len(tokens) - 1, torch.tensor([len(CHARS.vocab[i]) for i in range(CHARS.vocab_size)])
    )
    got = sliding_window(model, CHARS, TEXT, stride, block_size)
    assert (
        got.as_metrics() == pytest.approx(expected.as_metrics(), rel=1e-5) and got.tokens == expected.tokens
    )


@pytest.mark.parametrize(
    "text, stride, block_size, message",
    [
        ("abc", 0, None, "stride=0: must be from 1 .* to block_size=16"),
        ("abc", 17, None, "stride=17: must be"),
        ("abc", 9, 8, "stride=9: must be from 1 .* to block_size=8"),
        ("abc", 1, 17, "block_size=17: must be from 1 to the model's 16"),
        ("abc", 1, 0, "block_size=0: must be"),
        ("a", 1, None, "the text has 1 tokens: at least 2 are needed"),
        ("", 1, None, "the text has 0 tokens"),
    ],
)
def test_a_window_that_cannot_be_is_refused(by_characters, text, stride, block_size, message):
    with pytest.raises(ValueError, match=message):
        sliding_window(by_characters, CHARS, text, stride, block_size)


# ---- the command line


def settings(*flags: str) -> Settings:
    return parse_args(Settings, ["--device", "cpu", *flags])


def as_checkpoint(model: GPT, folder: Path) -> None:
    checkpoint.save(folder, model, TOKENIZER)


def as_hugging_faces(model: GPT, folder: Path) -> None:
    to_hf(model, folder)
    same_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("save", [as_checkpoint, as_hugging_faces])
def test_the_command_line_prints_a_table(tmp_path, model, capsys, save):
    folder = tmp_path / "gpt"
    save(model, folder)
    path = write_lines(tmp_path / "hellaswag_val.jsonl", hellaswag_rows())
    (result,) = main(
        settings("--model", str(folder), "--tasks", "hellaswag", "--hellaswag", str(path), "--limit", "7")
    )
    assert result.records == run_task(model, TOKENIZER, "hellaswag", read_hellaswag(path)[:7]).records
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[1] == ["task", "metric", "value", "standard", "error", "examples", "seconds"]
    for line, metric in zip(printed[2:], ("acc", "acc_norm"), strict=True):
        assert line[:2] == ["hellaswag", metric] and line[4] == "7"
        assert float(line[2]) == pytest.approx(result.metrics[metric], rel=1e-3)
        assert float(line[3]) == pytest.approx(result.standard_errors[metric], rel=1e-3)


@pytest.mark.parametrize(
    "save", [checkpoint.save, lambda folder, model: to_hf(model, folder)], ids=["ours", "Hugging Face's"]
)
def test_a_model_without_a_tokenizer_is_refused(tmp_path, model, save):
    save(tmp_path / "gpt", model)
    path = write_lines(tmp_path / "hellaswag_val.jsonl", hellaswag_rows())
    with pytest.raises(ValueError, match="gpt comes without a tokenizer of ours"):
        main(settings("--model", str(tmp_path / "gpt"), "--tasks", "hellaswag", "--hellaswag", str(path)))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--limit", "0"], "limit=0: must be at least 1"),
        (["--max-tokens", "0"], "max_tokens=0: must be at least 1"),
        (["--tasks", "arc"], "arc"),
    ],
)
def test_a_setting_out_of_range_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        settings("--model", "smollm2", *flags)


def test_a_mistake_on_the_command_line_is_one_line():
    command = [sys.executable, "-m", "shared.zero_shot", "--model", "smollm2", "--tasks", "hellaswag"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: hellaswag is not fetched for you")
        and done.stderr.count("\n") == 1
    )
