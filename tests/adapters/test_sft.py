"""shared/adapters/sft.py and `python -m shared.adapters`: fine-tuning on conversations by one call."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared import checkpoint
from shared.adapters import LoRAConfig, sft
from shared.adapters.__main__ import main
from shared.adapters.instructions import Instructions, template_for
from shared.adapters.methods import estimate_tuning_memory, make_trainable
from shared.adapters.packing import lay_out
from shared.adapters.sft import SFTSettings, fine_tune
from shared.checkpoint import learned
from shared.commandline import parse_args
from shared.models.pretrained import load_model
from shared.quantization.modules import quantization_of
from shared.runtime import ROOT, read_json, read_jsonl
from shared.training.config import TrainConfig, lr_at
from shared.training.distributed import recompute_blocks
from shared.training.profiling import saved_bytes
from tests.adapters.helpers import LLAMA, close, gpt
from tests.adapters.test_artefacts import tokenizer
from tests.helpers import synthetic_text

pytestmark = pytest.mark.slow

TALKS = [
    {"prompt": f"Who is {n}?", "response": f"Toad {n}, that under cold stone" + " and stone" * (n % 5) + "."}
    for n in range(30)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint `model`, conversations `talks.jsonl`, and a text."""
    folder = tmp_path_factory.mktemp("sft")
    model = gpt(replace(LLAMA, vocab_size=320, block_size=128, n_embd=64))
    checkpoint.save(model, folder / "model", tokenizer(chat=False))
    (folder / "talks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in TALKS), encoding="utf-8")
    (folder / "text.txt").write_text(synthetic_text(), encoding="utf-8")
    return folder


@pytest.fixture
def settings(folder, tmp_path) -> SFTSettings:
    return SFTSettings(
        model=str(folder / "model"),
        data=str(folder / "talks.jsonl"),
        out=str(tmp_path / "out"),
        adapter=LoRAConfig(r=4, lora_alpha=8.0, target_modules=("all-linear",)),
        lr=1e-2,
        batch_size=2,
        epochs=1.0,
        device="cpu",
    )


def losses(out: str | Path) -> list[float]:
    rows = read_jsonl(Path(out) / "log" / "metrics.jsonl")
    return [row["train_loss"] for row in rows if "train_loss" in row]


def trained(result: sft.SFTResult) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in learned(result.model).values()]


# ---- the whole way


def test_the_command_says_what_will_happen_and_ends_with_what_peft_loads(folder, tmp_path, capsys):
    """The counts in what is said are those of a count written out here."""
    flags = f"--model {folder / 'model'} --data {folder / 'talks.jsonl'} --out {tmp_path / 'out'} --lr 1e-2"
    settings = parse_args(SFTSettings, f"{flags} --batch-size 2 --epochs 2 --device cpu".split())
    main(settings)
    said = capsys.readouterr().out
    model = load_model(folder / "model")
    template = template_for(model.tokenizer)
    talks = sft.sft_talks(settings)
    read = answers = 0
    for question, answer in talks.train:
        prompt, reply = template.prompt([question]), template.answer(answer["content"])
        read += len(prompt) + len(reply) - 1
        answers += len(reply)
    assert "3 of 30 conversations are held out" in said
    assert f"tokens: {read:,} an epoch, {answers:,} of them learned" in said
    steps = int(re.search(r"steps: (\d+), each of 1 x 2 rows: 2\.\d epochs", said)[1])
    assert steps == read_json(tmp_path / "out" / "log" / "summary.json")["steps"]
    assert "rate: 0.01, linear after" in said and "rank 16, alpha 32 (B A times 2), on 14 layers" in said
    assert re.search(r"memory: about \d+\.\d GB: weights", said)
    assert said.index("memory: about") < said.index("step ")
    assert f'AutoPeftModelForCausalLM.from_pretrained("{tmp_path / "out"}")' in said
    assert {"adapter_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_what_is_written_computes_what_was_trained(settings, method):
    from transformers import AutoModelForCausalLM

    result = fine_tune(replace(settings, method=method))
    idx = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(0))
    kind = AutoModelForCausalLM if method == "full" else AutoPeftModelForCausalLM
    with torch.no_grad():
        close(kind.from_pretrained(result.folder).eval()(idx).logits, result.model(idx), atol=1e-4)


def test_the_state_that_is_kept_is_the_best(settings, monkeypatch):
    measured = Instructions.evaluate

    def turned_over(task, *given):
        """The loss falls here, on every processor; turned over, the first evaluation is the best."""
        found = measured(task, *given)
        return {**found, "val_loss": -found["val_loss"]}

    monkeypatch.setattr(Instructions, "evaluate", turned_over)
    result = fine_tune(replace(settings, steps=30))
    rows = read_jsonl(result.folder / "log" / "metrics.jsonl")
    by_step = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert result.summary["best_val_loss"] == min(by_step.values()) < by_step[max(by_step)]
    task = sft.sft_task(settings, load_model(settings.model), sft.sft_talks(settings))
    loss = task.evaluate(result.model, TrainConfig(batch_size=2))["val_loss"]
    assert loss == pytest.approx(min(by_step.values()), rel=1e-6)


# ---- options


def test_recomputed_activations_change_no_loss(settings, tmp_path):
    fine_tune(settings)
    fine_tune(replace(settings, out=str(tmp_path / "again"), recompute=True))
    assert losses(tmp_path / "again") == pytest.approx(losses(settings.out), rel=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "torch.bfloat16"), ("fp16", "torch.float16")])
def test_a_step_in_16_bits_is_near_one_in_fp32_and_another(settings, tmp_path, name, dtype):
    fine_tune(settings)
    fine_tune(replace(settings, out=str(tmp_path / name), precision=name))
    assert losses(tmp_path / name)[0] == pytest.approx(losses(settings.out)[0], rel=1e-2)
    assert losses(tmp_path / name)[-1] == pytest.approx(losses(settings.out)[-1], rel=0.1)
    assert losses(tmp_path / name)[0] != losses(settings.out)[0]
    assert read_json(tmp_path / name / "checkpoints" / "last" / "training.json")["dtype"] == dtype


def test_accumulated_batches_count_by_the_tokens_that_are_learned(settings, tmp_path):
    """Without packing a row is an example, whatever the number of rows of a batch: one batch of four is four
    of one.
    """
    whole = fine_tune(replace(settings, batch_size=4, pack=False, steps=3))
    parts = fine_tune(
        replace(settings, out=str(tmp_path / "parts"), batch_size=1, grad_accum_steps=4, pack=False, steps=3)
    )
    assert losses(parts.folder) == pytest.approx(losses(whole.folder), rel=1e-5)


def test_more_epochs_on_resume_equal_as_many_from_the_start(settings, tmp_path, capsys):
    constant = replace(settings, schedule="constant", eval_every=2)
    long = fine_tune(replace(constant, out=str(tmp_path / "long"), epochs=2.0))
    fine_tune(constant)
    capsys.readouterr()
    resumed = fine_tune(replace(constant, epochs=2.0, resume=True))
    assert "goes on to" in capsys.readouterr().out
    assert losses(resumed.folder) == losses(long.folder)
    assert all(map(torch.equal, trained(resumed), trained(long)))
    assert resumed.summary["steps"] == long.summary["steps"]


def test_with_a_schedule_of_the_length_the_rate_follows_the_longer_one(settings):
    fine_tune(settings)
    longer = replace(settings, epochs=2.0, resume=True)
    task = sft.sft_task(longer, load_model(longer.model), sft.sft_talks(longer))
    result = fine_tune(longer)
    rows = read_jsonl(result.folder / "log" / "metrics.jsonl")
    rates = [row["lr"] for row in rows if "lr" in row]
    rises = [i for i in range(2, len(rates)) if rates[i] > rates[i - 1]]  # after a step of warmup
    assert len(rises) == 1 and len(rates) == result.summary["steps"]
    # From there on it is the longer schedule's.
    assert rates[rises[0] :] == pytest.approx(
        [lr_at(i, sft.plan_steps(longer, task)) for i in range(rises[0], len(rates))]
    )


def test_it_stops_early(settings, capsys):
    result = fine_tune(replace(settings, epochs=20.0, lr=1.0, patience=2, eval_every=1))
    assert "stopped early, at step" in capsys.readouterr().out
    assert result.summary["steps"] == result.summary["best_step"] + 2


def test_samples_are_printed_and_change_nothing(settings, tmp_path, capsys):
    plain = fine_tune(settings)
    capsys.readouterr()
    watched = fine_tune(replace(settings, out=str(tmp_path / "watched"), sample_every=2, sample_tokens=5))
    said = capsys.readouterr().out
    assert len(re.findall(r"^  step \d+\n  > Who is \d+\?\n", said, re.M)) == watched.summary["steps"] // 2
    assert all(map(torch.equal, trained(plain), trained(watched)))


def test_the_old_text_and_long_answers_are_measured_only_when_asked(settings, folder, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("measured without being asked")

    with monkeypatch.context() as patch:
        patch.setattr(sft, "evaluate", refuse)
        patch.setattr(sft, "answer", refuse)
        fine_tune(settings)
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "cache"))
    asked = replace(
        settings, out=str(tmp_path / "asked"), old_text=str(folder / "text.txt"), answers=2, steps=1
    )
    summary = fine_tune(asked).summary
    assert summary["old_text_perplexity_before"] > 1 and summary["old_text_perplexity_after"] > 1
    assert len(read_json(tmp_path / "asked" / "log" / "artifacts.json")["answers"]) == 2


def test_what_is_too_long_is_left_out_or_cut_off_on_request(settings, folder):
    """By a count of the conversations' lengths written out here."""
    model = load_model(folder / "model")
    template = template_for(model.tokenizer)
    talks = sft.sft_talks(settings).train
    whole = Instructions(talks, talks, template, 128, say=lambda line: None).train
    limit = sorted(len(example.ids) - 1 for example in whole)[len(whole) // 2]
    said: list[str] = []
    dropped = Instructions(talks, talks, template, limit, say=said.append).train
    cut = Instructions(talks, talks, template, limit, truncate=True, say=said.append).train
    assert dropped == [example for example in whole if len(example.ids) - 1 <= limit]
    assert [example.ids for example in cut] == [example.ids[: limit + 1] for example in whole]
    assert "are left out" in said[0] and "are cut off there; 0 had no answer left" in said[2]
    question = len(template.prompt(talks[0][:1]))
    with pytest.raises(ValueError, match="no training example fits"):
        Instructions(talks[:1], talks, template, question - 1, truncate=True, say=said.append)


def test_qlora_notes_how_its_base_is_rounded_and_modules_are_trained_whole(settings):
    adapter = replace(settings.adapter, modules_to_save=("lm_head",))
    result = fine_tune(replace(settings, method="qlora", scheme="int8", adapter=adapter, steps=2))
    assert quantization_of(result.model) == {"scheme": "int8"}
    config = read_json(result.folder / "adapter_config.json")
    assert config["modules_to_save"] == ["lm_head"]
    assert "on a base in int8" in (result.folder / "README.md").read_text(encoding="utf-8")


def test_a_trackers_numbers_are_the_logs(settings):
    result = fine_tune(replace(settings, tracker="tensorboard"))
    events = EventAccumulator(str(result.folder / "log" / "tensorboard")).Reload()
    there = [event.value for event in events.Scalars("train_loss")]
    assert there == pytest.approx(losses(result.folder), rel=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_estimate_of_activations_is_near_what_the_forward_keeps(settings, folder, method, recompute):
    model = make_trainable(load_model(folder / "model"), method, replace(settings.adapter, r=16)).train()
    task = sft.sft_task(settings, load_model(folder / "model"), sft.sft_talks(settings))
    train = TrainConfig(batch_size=4, block_size=128)
    estimate = estimate_tuning_memory(model, train, recompute=recompute)
    if recompute:
        recompute_blocks(model)
    ids, targets, texts = lay_out(task.rows(task.train, range(len(task.train)))[:4])
    kept = saved_bytes(model, lambda: task.loss(model, ids, targets, texts))
    used = ids.numel() / (4 * 128)
    assert kept == pytest.approx(estimate.activations * used, rel=0.25)


# ---- several processes, and what is refused


def test_two_processes_give_the_losses_and_the_adapter_of_one(settings, tmp_path):
    alone = fine_tune(replace(settings, steps=4))
    flags = ["--model", settings.model, "--data", settings.data, "--out", str(tmp_path / "two")]
    flags += ["--adapter.r", "4", "--adapter.lora-alpha", "8", "--lr", "1e-2", "--batch-size", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "shared.adapters", *flags, "--steps", "4", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rate: 0.01") == 1  # the first process speaks for both
    assert losses(tmp_path / "two") == pytest.approx(losses(alone.folder), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": 0}, "patience=0: must be at least 1"),
        ({"epochs": 0.0}, "epochs=0.0: must be above 0"),
        ({"method": "prompt"}, "method='prompt': must be one of full, lora, qlora, dora"),
        ({"tracker": "mlflow"}, "must be one of none, tensorboard, wandb, trackio"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **changes)


def test_a_folder_that_holds_a_model_gets_no_adapter(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds a model: choose another folder"):
        fine_tune(settings)
    assert not (tmp_path / "out" / "log").exists()
