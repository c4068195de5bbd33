"""shared/training/distributed.py: two processes give the losses of one, and so do their checkpoints."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from shared import checkpoint
from shared.data.corpus import batches, load_corpus
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import ROOT
from shared.training import TrainConfig, Trainer
from shared.training.base_model import BASE_PRESETS
from shared.training.distributed import Processes, pad_output_layer, process_group, recompute_blocks
from shared.training.execution import FP32, OneProcess, Precision, Share
from tests.helpers import synthetic_text
from tests.training.train_together import SomeTokens, train

pytestmark = pytest.mark.slow

KINDS = ["ddp", "fsdp"]
SMALL = GPTConfig(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Two processes' losses by name, the losses of one, and the folder with all checkpoints."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_WEEKS_DATA", str(folder / "cache"))
        text = folder / "text.txt"
        text.write_text(synthetic_text(), encoding="utf-8")
        corpus = load_corpus(str(text))
        alone = train(corpus, folder / "alone", OneProcess())
        train(corpus, folder / "one-ddp", OneProcess(), stop=True)
        shutil.copytree(folder / "one-ddp", folder / "one-fsdp")
        script = Path(__file__).with_name("train_together.py")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(script),
            str(text),
            str(folder),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        yield json.loads((folder / "losses.json").read_text()), alone, folder, corpus


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["", ", recomputed"])
def test_two_processes_give_the_losses_of_one(together, kind, how):
    losses, alone, _, _ = together
    assert len(alone) == 8
    assert losses[kind + how] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_learned_token_counts_alike_however_many_a_process_has(together, kind, tmp_path):
    losses, _, _, corpus = together
    alone = train(SomeTokens(corpus), tmp_path, OneProcess())
    assert losses[f"{kind}, some tokens"] == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [", resumed", ", resumed from one process"])
def test_two_processes_go_on_where_they_or_one_had_stopped(together, kind, how):
    losses, alone, _, _ = together
    assert losses[kind + how] == pytest.approx(alone[4:], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_where_two_had_stopped(together, kind):
    _, alone, folder, corpus = together
    losses = train(corpus, folder / f"{kind}-for-one", OneProcess(), resume=True)
    assert losses == pytest.approx(alone[4:], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["best", "last"])
def test_their_checkpoints_are_whole_and_the_same(together, kind, name):
    _, _, folder, _ = together
    theirs = checkpoint.load(folder / kind / name)
    ours = checkpoint.load(folder / "alone" / name)
    for (n, a), b in zip(theirs.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=n)
    if name == "last":
        assert theirs.tensors.keys() == ours.tensors.keys()
        for key in ours.tensors.keys() - {"random.cpu"}:
            torch.testing.assert_close(theirs.tensors[key], ours.tensors[key], rtol=1e-3, atol=1e-6, msg=key)


def test_recomputed_gradients_are_the_same():
    torch.manual_seed(0)
    model = GPT(replace(SMALL, n_layer=3, dropout=0.1, position="rope")).train()
    idx = torch.randint(40, (2, 16))
    grads = []
    for again in (False, True):
        if again:
            recompute_blocks(model)
        torch.manual_seed(1)
        model.zero_grad()
        model(idx).logsumexp(-1).sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.equal(grads[1][name]), name


def test_recomputing_keeps_fewer_activations():
    def kept(model: GPT) -> int:
        sizes = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(2, 16, dtype=torch.int64))
        return sum(sizes)

    model = GPT(replace(SMALL, n_layer=3)).train()
    before = kept(model)
    recompute_blocks(model)
    assert kept(model) < before / 3


def test_a_recomputing_model_writes_the_same_text_with_a_cache():
    model = GPT(SMALL).eval()
    idx = torch.randint(40, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(idx)
        recompute_blocks(model)
        cache = model.new_cache()
        parts = [model(idx[:, :5], cache), model(idx[:, 5:], cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


# ---- precision and refusals


def test_bf16_keeps_the_weights_in_fp32_and_computes_in_bf16(corpus):
    seen = []
    torch.manual_seed(0)
    model = GPT(replace(SMALL, vocab_size=corpus.tokenizer.vocab_size, n_layer=1))
    model.blocks[0].mlp.up_proj.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    config = TrainConfig(steps=2, batch_size=2, block_size=16, eval_every=2, eval_windows=2)
    losses = {}
    for precision in (FP32, Precision(torch.bfloat16)):
        losses[precision.dtype] = Trainer(model, corpus, config, precision=precision).fit()["first_loss"]
    assert seen[0] == torch.float32
    assert seen[-1] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[torch.float32] != losses[torch.bfloat16]
    assert losses[torch.float32] == pytest.approx(losses[torch.bfloat16], rel=0.05)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_training_has_the_same_losses(corpus, recompute, monkeypatch):
    """Traced and differentiated as for real; only the machine code, which needs a compiler, is not made."""
    compiled = []
    compile_anew = torch.compile

    def without_machine_code(module: torch.nn.Module):
        compiled.append(module)
        return compile_anew(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", without_machine_code)
    config = TrainConfig(
        steps=4, batch_size=4, block_size=16, grad_accum_steps=2, log_every=1, eval_every=4, eval_windows=4
    )
    losses = []
    for processes in (Processes(), Processes(compile_model=True, recompute=recompute)):
        torch.manual_seed(0)
        model = GPT(replace(SMALL, vocab_size=corpus.tokenizer.vocab_size))
        trainer = Trainer(model, corpus, config, processes=processes)
        trainer.fit()
        losses.append([row["train_loss"] for row in trainer.history if "train_loss" in row])
    assert len(compiled) == 1
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


def test_a_batch_that_cannot_be_shared_is_refused(corpus):
    class Three(OneProcess):
        world_size = 3

    with pytest.raises(ValueError, match="batch_size=4 cannot be shared by 3 processes"):
        Trainer(torch.nn.Linear(2, 2), corpus, TrainConfig(batch_size=4), processes=Three()).fit()


@pytest.mark.parametrize(
    ("kind", "message"), [("ddp", "torchrun"), ("fsdp", "torchrun"), ("tensor", "must be none, ddp or fsdp")]
)
def test_what_cannot_be_had_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        Processes(kind)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu") as (device, rank, size):
        assert (device.type, rank, size) == ("cpu", 0, 1)


# ---- shares of a step, and the padded vocabulary


@pytest.mark.parametrize("grad_accum_steps", [1, 2, 6, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_processes_together_read_each_row_of_a_step_once(grad_accum_steps, world_size):
    rows = 24
    read = []
    for rank in range(world_size):
        share = Share.of(grad_accum_steps, rank, world_size)
        numbers = range(share.first, grad_accum_steps, share.every)
        assert len(numbers) == share.micro_batches
        read += [(number, row) for number in numbers for row in range(share.rank, rows, share.world_size)]
    assert sorted(read) == [(number, row) for number in range(grad_accum_steps) for row in range(rows)]


def test_eight_processes_divide_the_accumulation_and_not_the_micro_batch():
    """The gpu preset: 16 micro-batches of 32 rows, by one GPU or by eight."""
    train = BASE_PRESETS["gpu"].train
    shares = [Share.of(train.grad_accum_steps, rank, 8) for rank in range(8)]
    assert {(share.micro_batches, share.world_size) for share in shares} == {(2, 1)}
    assert sum(share.micro_batches for share in shares) * train.batch_size * train.block_size == 524_288


def test_every_so_many_th_batch_is_the_one_of_that_number():
    tokens = np.arange(400, dtype=np.uint16)
    all_of_them = list(islice(batches(tokens, 8, 4, seed=3), 40))
    some = list(islice(batches(tokens, 8, 4, seed=3, start_step=2, every=5), 7))  # over several epochs
    for number, (x, y) in enumerate(some):
        assert torch.equal(x, all_of_them[2 + 5 * number][0]) and torch.equal(
            y, all_of_them[2 + 5 * number][1]
        )


def test_the_numbers_of_a_step_are_asked_for_once_and_not_for_every_micro_batch(corpus):
    class Counting(OneProcess):
        reductions = 0

        def mean(self, value: float) -> float:
            self.reductions += 1
            return value

    counts = []
    for grad_accum_steps in (1, 4):
        processes = Counting()
        config = TrainConfig(steps=1, batch_size=4, block_size=16, grad_accum_steps=grad_accum_steps)
        model = GPT(replace(SMALL, vocab_size=corpus.tokenizer.vocab_size, n_layer=1))
        trainer = Trainer(model, corpus, config, processes=processes)
        stream = trainer.task.batches(config, 0, 0, 1)
        asked = []
        with patch.object(torch.Tensor, "item", _counted(torch.Tensor.item, asked)):
            trainer.train_step(stream)
        counts.append((processes.reductions, len(asked)))
    assert counts[0] == counts[1]


def _counted(function, calls: list):
    def run(*arguments):
        calls.append(1)
        return function(*arguments)

    return run


@pytest.mark.parametrize("vocab_size", [64, 65, 50])
@pytest.mark.parametrize("tie_weights", [False, True])
def test_a_padded_vocabulary_changes_neither_logits_nor_gradients_nor_files(
    vocab_size, tie_weights, tmp_path
):
    torch.manual_seed(0)
    model = GPT(replace(SMALL, vocab_size=vocab_size, tie_weights=tie_weights)).double()
    idx = torch.randint(vocab_size, (2, 16))
    seen = []
    for padded in (False, True):
        if padded:
            pad_output_layer(model)
        model.zero_grad()
        logits = model(idx)
        assert logits.shape == (2, 16, vocab_size)
        logits.logsumexp(-1).sum().backward()
        files = {name: tensor.shape for name, tensor in model.state_dict().items()}
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        seen.append((logits.detach(), gradients, files))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-12, atol=1e-12)
    assert seen[0][2] == seen[1][2]


def test_the_padded_product_is_that_of_a_multiple_of_64():
    head = torch.nn.Linear(4, 70, bias=False)
    model = torch.nn.Module()
    model.lm_head = head
    pad_output_layer(model)
    shapes = []
    linear = torch.nn.functional.linear

    def seen(x, weight):
        shapes.append(tuple(weight.shape))
        return linear(x, weight)

    with patch.object(torch.nn.functional, "linear", seen):
        assert head(torch.ones(3, 4)).shape == (3, 70)
    assert shapes == [(128, 4)]
    with pytest.raises(ValueError, match="a Sequential has no lm_head"):
        pad_output_layer(torch.nn.Sequential())
