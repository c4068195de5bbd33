"""Week 6's script: flags, processes, shards and texts."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from shared import commandline
from shared.assets import Unavailable
from shared.course import report
from shared.data import shards
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from shared.training.base_model import BASE_PRESETS, trained_base_model
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
    how = replace(usual, steps=4, lr=0.004)
    trained, corpus = trained_base_model("smoke", data=text_file, train=how)
    assert corpus.name == DATA
    for train in (usual, how, replace(usual, steps=4)):
        again, _ = trained_base_model("smoke", data=text_file, train=train)
        assert all(map(torch.equal, trained.parameters(), again.parameters()))
    with pytest.raises(
        ValueError, match=r"there already, .*: steps=4 then, 5 now; lr=0.004 then, 0.1 now\. Leave"
    ):
        trained_base_model("smoke", data=text_file, train=replace(usual, steps=5, lr=0.1))
