"""Week 9's script: what it refuses, resumes and keeps."""

import json
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch

from shared.adapters import load_adapter
from shared.adapters.instructions import Instructions, PlayTemplate
from shared.course import report
from shared.course.exercise.answers import Shelf, load_module
from shared.course.report import load_script
from shared.models.gpt import GPT, GPTConfig
from shared.quantization import quantize
from shared.runtime import ROOT, read_json
from shared.tokenizers import CharTokenizer
from shared.training import TrainConfig
from tests.weeks.helpers import DATA, script

KEPT_UNDER = load_script("09_lora", "names").kept_under
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("base_model", "unrendered_plots")]

WRONG_IN_WEEK_9 = {
    "a broken line": (["--data", "BROKEN"], "line 2: expected an object with"),
    "a broken line, before the model is looked for": (
        ["--data", "BROKEN", "--model", "no/such/model"],
        "line 2: expected an object with",
    ),
    "no such file": (["--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    "one example only": (["--data", "ONE"], "cannot be split"),
    "nothing fits": (["--block-size", "20"], "no training example fits into a context of 20 tokens"),
    "targets that are not there": (
        ["--adapter.target-modules", "query"],
        "no linear layer is called 'query'; there are: down_proj, ",
    ),
    "a rank of 0": (["--adapter.r", "0"], "r=0: must be at least 1"),
    "an unknown scheme": (["--method", "qlora", "--scheme", "int3"], "int3"),
    "a prompt that fills the context": (["--method", "prompt", "--virtual-tokens", "256"], "256"),
    "no such model": (["--model", "no/such/model"], "no checkpoint in no/such/model, nor another model"),
    "a row that is none": (["--compared", "lora-x"], "'lora-x' is none of"),
}


@pytest.mark.parametrize("case", WRONG_IN_WEEK_9)
def test_week_9_says_what_is_wrong(case, refuses, text_file, tmp_path):
    arguments, words = WRONG_IN_WEEK_9[case]
    one = '{"prompt": "Who?", "response": "I."}\n'
    for name, content in {"BROKEN": one + '{"question": "Who?"}\n', "ONE": one}.items():
        (tmp_path / name).write_text(content)
    arguments = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    refuses("09_lora", ["--text", text_file, *arguments], words)


def test_week_9_leaves_bad_lines_out_when_asked(output, text_file, tmp_path, capsys):
    talks = [json.dumps({"prompt": f"Who is {n}?", "response": "Toad."}) for n in range(20)]
    data = tmp_path / "talks.jsonl"
    data.write_text("\n".join([talks[0], "{", *talks[1:]]))
    module, settings = script("09_lora", text=text_file, data=str(data), steps=1, skip_bad_lines=True)
    module.main(settings)
    assert "1 of 21 conversations cannot be read and are left out (line 2: " in capsys.readouterr().out
    (summary,) = (output / "logs" / "09_lora").rglob(f"{settings.run}/summary.json")
    assert json.loads(summary.read_text(encoding="utf-8"))["examples"] == 18


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora", "prompt"])
def test_week_9_resumes_and_keeps_what_can_be_loaded(method, output, text_file, tmp_path):
    data = tmp_path / "talks.jsonl"
    data.write_text(
        "".join(
            json.dumps({"instruction": f"Who is {n}?", "output": "Toad, that under cold stone."}) + "\n"
            for n in range(20)
        )
    )
    module, settings = script(
        "09_lora", text=text_file, data=str(data), method=method, steps=4, measured=True
    )
    once = module.main(settings)
    again = module.main(replace(settings, resume=True))
    assert {k: v for k, v in once.items() if "second" not in k and "memory" not in k} == {
        k: v for k, v in again.items() if "second" not in k and "memory" not in k
    }
    kept = output / "checkpoints" / "09_lora" / "smoke" / KEPT_UNDER(settings)
    folder = kept / DATA / settings.run
    steps = report.load_script("09_lora", "fine_tuning")
    base, corpus = steps.load_base(settings)
    if method == "qlora":
        base = quantize(base, settings.scheme)
    if method == "full":
        model = GPT.from_checkpoint(folder / "model")
    else:
        model = load_adapter(base, folder / "adapter")
    perplexity = steps.text_perplexity(model.eval(), corpus, settings)
    assert perplexity == pytest.approx(once["text_perplexity"], rel=1e-5)


def test_week_9_measures_the_old_text_of_own_data_only_when_asked(output, text_file, tmp_path, monkeypatch):
    talks = [json.dumps({"prompt": f"Who is {n}?", "response": "Toad."}) for n in range(20)]
    data = tmp_path / "talks.jsonl"
    data.write_text("\n".join(talks))
    module, settings = script("09_lora", text=text_file, data=str(data), steps=1)
    steps = sys.modules["weeks.09_lora.fine_tuning"]

    def refuse(*args, **options):
        raise AssertionError("measured without being asked")

    for slow in ("text_perplexity", "answer"):
        monkeypatch.setattr(steps, slow, refuse)
    result = module.main(settings)
    assert "text_perplexity" not in result and result["best_val_loss"] > 0
    with pytest.raises(AssertionError, match="without being asked"):
        module.main(replace(settings, measured=True))


def test_week_9_goes_on_with_a_checkpoint_of_its_own(output, text_file):
    module, settings = script("09_lora", text=text_file, method="full", steps=3)
    first = module.main(settings)
    folder = output / "checkpoints" / "09_lora" / "smoke" / DATA / "course-full" / "model"
    again = replace(settings, model=str(folder), method="lora")
    second = module.main(again)
    assert second["base_loss"] == pytest.approx(first["best_val_loss"], rel=1e-5)
    kept = output / "checkpoints" / "09_lora" / "smoke" / KEPT_UNDER(again) / DATA / "model-lora-8"
    assert (kept / "adapter" / "adapter_config.json").exists()


def test_week_9_keeps_what_it_learned_from_files_of_one_name_apart(output, text_file, tmp_path):
    """Each adapter is still there, and is resumed, when the other has been trained."""
    module, settings = script("09_lora", text=text_file, steps=2)
    runs = []
    for folder, answer in (("a", "Toad, that under cold stone."), ("b", "In the poison'd entrails throw.")):
        talks = [{"prompt": f"Who is {n}?", "response": answer} for n in range(12)]
        path = tmp_path / folder / "talks.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(talk) + "\n" for talk in talks), encoding="utf-8")
        runs.append(replace(settings, data=str(path)))
    losses = [module.main(run)["best_val_loss"] for run in runs]
    assert losses[0] != losses[1]
    assert [module.main(replace(run, resume=True))["best_val_loss"] for run in runs] == losses
    adapters = (output / "checkpoints" / "09_lora").rglob("adapter_config.json")
    assert sorted(path.parts[-5] for path in adapters) == sorted(KEPT_UNDER(run) for run in runs)


# ---- with a learner's own answers


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """The week's clean solutions, LoRALinear kept as a learner's own."""
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(tmp_path / "answers"))
    module = load_module(ROOT / "weeks/09_lora/answers.py", "answers_09")
    assert Shelf("09_lora").solve("LoRALinear", module.LoRALinear) is None
    return module


def test_a_run_with_her_layer_gives_the_courses_losses(answers, output, text_file):
    """Oracle: the same run with the course's code; with dropout, which draws from the same generator."""
    found = []
    for mine in (False, True):
        module, settings = script("09_lora", text=text_file, mine=mine)
        adapter = replace(settings.adapter, r=4, lora_alpha=12.0, lora_dropout=0.25)
        found.append(module.main(replace(settings, adapter=adapter)))
    theirs, hers = found
    for name in ("best_val_loss", "base_loss", "text_perplexity", "trainable"):
        assert hers[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert hers["best_val_loss"] < hers["base_loss"]
    (week,) = (output / "logs" / "09_lora").rglob("my-code/*/week.json")
    assert read_json(week)["mine"] == ["LoRALinear"]


def test_what_her_layer_has_not_is_refused(refuses, text_file):
    arguments = ["--text", text_file, "--mine", "--adapter.use-rslora"]
    refuses("09_lora", arguments, "your layer has the scale alpha / r")


def test_her_labels_and_rows_are_the_courses_batches(answers):
    """Oracle: the course's task, batch by batch: the loss of a GPT, and how many labels count."""
    own = report.load_script("09_lora", "own")
    tokenizer = CharTokenizer("abe:\nQUESTIONAWR"[:5] + "".join(sorted(set("QUESTIONANSWER"))))
    talks = [
        [{"role": "user", "content": "a" * (3 + n % 5)}, {"role": "assistant", "content": "be" * (2 + n % 7)}]
        for n in range(30)
    ]
    course = Instructions(talks, talks[:2], PlayTemplate(tokenizer), 96)
    hers = own.OwnInstructions(course, talks, answers.answer_labels, answers.pack_examples)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=96, n_layer=1, n_head=2, n_embd=16))
    config = TrainConfig(steps=4, batch_size=3, block_size=96, seed=3)
    for start, every in ((0, 1), (2, 2)):
        theirs = islice(course.batches(config, start, every=every), 6)
        for batch, own_batch in zip(theirs, hers.batches(config, start, every=every)):
            assert hers.learned_tokens(*own_batch) == course.learned_tokens(*batch) > 0
            expected = course.loss(model, *batch).item()
            assert hers.loss(model, *own_batch).item() == pytest.approx(expected, rel=1e-5)
