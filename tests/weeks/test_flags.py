"""Flags that a run would not read are refused; the commands that the course shows are not."""

import re
import shlex

import pytest

from shared import commandline
from shared.course import report
from shared.course.markdown import documents
from shared.runtime import ROOT

COMMAND = re.compile(r"python (?:\S*/)?weeks/(\d\d_\w+)/run\.py([^`#\n\\&|]*)")
SCRIPTS = sorted((ROOT / "weeks").glob("*/run.py"))
SHOWN = sorted(
    {
        (topic, " ".join(flags.split()))
        for path in (*documents(), *SCRIPTS)
        for topic, flags in COMMAND.findall(path.read_text(encoding="utf-8"))
        if not set("[…") & set(flags)
    }
)
WITHOUT_EFFECT = [
    ("02_mlp", "--windows 1", "it is for --study window"),
    ("02_mlp", "--study window --window 4", "it is for the week without --study"),
    ("04_mini_gpt", "--study seeds --train.seed 3", "--seeds gives them"),
    ("04_mini_gpt", "--study speedrun --model.n-layer 2", "for the week without --study and --study seeds"),
    ("04_mini_gpt", "--train.optimizer adamw --train.muon-lr 0.1", "optimizer is adamw"),
    ("04_mini_gpt", "--train.decay-fraction=0.5", "schedule is linear"),
    ("04_mini_gpt", "--study cache --resume", "--resume has no effect"),
    ("05_bpe", "--study vocab --train.steps 500", "--study-steps gives them"),
    ("06_gpt2", "--study cost --steps 500", "--train.steps has no effect"),
    ("06_gpt2", "--study shape --model.norm layernorm", "the study gives GPT-2's"),
    ("07_amp", "--memory-gb 1", "it is for --study batch"),
    ("07_amp", "--eval-every 5", "nothing is kept"),
    ("07_amp", "--chunk-sizes 8", "it is for --study loss"),
    ("07_amp", "--study loss --train.steps 5", "without a model"),
    ("07_amp", "--study profile --mine", "nothing that this part of the week runs is written by you"),
    ("08_quantization", "--no-others", "it is for --study real"),
    ("08_quantization", "--study real --device cpu", "--device has no effect"),
    ("09_lora", "--method prompt --adapter.r 4", "the method is prompt"),
    ("09_lora", "--scheme int8", "the method is lora"),
    ("09_lora", "--steps 3 --epochs 2", "--steps says how long"),
    ("09_lora", "--study compare --method full", "--method has no effect"),
    ("09_lora", "--study rates --lr 1e-3", "--rate-factors give it"),
    ("09_lora", "--study compare --mine", "nothing that this part of the week runs is written by you"),
    ("09_lora", "--method dora --mine", "the method is dora, and your layer computes LoRA"),
    ("09_lora", "--study rounding --epochs 2", "nothing is trained"),
    ("09_lora", "--data mine.jsonl --questions 3", "--measured True asks for it"),
    ("10_ppo_dpo", "--study real --mark ?", "--mark has no effect"),
    ("10_ppo_dpo", "--study hacking --grpo.lr 1e-3", "--hacking-lr gives it"),
    ("10_ppo_dpo", "--mark ?", "it is for --study exclaim"),
    ("10_ppo_dpo", "--countdown.ppo.lr 1e-4", "it is for --study methods and --study rates"),
    ("10_ppo_dpo", "--study methods --countdown.seed 3", "--countdown.seeds gives it"),
    ("10_ppo_dpo", "--study form --countdown.ppo.lr 1e-4", "the study has a base of its own, and GRPO"),
    ("10_ppo_dpo", "--study exclaim --countdown.rows 64", "it is for the week without --study"),
    ("10_ppo_dpo", "--study methods --mine", "nothing that this part of the week runs is written by you"),
    ("11_rag", "--ask Who? --questions 3", "--ask and --interactive measure nothing"),
    ("11_rag", "--ask Who? --study index", "--study has no effect"),
    ("11_rag", "--study answers --questions 3 --preset laptop", "all are answered"),
    ("11_rag", "--study index --size 64", "--size has no effect"),
    ("11_rag", "--study quotes --mine", "nothing that this part of the week runs is written by you"),
    ("12_deploy", "--study real --load.tokens 8", "--load.tokens has no effect"),
]
OF_THE_BASE = (
    *("--batch-size 2", "--grad-accum-steps 2", "--warmup-steps 3", "--schedule linear", "--grad-clip 1"),
    *("--optimizer muon", "--eval-every 7", "--base.lr 1e-3", "--log-updates"),
)
"""Of the model that week 9 does not train where --model names another."""


def parse(topic: str, flags: str, preset: str = "smoke"):
    words = shlex.split(flags)
    if "--preset" not in words:
        words += ["--preset", preset]
    return commandline.parse(report.load_script(topic).PRESETS, words)


@pytest.mark.parametrize(("topic", "flags", "why"), WITHOUT_EFFECT, ids=lambda value: str(value))
def test_a_flag_without_effect_is_refused_with_the_reason(topic, flags, why):
    with pytest.raises(ValueError, match=r"has no effect in this run \(.*\)\. Leave out") as error:
        parse(topic, flags)
    assert why in str(error.value)


@pytest.mark.parametrize("flags", OF_THE_BASE)
def test_week_9_refuses_settings_of_a_base_model_that_is_not_trained(flags):
    name = flags.split()[0].removeprefix("--").removeprefix("base.")
    with pytest.raises(
        ValueError, match=f"--base.{name} has no effect in this run .* no base model is trained"
    ):
        parse("09_lora", f"--model smollm2 {flags}")
    assert parse("09_lora", flags) != parse("09_lora", "")


def test_there_are_commands_in_every_weeks_prose():
    assert {topic for topic, _ in SHOWN} == {path.parent.name for path in SCRIPTS}


@pytest.mark.parametrize(("topic", "flags"), SHOWN, ids=lambda value: str(value))
def test_commands_that_the_course_shows_have_no_flag_without_effect(topic, flags):
    parse(topic, flags, preset="laptop")
