"""python -m shared.quantization: any model, from the command line to a checkpoint."""

import math

import pytest
import torch
from safetensors.torch import load_file

from shared import checkpoint
from shared.commandline import parse_args
from shared.evaluation import score_text
from shared.models.pretrained import load_model
from shared.quantization import __main__ as command
from shared.quantization.modules import load_quantized, quantization_of, quantize
from tests.quantization.helpers import TIED, TOKENIZER, gpt, quiet

TEXT = "".join(TOKENIZER.decode([i * i % 53]) for i in range(600))


def run(*args: str) -> list[str]:
    lines: list[str] = []
    command.main(parse_args(command.Settings, list(args)), lines.append)
    return lines


@pytest.fixture
def model(tmp_path):
    checkpoint.save(gpt(TIED), tmp_path / "model", TOKENIZER)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "model")


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_it_writes_what_quantize_makes(scheme, model, tmp_path):
    lines = run("--model", model, "--scheme", scheme, "--out", str(tmp_path / "small"))
    expected = quantize(gpt(TIED), scheme, say=quiet)
    written = load_quantized(tmp_path / "small", scheme)
    assert written.tokenizer.fingerprint == TOKENIZER.fingerprint
    idx = torch.arange(30)[None]
    assert torch.equal(written.model(idx), expected(idx))
    assert lines[-1] == f"wrote {tmp_path / 'small'}" and "bits for each weight" in lines[-2]


def test_gptq_skipped_layers_and_perplexity(model, tmp_path):
    text = str(tmp_path / "text.txt")
    lines = run(
        *("--model", model, "--scheme", "int4", "--gptq", text, "--measure", text),
        *("--skip", "lm_head", "--measure-tokens", "200", "--out", str(tmp_path / "small")),
    )
    small = load_model(tmp_path / "small")
    assert quantization_of(small) == {"scheme": "int4", "group_size": 32}
    assert torch.equal(small.lm_head.weight, gpt(TIED).lm_head.weight)
    nearest = quantize(gpt(TIED), "int4", say=quiet)
    codes = load_file(tmp_path / "small" / "model.safetensors")["blocks.0.attn.q_proj.packed.codes"]
    assert not torch.equal(codes, nearest.state_dict()["blocks.0.attn.q_proj.packed.codes"])
    shown = TOKENIZER.decode(TOKENIZER.encode(TEXT)[:200])
    length = TIED.block_size
    for each, figure in zip((gpt(TIED), small), lines[-2].split(": ")[1].split(" (")[0].split(" -> ")):
        measured = score_text(each, shown, tokenizer=TOKENIZER, stride=length // 2)
        assert math.isclose(float(figure), measured.perplexity, abs_tol=0.006)


def test_what_cannot_be_done_is_said_before_a_model_is_loaded(model, tmp_path):
    of = ("--model", model, "--scheme", "int8")
    with pytest.raises(ValueError, match="GPTQ chooses codes of int4, and the scheme is int8"):
        run(*of, "--gptq", "text.txt", "--out", str(tmp_path / "small"))
    with pytest.raises(ValueError, match="is there already: choose a new folder"):
        run(*of, "--out", model)
    with pytest.raises(ValueError, match="cannot be read as a text in UTF-8"):
        run(*of, "--measure", "none.txt", "--out", str(tmp_path / "s"))
    assert not (tmp_path / "small").exists() and not (tmp_path / "s").exists()
