"""docs/training.md: its code runs, in its order, with fewer steps and a smaller model."""

import re

import pytest
import torch

from shared.runtime import ROOT, read_json, read_jsonl
from tests.helpers import synthetic_text

BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
SMALLER = {
    "steps=2000, warmup_steps=100": "steps=4, warmup_steps=1",
    "every=500": "every=2",
    "steps=3000": "steps=6",
    '.preset("mini", ': "(block_size=64, n_layer=1, n_head=2, n_embd=16, ",
}


@pytest.mark.slow
def test_the_code_on_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "cache"))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("The " + synthetic_text(), encoding="utf-8")
    torch.manual_seed(0)
    code = "\n".join(BLOCK.findall((ROOT / "docs" / "training.md").read_text(encoding="utf-8")))
    for large, small in SMALLER.items():
        assert large in code
        code = code.replace(large, small)
    namespace = {"__name__": "page"}
    exec(compile(code, "docs/training.md", "exec"), namespace)
    said = capsys.readouterr().out
    assert "step 2: The " in said and "goes on to 6" in said and "The learning rate jumps from" in said
    assert read_json(tmp_path / "runs" / "first" / "run.json")["state"] == "finished"
    rows = read_jsonl(tmp_path / "runs" / "first" / "metrics.jsonl")
    assert read_json(tmp_path / "runs" / "first" / "summary.json")["step"] == rows[-1]["step"] == 4
    assert list((tmp_path / "runs" / "first" / "tensorboard").iterdir())
    assert (tmp_path / "checkpoints" / "sgd" / "last" / "training.json").exists()
