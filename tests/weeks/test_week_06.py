"""Week 6's script: flags, processes, shards and texts."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from shared import commandline
from shared.assets import Unavailable
from shared.course import report
from shared.course.exercise import Week
from shared.course.exercise.answers import load_module
from shared.data import shards
from shared.data.corpus import batches
from shared.models import pretrained
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import to_hf
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer, gpt2_tokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, trained_base_model
from shared.training.memory import estimate_memory
from shared.zero_shot.tasks import Example
from tests.weeks.helpers import DATA, script

pytestmark = pytest.mark.slow


def test_week_6_takes_the_flags_that_people_know():
    module = report.load_script("06_gpt2")
    flags = [
        "--preset",
        "smoke",
        "--compile_model=True",
        "--dtype=bfloat16",
        "--grad_accum_steps=8",
        "--n_layer=3",
        "--lr",
        "1e-4",
    ]
    settings = commandline.parse(module.PRESETS, flags)
    assert (
        settings.compile_model,
        settings.dtype,
        settings.train.grad_accum_steps,
        settings.model.n_layer,
    ) == (True, "bfloat16", 8, 3)
    assert settings.train.lr == 1e-4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_run_week_6_and_only_the_first_speaks(parallel, output, text_file):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "weeks" / "06_gpt2" / "run.py"),
    ]
    flags = [
        "--preset",
        "smoke",
        "--device",
        "cpu",
        "--data",
        text_file,
        "--parallel",
        parallel,
        "--dtype=bfloat16",
        "--steps=4",
        "--warmup-steps=1",
    ]
    done = subprocess.run(
        command + flags,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes: 2, over gloo") == 1 and done.stdout.count("hardware: ") == 1
    assert (output / "logs" / "06_gpt2" / "mine" / "smoke" / DATA / "week.json").exists()


def test_week_6_trains_on_shards(output, tmp_path):
    documents = [
        f"Line {i}: toil and trouble, fire burn and cauldron bubble, number {i * i}.\n" * 5 for i in range(60)
    ]
    tokenizer = BPETokenizer.train("".join(documents), 300, special_tokens=[END_OF_TEXT])
    (tmp_path / "documents.txt").write_text(f"\n{END_OF_TEXT}\n".join(documents))
    shards.build(
        shards.ShardConfig(
            str(tmp_path / "documents.txt"),
            str(tmp_path / "shards"),
            val_tokens=500,
            shard_tokens=2000,
            workers=1,
        ),
        tokenizer,
    )
    module, settings = script("06_gpt2", data=str(tmp_path / "shards"))
    assert module.main(settings)["vocab_size"] == tokenizer.vocab_size


def test_week_6_without_its_shards_says_how_to_make_them(monkeypatch, tmp_path, capsys):
    module = report.load_script("06_gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="python -m shared.data.shards --source fineweb-edu --out data/fineweb-edu"
    ):
        module.main(replace(module.PRESETS["gpu"], device="cpu"))


def test_week_6s_studies_take_a_text_where_the_preset_has_shards(monkeypatch, capsys):
    presets = report.load_script("06_gpt2").PRESETS
    studies = report.load_script("06_gpt2", "studies")
    monkeypatch.setattr(studies, "read_text", lambda name: (name, "text"))
    assert studies.study_text(presets["gpu"]) == ("tinyshakespeare", "text")
    assert "shards, which hold no text" in capsys.readouterr().out
    assert studies.study_text(presets["laptop"])[0] == presets["laptop"].data


def test_a_task_that_cannot_be_had_is_left_out(monkeypatch, capsys):
    def load_task(task):
        if task == "lambada":
            raise Unavailable("lambada could not be fetched")
        return [Example("She opened the", (" door", " green"), 0)]

    studies = report.load_script("06_gpt2", "studies")
    monkeypatch.setattr(studies, "load_task", load_task)
    tokenizer = BPETokenizer.train("She opened the green door.", 260)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1, n_head=2, n_embd=16))
    assert studies.score_task("lambada", model, tokenizer, limit=None) == {}
    assert "lambada is left out: lambada could not be fetched" in capsys.readouterr().out
    assert studies.score_task("piqa", model, tokenizer, limit=None)["piqa_examples"] == 1


def test_settings_of_a_base_model_that_is_there_already_are_refused(output, text_file):
    """It is not trained again, so they would have no effect; those it was trained with may be given."""
    usual = BASE_PRESETS["smoke"].train
    assert usual.warmup_steps == 30
    how = replace(usual, steps=31, lr=0.004)
    trained, corpus = trained_base_model("smoke", data=text_file, train=how)
    assert corpus.name == DATA
    for train in (usual, how, replace(usual, steps=31)):
        again, _ = trained_base_model("smoke", data=text_file, train=train)
        assert all(map(torch.equal, trained.parameters(), again.parameters()))
    with pytest.raises(
        ValueError, match=r"there already, .*: steps=31 then, 32 now; lr=0.004 then, 0.1 now\. Leave"
    ):
        trained_base_model("smoke", data=text_file, train=replace(usual, steps=32, lr=0.1))
    shutil.rmtree(output / "checkpoints" / "06_gpt2" / "smoke" / DATA / "gpt2" / "last")
    with pytest.raises(ValueError, match="steps=unknown then, 31 now"):
        trained_base_model("smoke", data=text_file, train=replace(usual, steps=31))


# ---- the page on training the real one


PAGE = ROOT / "docs" / "training_gpt2.md"


def test_the_memory_on_the_training_page_is_what_the_estimate_computes():
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text("utf-8"), re.M)
    assert [int(row[0]) for row in rows] == [4, 8, 16, 32, 64]
    for batch_size, *printed in rows:
        train = TrainConfig(batch_size=int(batch_size), block_size=1024, grad_accum_steps=2)
        kinds = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
        peaks = [estimate_memory(GPTConfig.preset("gpt2"), train, *kind).peak / 1e9 for kind in kinds]
        assert [f"{peak:.1f}" for peak in peaks] == printed


def test_the_flags_on_the_training_page_are_taken_and_read_as_many_tokens():
    module = report.load_script("06_gpt2")
    lines = re.findall(r"`(--[^`]*--train.grad_accum_steps \d+)`", PAGE.read_text("utf-8"))
    assert len(lines) == 4
    for flags in lines:
        settings = commandline.parse(module.PRESETS, ["--preset", "gpu", *flags.split()])
        assert settings.train.tokens_per_step == 524_288, flags
    assert module.PRESETS["gpu"].train.tokens_per_step == 524_288
    assert round(375e6 / 524_288) == module.PRESETS["gpu"].train.warmup_steps
    assert int(10e9 / 524_288) == module.PRESETS["gpu"].train.steps


# ---- the learner's code


def test_the_course_s_ddp_step_in_two_real_processes_is_that_of_one(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "weeks" / "06_gpt2" / "two_processes.py"),
    ]
    environment = {**os.environ, "LLM_WEEKS_ANSWERS": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = re.findall(r"^\d +([\d.]+) +([\d.]+)$", done.stdout, re.M)
    assert len(losses) == 4
    for together, alone in losses:
        assert float(together) == pytest.approx(float(alone), abs=1.01e-4)
    # AdamW makes whole steps (0.01) of gradients that are nearly rounding.
    assert float(done.stdout.split()[-1]) < 2e-4


def test_what_is_read_through_her_reader_are_the_same_tokens(tmp_path):
    module = report.load_script("06_gpt2")
    reader = Week(6).exercises["ShardReader"].reference
    tokens = np.random.default_rng(0).integers(60_000, size=500).astype(np.uint16)
    hers = module.ReadByHer(reader, tokens, tmp_path)
    assert len(list(tmp_path.glob("train_*.bin"))) == 3 and len(hers) == 500
    assert hers[160:340].tolist() == tokens[160:340].tolist()
    for ours, theirs in zip(islice(batches(tokens, 16, 4, 0), 20), batches(hers, 16, 4, 0)):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def _solve(number, *names):
    """Keeps the clean answers of a week's exercises as the learner's."""
    week = Week(number)
    answers = load_module(week.folder / "answers.py", f"answers_{number}")
    for name in names:
        assert week.shelf.solve(name, getattr(answers, name)) is None


def test_openai_s_gpt2_by_the_learners_loader_in_her_gpt(output, text_file, monkeypatch, tmp_path, capsys):
    """A tiny one in place of the hub's."""
    gpt2 = gpt2_tokenizer()
    tiny = GPT(GPTConfig(vocab_size=gpt2.vocab_size, block_size=1024, n_layer=1, n_head=1, n_embd=4))
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.normal_()  # the biases too
    folder = to_hf(tiny, tmp_path / "hub")
    monkeypatch.setattr(pretrained, "_snapshot", lambda name, download=True: folder)
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(tmp_path / "answers"))
    _solve(6, "load_hf_weights")
    module = report.load_script("06_gpt2")

    def bits_per_byte(mine):
        settings = replace(
            module.PRESETS["smoke"], study="openai", data=text_file, mine=mine, limit=1, device="cpu"
        )
        return module.main(settings)["bits_per_byte"]

    right = bits_per_byte(mine=False)
    assert bits_per_byte(mine=True) == pytest.approx(right, rel=1e-6)
    _solve(3, "MultiHeadAttention")
    _solve(4, "MiniGPT", "Block")
    capsys.readouterr()
    assert bits_per_byte(mine=True) == pytest.approx(right, rel=1e-5)
    assert "your MiniGPT holds GPT-2's weights" in capsys.readouterr().out


def test_an_attention_that_leaves_out_the_biases_is_refused():
    studies = report.load_script("06_gpt2", "studies")

    class WithoutBias(Week(3).exercises["MultiHeadAttention"].reference):
        def forward(self, x):
            for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
                layer.bias = None
            return super().forward(x)

    class Work:
        def mine(self, name, promoted, week_number=None):
            own = Week(week_number).exercises[name].reference
            return WithoutBias if name == "MultiHeadAttention" else own

    model = GPT(GPTConfig(vocab_size=30, block_size=32, n_layer=1, n_head=2, n_embd=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    with pytest.raises(ValueError, match="call its layers"):
        studies.her_gpt2(Work(), model)
