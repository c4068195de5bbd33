"""shared/checkpoint.py: what is saved comes back bit for bit, all or nothing, and damage is named."""

import json
import os
import pickletools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from shared import checkpoint, registry
from shared.models.attention import AttentionLM, AttentionLMConfig
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.gpt import GPT, GPTConfig
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.models.pretrained import load_model
from shared.quantization.modules import quantize, save_quantized
from shared.registry import LanguageModel, register_model
from shared.runtime import ROOT
from shared.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijk")
V = TOKENIZER.vocab_size
SMALL = GPTConfig(vocab_size=V, block_size=8, n_layer=2, n_head=2, n_embd=8)
MODERN = replace(
    SMALL,
    tie_weights=False,
    norm="rmsnorm",
    position="rope",
    mlp="swiglu",
    n_kv_head=1,
    qk_norm=True,
    window=3,
)
MODELS = {
    "GPT": lambda: GPT(SMALL),
    "untied GPT": lambda: GPT(MODERN),
    "AttentionLM": lambda: AttentionLM(AttentionLMConfig(vocab_size=V, block_size=8, n_embd=8, n_head=2)),
    "WindowMLP": lambda: WindowMLP(WindowMLPConfig(vocab_size=V)),
    "BigramModel": lambda: BigramModel(BigramConfig(V)),
    "counted BigramModel with logits of minus infinity": lambda: BigramModel.from_counts(
        torch.eye(V, dtype=torch.int64), smoothing=0
    ),
}


def same(a: nn.Module, b: nn.Module) -> bool:
    first = a.state_dict()
    second = b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def saved(tmp_path) -> tuple[Path, GPT]:
    """A whole checkpoint with training state, and the model in it."""
    torch.manual_seed(0)
    model = GPT(SMALL)
    folder = checkpoint.save(
        model,
        tmp_path / "model",
        TOKENIZER,
        {"val_loss": 1.5},
        tensors={"moment": torch.ones(2)},
        state={"step": 3},
    )
    return folder, model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    checkpoint.save(model, tmp_path / "deep" / "model", TOKENIZER, {"val_loss": 1.25})
    torch.manual_seed(1)
    loaded = checkpoint.load(tmp_path / "deep" / "model", TOKENIZER)
    assert type(loaded.model) is type(model)
    assert loaded.model.config == model.config
    assert same(loaded.model, model)
    assert not loaded.model.training
    assert loaded.metrics == {"val_loss": 1.25}
    assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert loaded.tensors is None and loaded.state is None
    idx = torch.randint(V, (2, 8))
    assert torch.equal(loaded.model(idx), model.eval()(idx))


def test_tied_weights_are_stored_once_and_tied_again(saved):
    folder, model = saved
    stored = load_file(folder / "model.safetensors")
    assert ("token_embedding.weight" in stored) != ("lm_head.weight" in stored)
    loaded = checkpoint.load(folder).model
    assert loaded.lm_head.weight is loaded.token_embedding.weight
    assert sum(t.numel() for t in stored.values()) == model.num_parameters()


def test_training_state_comes_back_with_every_kind_of_tensor(tmp_path):
    tensors = {
        "a": torch.tensor(3.0),
        "rng": torch.get_rng_state(),
        "t": torch.randn(3, 4).T,
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    state = {"step": 7, "best": {"val_loss": 0.1 + 0.2}, "note": "ä"}
    checkpoint.save(GPT(SMALL), tmp_path / "m", tensors=tensors, state=state)
    loaded = checkpoint.load(tmp_path / "m")
    assert loaded.state == state and loaded.tokenizer is None and loaded.metrics == {}
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_saving_again_replaces_all_of_the_old_one(saved):
    folder, _ = saved
    new = BigramModel(BigramConfig(V))
    checkpoint.save(new, folder, TOKENIZER)
    loaded = checkpoint.load(folder)
    assert same(loaded.model, new) and loaded.state is None
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_from_checkpoint_gives_a_gpt_with_its_tokenizer(saved, tmp_path):
    folder, model = saved
    loaded = GPT.from_checkpoint(folder)
    assert same(loaded, model) and len(loaded.generate("abc", 5, seed=0)) == 5
    other = checkpoint.save(BigramModel(BigramConfig(V)), tmp_path / "other")
    with pytest.raises(ValueError, match="holds a BigramModel, not a GPT"):
        GPT.from_checkpoint(other)


def test_nothing_in_a_checkpoint_is_pickled(saved):
    folder, _ = saved
    files = sorted(p.name for p in folder.iterdir())
    assert files == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "training.json",
        "training.safetensors",
    ]
    for name in files:
        content = (folder / name).read_bytes()
        header = content if name.endswith(".json") else content[8 : 8 + int.from_bytes(content[:8], "little")]
        assert isinstance(json.loads(header), dict)
        with pytest.raises(ValueError):
            list(pickletools.genops(content))


# ---- damaged


@pytest.mark.parametrize(
    "name", ["model.safetensors", "training.safetensors", "training.json", "config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.99])
def test_a_cut_file_is_a_value_error_that_names_it(saved, name, keep):
    folder, _ = saved
    size = (folder / name).stat().st_size
    if keep != 4:
        keep = min(int(size * keep), size - 3)  # of a small JSON file at least the brace goes
    os.truncate(folder / name, keep)
    with pytest.raises(ValueError, match=name):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["training.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[" * 10**5, '{"a":' * 10**5], ids=["lists", "objects"])
def test_a_file_that_is_nested_too_deeply_is_a_value_error_that_names_it(saved, name, content):
    folder, _ = saved
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_a_missing_file_is_a_value_error_that_names_it(saved, name):
    folder, _ = saved
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing, cut or damaged"):
        checkpoint.load(folder)


def test_a_folder_without_a_checkpoint_is_named_with_what_was_expected(tmp_path):
    message = "expected a folder with config.json and model.safetensors"
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert checkpoint.find(folder) is None
        with pytest.raises(ValueError, match=f"no checkpoint in {folder}: {message}"):
            checkpoint.load(folder)


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("laptop/tinyshakespeare/headline/best", "python weeks/04_mini_gpt/run.py --preset laptop"),
        ("smoke/shakespeare/headline/last", "weeks/04_mini_gpt/run.py --preset smoke --data shakespeare"),
        ("gpu/my-code/tinyshakespeare/headline/best", "--preset gpu --run-name my-code"),
        ("laptop/rhyme-0123/headline/best", "--preset laptop --data FILE, with the text it is for"),
    ],
)
def test_a_missing_checkpoint_of_a_week_is_named_with_the_command_that_makes_it(tmp_path, folder, command):
    for load in (checkpoint.load, load_model):
        with pytest.raises(ValueError) as error:
            load(str(tmp_path / "checkpoints" / "04_mini_gpt" / folder))
        assert str(error.value).startswith("no checkpoint in")
        assert str(error.value).endswith(command)


@pytest.mark.parametrize("folder", [".", "", "..", "inside/.."])
def test_a_folder_may_be_named_by_where_the_program_is(saved, monkeypatch, folder):
    monkeypatch.chdir(saved[0].parent)
    assert checkpoint.find(folder) is None
    assert checkpoint.read_metrics(folder) == {}
    with pytest.raises(ValueError, match="no checkpoint in .*: expected a folder"):
        checkpoint.load(folder)
    (saved[0] / "inside").mkdir()
    monkeypatch.chdir(saved[0] / "inside" if folder == ".." else saved[0])
    assert checkpoint.find(folder) == Path(folder)
    assert same(checkpoint.load(folder).model, saved[1])


def test_where_the_program_is_a_checkpoint_that_a_kill_left_beside_is_found(saved, monkeypatch):
    folder = saved[0]
    folder.rename(folder.with_name("model.old"))
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert checkpoint.find(".") == folder.with_name("model.old")


@pytest.mark.parametrize("folder", [".", ".."])
def test_the_folder_that_the_program_is_in_is_not_replaced(saved, monkeypatch, folder):
    monkeypatch.chdir(saved[0])
    with pytest.raises(ValueError, match="cannot be replaced as a whole: give a folder with a name"):
        checkpoint.save(saved[1], folder)
    assert same(checkpoint.load(".").model, saved[1])


def rewrite(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["Transformer", "KVCache", "GPTConfig", None, "__all__"])
def test_an_unknown_model_is_named_with_the_known_ones(saved, name):
    rewrite(saved[0], model=name)
    with pytest.raises(ValueError, match=f"names a model {name!r}; known are: .*GPT"):
        checkpoint.load(saved[0])


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        '{"model": "GPT"}',
        '{"model": "GPT", "config": 3}',
        '{"model": "GPT", "config": {"n_layers": 3}}',
    ],
)
def test_a_config_that_describes_no_model_is_a_value_error_that_names_it(saved, content):
    (saved[0] / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        checkpoint.load(saved[0])


def test_tensors_of_another_shape_are_named(saved):
    config = json.loads((saved[0] / "config.json").read_text())["config"]
    rewrite(saved[0], config=config | {"block_size": 9})
    message = r"does not fit the model: position_embedding.weight is \[8, 8\], the model's \[9, 8\]$"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(saved[0])


def test_tensors_too_few_and_too_many_are_named_and_counted(saved):
    config = json.loads((saved[0] / "config.json").read_text())["config"]
    rewrite(saved[0], config=config | {"n_layer": 3})
    with pytest.raises(ValueError, match=r"blocks.2.attn_norm.weight is missing; .* \(and 13 more\)"):
        checkpoint.load(saved[0])
    rewrite(saved[0], config=config)
    tensors = load_file(saved[0] / "model.safetensors")
    for count, end in (
        (1, "extra0 is not in the model"),
        (3, "extra2 is not in the model"),
        (4, "and 1 more"),
    ):
        extra = {f"extra{i}": torch.ones(1) for i in range(count)}
        save_file(tensors | extra, saved[0] / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{end}\)?$"):
            checkpoint.load(saved[0])


def test_a_models_name_belongs_to_the_module_that_registered_it_first(monkeypatch):
    class GPT(LanguageModel):  # as in a notebook that defines its own
        config: GPTConfig

    with pytest.raises(ValueError, match="a model called GPT is registered by shared.models.gpt"):
        register_model(GPTConfig)(GPT)
    GPT.__module__ = "shared.models.gpt"  # the same module, imported again
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    assert register_model(GPTConfig)(GPT) is GPT and registry.MODELS["GPT"] == (GPT, GPTConfig)


def test_another_tokenizer_is_refused(saved, tmp_path):
    message = r"made with a tokenizer of 11 tokens, another than the one in use \(3 tokens\)"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(saved[0], CharTokenizer("xyz"))
    with pytest.raises(ValueError, match="another than the one in use"):
        checkpoint.load(saved[0], CharTokenizer(TOKENIZER.chars[::-1]))  # as many tokens, in another order
    checkpoint.save(GPT(SMALL), tmp_path / "none")
    with pytest.raises(ValueError, match="made with no tokenizer"):
        checkpoint.load(tmp_path / "none", TOKENIZER)


def in_a_new_python(program: str) -> list[str]:
    """What a fresh interpreter prints, line by line."""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.slow
def test_a_model_is_imported_without_the_models_of_later_weeks():
    program = "import sys, shared.models.bigram; print(*sorted(m for m in sys.modules if 'shared' in m[:6]))"
    (line,) = in_a_new_python(program)
    week_0 = {"shared"} | {f"shared.{m}" for m in ("checks", "devices", "locks", "runtime", "trackers")}
    assert set(line.split()) == week_0 | {"shared.models", "shared.models.bigram", "shared.registry"}


@pytest.mark.slow
def test_a_quantized_checkpoint_is_refused_where_no_module_can_rebuild_it(tmp_path):
    save_quantized(quantize(GPT(SMALL), "int8"), tmp_path / "int8")
    program = f"""
from shared import checkpoint, registry
import shared.models.gpt
try:
    checkpoint.load({str(tmp_path / "int8")!r})
except ValueError as error:
    print(error)
import shared.quantization
print(type(checkpoint.load({str(tmp_path / "int8")!r}).model).__name__)
"""
    refusal, name = in_a_new_python(program)
    assert refusal == (
        f"the model in {tmp_path / 'int8'} was saved with quantization, which no module imported so far can"
        " rebuild: import the one that does (for quantization: shared.quantization)"
    )
    assert name == "GPT"


# ---- all or nothing


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["save_file", "_sync", "os.fsync", "Path.write_text"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(saved, monkeypatch, where):
    folder, model = saved
    owners = {"save_file": checkpoint, "_sync": checkpoint, "os.fsync": os, "Path.write_text": Path}
    with monkeypatch.context() as patch:
        patch.setattr(owners[where], where.split(".")[-1], full)
        with pytest.raises(OSError) as error:
            checkpoint.save(GPT(SMALL), folder, TOKENIZER, state={"step": 4})
        assert error.value.errno == 28
    loaded = checkpoint.load(folder)
    assert same(loaded.model, model) and loaded.state == {"step": 3}
    assert [p.name for p in folder.parent.iterdir()] == ["model"]  # and nothing half-written beside it


def test_a_full_disk_is_told_apart_when_safetensors_reports_it(saved, tmp_path, monkeypatch):
    # It passes on the system's own words ...
    with pytest.raises((SafetensorError, OSError), match="No such file or directory"):
        save_file({"a": torch.ones(1)}, tmp_path / "nowhere" / "file")

    # ... and these are the ones for a full disk.
    def report(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", report)
    with pytest.raises(OSError) as error:
        checkpoint.save(GPT(SMALL), saved[0])
    assert error.value.errno == 28 and same(checkpoint.load(saved[0]).model, saved[1])


class Killed(BaseException):
    """Stands for a kill: nothing after it runs, because the rename that raises it stays broken."""


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_kill_between_the_renames_leaves_a_whole_checkpoint(saved, monkeypatch, survivors):
    folder, old = saved
    new = GPT(SMALL)
    renamed = []
    rename = Path.rename

    def dying(self, target):
        if len(renamed) == survivors:
            raise Killed
        renamed.append(target)
        rename(self, target)
        if len(renamed) == 2:  # killed right after the second one, before the old folder is removed
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(Killed):
            checkpoint.save(new, folder, TOKENIZER, state={"step": 4})
    loaded = checkpoint.load(folder)
    model, step = (new, 4) if survivors == 2 else (old, 3)
    assert same(loaded.model, model)
    assert loaded.state["step"] == step
    checkpoint.save(new, folder, TOKENIZER)  # and the next save clears up
    assert same(checkpoint.load(folder).model, new)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_kill_in_the_first_save_leaves_no_checkpoint_rather_than_half_of_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(OSError):
            checkpoint.save(GPT(SMALL), tmp_path / "m")
    assert checkpoint.find(tmp_path / "m") is None
    checkpoint.save(GPT(SMALL), tmp_path / "m")
    assert checkpoint.find(tmp_path / "m") == tmp_path / "m"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


SAVER = """
import sys
import torch
from shared import checkpoint, registry
from shared.models.gpt import GPT, GPTConfig

torch.set_num_threads(1)
number = int(sys.argv[2])
model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(number)
for turn in range(40):
    checkpoint.save(model, sys.argv[1], metrics={"by": number}, state={"by": number, "turn": turn})
"""


@pytest.mark.slow
def test_two_processes_that_save_the_same_folder_take_turns(tmp_path):
    folder = tmp_path / "c" / "model"
    both = [subprocess.Popen([sys.executable, "-c", SAVER, str(folder), str(n)]) for n in (1, 2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    loaded = checkpoint.load(folder)
    by = loaded.metrics["by"]
    assert loaded.state == {"by": by, "turn": 39}  # one of the last saves, whole
    assert all((parameter == by).all() for parameter in loaded.model.parameters())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_every_file_and_the_folder_are_synced_before_the_rename(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def noted(handle):
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError):
        checkpoint.save(GPT(SMALL), tmp_path / "m", TOKENIZER, state={"step": 1})
    assert set(synced) >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "training.json",
        "training.safetensors",
        "m.new",
    }


def test_a_compiled_model_is_saved_like_the_model_in_it(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=8, tie_weights=True))
    checkpoint.save(torch.compile(model), tmp_path / "c")
    loaded = checkpoint.load(tmp_path / "c").model
    assert type(loaded) is GPT
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
