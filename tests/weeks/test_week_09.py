"""Week 9's script: what it refuses, resumes and keeps."""

import json
from dataclasses import replace

import pytest

from shared.adapters import load_adapter
from shared.course import report
from shared.models.gpt import GPT
from shared.quantization import quantize
from tests.weeks.helpers import script

pytestmark = pytest.mark.slow

WRONG_IN_WEEK_9 = {
    "a broken line": (["--data", "BROKEN"], "line 2: expected an object with"),
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


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora", "prompt"])
def test_week_9_resumes_and_keeps_what_can_be_loaded(method, output, text_file, tmp_path):
    data = tmp_path / "talks.jsonl"
    data.write_text(
        "".join(
            json.dumps({"instruction": f"Who is {n}?", "output": "Toad, that under cold stone."}) + "\n"
            for n in range(20)
        )
    )
    module, settings = script("09_lora", text=text_file, data=str(data), method=method, steps=4)
    once = module.main(settings)
    again = module.main(replace(settings, resume=True))
    assert {k: v for k, v in once.items() if "second" not in k and "memory" not in k} == {
        k: v for k, v in again.items() if "second" not in k and "memory" not in k
    }
    folder = output / "checkpoints" / "09_lora" / "smoke" / "rhyme.txt" / settings.run
    steps = report.load_script("09_lora", "fine_tuning")
    base, corpus = steps.load_base(settings)
    if method == "qlora":
        base = quantize(base, settings.scheme)
    if method == "full":
        model = GPT.from_checkpoint(folder / "model")
    else:
        model = load_adapter(folder / "adapter", base)
    perplexity = steps.text_perplexity(model.eval(), corpus, settings)
    assert perplexity == pytest.approx(once["text_perplexity"], rel=1e-5)


def test_week_9_goes_on_with_a_checkpoint_of_its_own(output, text_file):
    module, settings = script("09_lora", text=text_file, method="full", steps=3)
    first = module.main(settings)
    folder = output / "checkpoints" / "09_lora" / "smoke" / "rhyme.txt" / "course-full" / "model"
    second = module.main(replace(settings, model=str(folder), method="lora"))
    assert second["base_loss"] == pytest.approx(first["best_val_loss"], rel=1e-5)
    assert (
        output
        / "checkpoints"
        / "09_lora"
        / "smoke"
        / "rhyme.txt"
        / "model-lora-8"
        / "adapter"
        / "adapter_config.json"
    ).exists()
