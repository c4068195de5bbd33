"""shared/export/onnx.py: ONNX Runtime gives our logits and writes our tokens."""

import onnxruntime
import pytest
import torch

from shared.export import onnx as onnx_export
from shared.export import to_onnx
from shared.export.onnx import OnnxModel
from shared.models.gpt import GPT, GPTConfig
from shared.sampling import generate
from tests.export.helpers import CONFIGS, CONFIGS_ONNX, NEW, greedy, idx, made, prompt, same_logits
from tests.helpers import shake

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=CONFIGS_ONNX)
def onnx(request, tmp_path_factory):
    """(our model, its file)"""
    torch.manual_seed(0)
    model = (
        made(request.param) if request.param in CONFIGS else shake(GPT(CONFIGS_ONNX[request.param])).eval()
    )
    return request.param, model, to_onnx(model, tmp_path_factory.mktemp("onnx") / "m.onnx")


def test_onnx_runtime_gives_our_logits_at_any_batch_time_and_past(onnx):
    _, model, path = onnx
    assert sorted(p.name for p in path.parent.iterdir()) == ["m.onnx"]
    run = OnnxModel(path)
    assert run.config == model.config
    for batch, cuts in ((1, [1]), (1, [40]), (2, [40]), (2, [1, 1, 5, 33]), (1, [39, 1]), (3, [0, 7])):
        ids = idx(batch, sum(cuts))
        with torch.inference_mode():
            expected = model(ids)
        past, start = run.new_cache(batch), 0
        for size in filter(None, cuts):
            logits, past = run(ids[:, start : start + size].numpy(), past)
            same_logits(logits, expected[:, start : start + size], 1e-4)
            start += size
        assert past[0].shape == (batch, model.config.kv_heads, start, model.config.head_dim)


def test_onnx_runtime_writes_the_same_64_tokens_for_each_row_of_a_batch(onnx):
    name, model, path = onnx
    run = OnnxModel(path, threads=1)
    prompts = idx(2, 20).tolist()
    expected = [list(generate(model, row, NEW, temperature=0)) for row in prompts]
    assert run.generate(prompts, NEW) == expected
    assert [run.generate([row], NEW)[0] for row in prompts] == expected
    if name in CONFIGS:
        assert run.generate([prompt(name)], NEW) == [greedy(name)]


def test_inputs_and_outputs_have_the_names_that_others_use(onnx):
    _, model, path = onnx
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    flat = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [i.name for i in session.get_inputs()] == ["input_ids", *(f"past_key_values.{n}" for n in flat)]
    assert [o.name for o in session.get_outputs()] == ["logits", *(f"present.{n}" for n in flat)]
    shape = session.get_inputs()[1].shape
    assert shape[1::2] == [model.config.kv_heads, model.config.head_dim] and all(
        isinstance(size, str) for size in shape[::2]
    )


def test_weights_of_a_large_model_go_into_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    model = shake(GPT(GPTConfig(vocab_size=320, block_size=64, n_layer=1, n_head=2, n_embd=32))).eval()
    path = to_onnx(model, tmp_path / "m.onnx")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
        and path.stat().st_size < 200_000
    )
    with torch.inference_mode():
        same_logits(OnnxModel(path)(idx().numpy(), OnnxModel(path).new_cache(2))[0], model(idx()), 1e-4)
    monkeypatch.undo()
    to_onnx(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]  # nothing is left of what was written before


def test_the_runner_says_what_is_wrong(onnx, tmp_path):
    _, model, path = onnx
    run = OnnxModel(path)
    with pytest.raises(ValueError, match="129 tokens do not fit in block_size=128"):
        run(idx(1, 129).numpy(), run.new_cache())
    with pytest.raises(ValueError, match="all of the same length"):
        run.generate([[1, 2], [3]], 4)
    assert run.generate([[1, 2]], 0) == [[]]
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-1000])
    for name in ("cut.onnx", "none.onnx"):
        with pytest.raises(ValueError, match=f"{name} is missing, cut or damaged"):
            OnnxModel(tmp_path / name)
