"""shared/zero_shot/tasks.py against lm-eval's own tasks, and damaged files."""

import json
import math
import re
from pathlib import Path

import pytest
from lm_eval.api.metrics import mean_stderr
from torch import nn

from shared.assets import cached
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import load_smollm2
from shared.zero_shot import LMEvalAdapter
from shared.zero_shot.scoring import Likelihood
from shared.zero_shot.tasks import (
    Example,
    Record,
    Result,
    load_task,
    read_hellaswag,
    read_lambada,
    read_piqa,
    run_task,
)
from tests.helpers import shake
from tests.zero_shot.helpers import (
    TEXT,
    TOKENIZER,
    VOCAB,
    by_lm_eval,
    greedy_continuation,
    hellaswag_rows,
    piqa_rows,
    write_lines,
)


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


@pytest.mark.slow
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


@pytest.mark.slow
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
