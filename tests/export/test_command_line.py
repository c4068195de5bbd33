"""python -m shared.export, and the hub."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader
from huggingface_hub.errors import HfHubHTTPError

from shared.adapters import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from shared.adapters.prompts import add_prompt
from shared.export import save_hf_folder
from shared.export.huggingface import push_to_hub
from shared.export.onnx import OnnxModel
from shared.models.pretrained import from_gguf, from_hf
from shared.quantization.modules import quantize, save_quantized
from shared.runtime import ROOT
from shared.tokenizers import Tokenizer
from tests.export.helpers import NEW, bpe, greedy, idx, made, prompt, run, same_logits

QWEN = "Qwen3, as in week 4's modern recipe"


def same_tensors(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- the hub


class Hub:
    """Stands for HfApi: what is asked of it, and a repository as the hub would keep it."""

    def __init__(self, private: bool | None = None, error: Exception | None = None):
        self.private, self.error, self.files, self.asked = private, error, {}, []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.asked.append(repo_id)
        if self.error:
            raise self.error
        assert exist_ok
        self.private = private if self.private is None else self.private
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir() if p.name in allow_patterns}


def test_a_folder_is_pushed_privately_unless_told_and_without_other_files(tmp_path):
    folder = save_hf_folder(made("GPT-2"), tmp_path / "m", bpe())
    expected = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "secret.txt").write_text("mine")
    hub = Hub()
    assert push_to_hub(folder, "ada/mine", api=hub) == "https://huggingface.co/ada/mine"
    assert hub.private is True and hub.files == expected
    hub = Hub()
    push_to_hub(folder, "ada/mine", private=False, api=hub)
    assert hub.private is False


def test_what_the_hub_cannot_take_is_said(tmp_path):
    folder = save_hf_folder(made("GPT-2"), tmp_path / "m", bpe())
    hub = Hub(private=False)
    with pytest.raises(ValueError, match="ada/mine exists and is public, not private as asked"):
        push_to_hub(folder, "ada/mine", api=hub)
    assert hub.files == {}
    refusal = HfHubHTTPError("401 Client Error", response=SimpleNamespace(headers={}, request=None))
    with pytest.raises(ValueError, match="log in with `hf auth login`"):
        push_to_hub(folder, "ada/mine", api=Hub(error=refusal))
    (folder / "README.md").unlink()
    hub = Hub()
    with pytest.raises(ValueError, match="it has no README.md"):
        push_to_hub(folder, "ada/mine", api=hub)
    assert hub.asked == []


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hf", "gguf", "onnx"])
def test_a_checkpoint_is_exported_from_the_command_line(format, saved, tmp_path):
    out = tmp_path / "out"
    flags = ["--format", format, "--kind", "F32", "--out", str(out), "--title", "Mine"]
    said = run("--model", str(saved), *flags)
    assert sorted(said) == sorted(
        f"wrote {path} ({path.stat().st_size:,} bytes)" for path in tmp_path.rglob("*") if path.is_file()
    )
    if format == "onnx":
        assert OnnxModel(out).generate([prompt(QWEN)], NEW) == [greedy(QWEN)]
        assert Tokenizer.load(tmp_path / "out.tokenizer.json").fingerprint == bpe().fingerprint
        return
    back = {"hf": from_hf, "gguf": from_gguf}[format](out)
    assert same_tensors(back, made(QWEN))
    if format == "hf":
        card = (out / "README.md").read_text()
        assert "# Mine" in card and "| val loss | 1.234 |" in card


@pytest.mark.parametrize("form", ["plain", "quantized"])
def test_an_adapter_is_merged_into_what_is_exported(form, saved, tmp_path):
    """The exported model computes what the adapted one does; the base's figures are not claimed for it."""
    base = copy.deepcopy(made(QWEN))
    folder = saved
    if form == "quantized":
        base = quantize(base, "nf4", say=lambda line: None, kernels=())
        folder = save_quantized(base, tmp_path / "q", bpe(), {"val_loss": 1.2345})
    adapted = add_lora(base, LoRAConfig(r=4, target_modules=("q_proj", "down_proj")))
    generator = torch.Generator().manual_seed(0)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    save_adapter(adapted, tmp_path / "adapter")
    out = tmp_path / "out"
    run("--model", str(folder), "--adapter", str(tmp_path / "adapter"), "--out", str(out))
    same_logits(from_hf(out)(idx()), adapted(idx()))
    assert (adapted(idx()) - made(QWEN)(idx())).abs().max() > 0.1
    assert "1.234" not in (out / "README.md").read_text()


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_plain_base_is_rounded_as_it_was_when_the_adapter_learned(format, saved, tmp_path, monkeypatch):
    """QLoRA: the merged model computes what the adapter over the rounded base does, but for fp32's rounding;
    `--out` left away, the file is called as the adapter is.
    """
    base = quantize(copy.deepcopy(made(QWEN)), "nf4", 32, say=lambda line: None, kernels=())
    adapted = add_lora(base, LoRAConfig(r=4, target_modules=("all-linear",)))
    generator = torch.Generator().manual_seed(0)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    save_adapter(adapted, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    said = run(
        *("--model", str(saved), "--adapter", str(tmp_path / "mine")),
        *("--format", format, "--kind", "F32"),
    )
    assert said[0] == "the base is rounded to nf4 first, as it was when the adapter learned"
    back = from_hf("mine-hf") if format == "hf" else from_gguf("mine.gguf")
    same_logits(back(idx()), adapted(idx()))
    unrounded = merge_lora(load_adapter(copy.deepcopy(made(QWEN)), tmp_path / "mine"))
    assert (unrounded(idx()) - adapted(idx())).abs().max() > 0.1  # so the rounding is no trifle
    if format == "gguf":
        tensors = {tensor.name: tensor for tensor in GGUFReader("mine.gguf").tensors}
        weight = tensors["blk.0.ffn_up.weight"].data
        expected = adapted.blocks[0].mlp.up_proj.weight.detach()
        torch.testing.assert_close(torch.from_numpy(weight.copy()), expected, atol=1e-6, rtol=1e-6)


def test_a_soft_prompt_is_not_exported_as_if_it_were_merged(saved, tmp_path):
    prompt = save_adapter(add_prompt(copy.deepcopy(made(QWEN)), 4), tmp_path / "prompt")
    with pytest.raises(ValueError, match="holds a soft prompt"):
        run("--model", str(saved), "--adapter", str(prompt), "--out", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="holds no adapter"):
        run("--model", str(saved), "--adapter", str(tmp_path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_runs_in_a_process_of_its_own(saved, tmp_path):
    command = [
        sys.executable,
        "-m",
        "shared.export",
        "--model",
        str(saved),
        "--format",
        "gguf",
        "--kind",
        "F32",
        "--out",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "m.gguf"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.startswith("wrote m.gguf ("), done.stderr
    assert same_tensors(from_gguf(tmp_path / "m.gguf"), made(QWEN))
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and "is a folder" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_the_command_line_refuses_what_cannot_be(saved, tmp_path):
    with pytest.raises(ValueError, match="--push uploads a Hugging Face folder, not gguf"):
        flags = ["--format", "gguf", "--out", str(tmp_path / "m"), "--push", "ada/mine"]
        run("--model", str(saved), *flags)
    with pytest.raises(ValueError, match="no checkpoint in"):
        run("--model", str(tmp_path / "none"), "--out", str(tmp_path / "m"))
    assert os.listdir(tmp_path) == []


def test_a_folder_of_settings_is_json_that_others_read(saved, tmp_path):
    run("--model", str(saved), "--out", str(tmp_path / "m"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["dtype"] == "float32"
    assert (
        config["eos_token_id"]
        == json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"]
        == 309
    )
