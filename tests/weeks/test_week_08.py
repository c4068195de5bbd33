"""weeks/08_quantization: what SmoothQuant and AWQ promise; the exercises against what the course and NumPy
compute; the excerpts of C; the run with the learner's own layers.
"""

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from shared import compiled
from shared.course.exercise import Week, grade
from shared.course.exercise.answers import load_module
from shared.course.report import load_script, read_runs
from shared.models.gpt import GPT, GPTConfig
from shared.models.layers import Linear
from shared.quantization import quantize
from shared.quantization.gptq import gptq_round
from shared.quantization.kernels import with_kernel
from shared.quantization.packing import Int4Weight, Int8Weight, absmax_int8, group_ranges
from shared.runtime import ROOT
from tests.quantization.helpers import COMPILED
from tests.weeks.helpers import DATA, script

WEEK = Week(8)
ANSWERS = load_module(ROOT / "weeks/08_quantization/answers.py", "answers_08")
BOTH = pytest.mark.parametrize("kind", ["the reference", "the clean answer"])
outliers = load_script("08_quantization", "outliers")


def layer(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [48, 128], and inputs [200, 128] to choose by and to measure on; three channels are large."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.ones(128)
    large[[3, 40, 99]] = 60.0
    weight = torch.randn(48, 128, generator=generator)
    seen, held_out = torch.randn(2, 200, 128, generator=generator) * large
    return weight, seen, held_out


@pytest.mark.parametrize("seed", range(5))
def test_smoothing_changes_no_product_and_shares_what_is_large(seed):
    weight, seen, _ = layer(seed)
    scale = outliers.smooth_scales(weight, seen)
    torch.testing.assert_close((seen / scale) @ (weight * scale).T, seen @ weight.T, atol=1e-3, rtol=1e-4)
    largest = [(seen / scale).abs().amax(0), (weight * scale).abs().amax(0)]
    torch.testing.assert_close(*largest)  # at α = 0.5 both have the same largest value in every channel


@pytest.mark.parametrize("seed", range(5))
def test_awq_is_never_behind_rounding_to_nearest_on_what_it_has_seen(seed):
    weight, seen, held_out = layer(seed)
    exact = seen @ weight.T
    awq = (seen @ outliers.awq_rounded(weight, seen).T - exact).norm()
    nearest = (seen @ outliers._in_int4(weight).T - exact).norm()
    assert awq < 0.9 * nearest  # large channels: there is something to gain
    errors = outliers.errors_of(weight, seen, held_out)
    assert errors["int4_awq"] < errors["int4_nearest"] and errors["int8_smooth"] < errors["int8_both"]


# ---- the exercises


def answer(kind: str, name: str):
    return WEEK.exercises[name].reference if kind == "the reference" else getattr(ANSWERS, name)


def exercise_module():
    return load_module(ROOT / "weeks/08_quantization/exercises.py", "exercises_08")


@BOTH
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_her_layer_has_the_weight_of_the_courses_to_the_last_bit(kind, group_size):
    torch.manual_seed(group_size)
    linear = torch.nn.Linear(128, 7)
    linear.weight.data[3, :group_size] = 0.5
    hers, ours = answer(kind, "QuantizedLinear")(linear, group_size), Int4Weight(linear.weight, group_size)
    assert torch.equal(hers.codes, ours.codes)
    assert torch.equal(torch.stack([hers.scale, hers.zero], -1), ours.scale_zero)
    assert torch.equal(hers.unpacked(), ours.rows(slice(None)))
    steps = hers.scale.float().repeat_interleave(group_size, 1)
    assert bool(((hers.unpacked() - linear.weight).abs() <= 0.6 * steps + 1e-6).all())


@BOTH
@pytest.mark.parametrize("skip", [(), ("lm_head",), ("blocks.0.*", "*.down_proj")])
def test_her_swap_makes_the_model_that_quantize_makes(kind, skip):
    torch.manual_seed(0)
    config = GPTConfig.preset("mini", vocab_size=40, n_layer=2, n_embd=64, zero_init=False)
    model = GPT(config).eval()
    make = partial(answer(kind, "QuantizedLinear"), group_size=32)
    hers = answer(kind, "swap_linears")(deepcopy(model), make, skip)
    ours = quantize(deepcopy(model), "int4", skip=skip, say=lambda line: None, kernels=())
    idx = torch.randint(40, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(hers(idx), ours(idx), atol=1e-5, rtol=1e-5)
    left = [name for name, module in hers.named_modules() if isinstance(module, Linear)]
    assert left == [name for name, module in ours.named_modules() if isinstance(module, Linear)]
    assert not any(module.training for module in hers.modules())


def correlated(seed: int, columns: int, mixing: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, columns], and inputs that rise and fall together [300, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + mixing * torch.rand(columns, columns, generator=generator)
    x = torch.randn(300, columns, generator=generator) @ mix
    return torch.randn(24, columns, generator=generator), x


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_gptq_matrix_is_the_courses_where_the_order_is_the_same(kind, seed):
    """With inputs whose sizes fall from column to column, act-order is the plain order."""
    weight, x = correlated(seed, 64)
    x = x / x.norm(dim=0) * torch.linspace(3, 1, 64)
    hessian = x.T @ x
    assert torch.equal(hessian.diag().argsort(descending=True), torch.arange(64))
    scale, zero = (part.float() for part in group_ranges(weight, 32))
    hers = answer(kind, "gptq_matrix")(weight, hessian, scale, zero, 0.01)
    ours = gptq_round(weight, hessian, scale, zero, 0.01)
    # A number half way between two codes may go either way; what follows it in its row then differs too.
    same = (hers - ours).abs().amax(1) < 1e-4
    assert same.float().mean() > 0.9


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_gptq_matrix_is_nearer_in_the_output_than_rounding_to_nearest(kind, seed):
    weight, x = correlated(seed, 64)
    scale, zero = (part.float() for part in group_ranges(weight, 32))
    hers = answer(kind, "gptq_matrix")(weight, x.T @ x, scale, zero, 0.01)
    nearest = Int4Weight(weight, 32).rows(slice(None))
    errors = [(x @ (q - weight).T).norm() for q in (hers, nearest)]
    assert errors[0] < 0.7 * errors[1]


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_gptq_matrix_is_rounding_to_nearest_where_no_inputs_go_together(kind, seed):
    weight, x = correlated(seed, 64)
    scale, zero = (part.float() for part in group_ranges(weight, 32))
    hers = answer(kind, "gptq_matrix")(weight, torch.diag(x.square().sum(0)), scale, zero, 0.01)
    torch.testing.assert_close(hers, Int4Weight(weight, 32).rows(slice(None)), atol=1e-6, rtol=0)


@COMPILED
@BOTH
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 1), (2, 7), (5, 16), (4, 33), (3, 1000), (2, 9001)])
def test_the_c_has_the_whole_numbers_of_numpy(kind, rows, columns):
    generator = np.random.default_rng(columns)
    w = generator.integers(-127, 128, (rows, columns), dtype=np.int8)
    w[0] = 127 * (-1) ** rows  # the largest sum
    x = np.full(columns, -127, np.int8)
    x[1::2] = generator.integers(-127, 128, columns // 2, dtype=np.int8)
    kernel = load_script("08_quantization", "kernel")
    matvec = kernel.compiled_matvec(answer(kind, "int8_dot_source")())
    right = w.astype(np.int64) @ x.astype(np.int64)
    np.testing.assert_array_equal(matvec(w, np.ones(rows), x, 1.0), right.astype(np.float32))
    scales = generator.random(rows, dtype=np.float32)
    np.testing.assert_allclose(matvec(w, scales, x, 0.25), right * scales * 0.25, rtol=1e-6)


BROKEN_C = {
    "int x = ;": ("the compiler does not take it. It says: answer.c:", "property"),
    "*(volatile int *)0 = 1;": ("the program crashed (SIGSEGV)", "property"),
    "for (;;) y[0] = x_scale * scale[0] + (float)*(volatile int8_t *)w;": (
        "it was still running after 1 s",
        "property",
    ),
    "for (int i = 0; i <= rows; i++) y[i] = 1;": ("not right yet", "differs"),
}


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("body", BROKEN_C)
def test_what_her_c_does_ends_no_other_process(body, monkeypatch):
    exercises = exercise_module()
    monkeypatch.setattr(exercises, "C_SECONDS", 1)
    source = exercises.int8_dot_source().replace("for (int row = 0;", f"{body}\n    for (int row = 0;")
    says, kind = BROKEN_C[body]
    verdict = grade(exercises.INT8_DOT_SOURCE, lambda: source)
    assert verdict.status == "wrong" and says in verdict.says


@COMPILED
@pytest.mark.parametrize("made", [None, 3, "int f(void) { return 1; }"])
def test_what_is_no_source_is_told(made):
    verdict = grade(WEEK.exercises["int8_dot_source"], [lambda: made, lambda: [made][0]][made is None])
    assert verdict.status == "wrong" and verdict.kind == "property"


def test_without_a_compiler_the_product_in_c_is_not_attempted_and_the_notebook_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    verdict = grade(WEEK.exercises["int8_dot_source"], ANSWERS.int8_dot_source)
    assert verdict.status == "not attempted"
    assert "it needs a C compiler (cc, gcc or clang)" in verdict.message
    kernel = load_script("08_quantization", "kernel")
    assert kernel.compiled_matvec(ANSWERS.int8_dot_source()) is None
    assert "int8_matvec is not compiled: it needs a C compiler" in capsys.readouterr().out


@COMPILED
@BOTH
@pytest.mark.parametrize("rows, groups", [(1, 1), (16, 2), (7, 3), (40, 18)])
def test_the_c_with_scales_for_groups_has_the_products_of_the_decoders_kernel(kind, rows, groups):
    generator = torch.Generator().manual_seed(rows)
    weight = Int8Weight(torch.randn(rows, 32 * groups, generator=generator), 32)
    token = torch.randn(1, 32 * groups, generator=generator)
    codes, scale = weight.codes_and_scale()
    x_codes, x_scale = absmax_int8(token.view(-1, 32))
    kernel = load_script("08_quantization", "kernel")
    matvec = kernel.compiled_grouped_matvec(answer(kind, "grouped_dot_source")())
    hers = matvec(codes.numpy(), scale.numpy(), x_codes.flatten().numpy(), x_scale.numpy())
    by_numpy = (codes.unflatten(1, (-1, 32)).double() * scale.double().unsqueeze(2)).flatten(1).numpy()
    right = by_numpy @ (x_codes.double() * x_scale.double()[:, None]).flatten().numpy()
    np.testing.assert_allclose(hers, right, rtol=1e-4, atol=1e-4)
    ours = with_kernel(weight, ("native",)).product(token)[0]
    np.testing.assert_allclose(hers, ours, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_her_loop_gives_the_sums_of_a_plain_one(kind, threads):
    """Loops that read what the one before wrote, as the decoder's do: prefix sums by doubling."""
    numbers = np.random.default_rng(0).integers(100, size=64)
    sums, step = numbers.copy(), 1
    while step < len(sums):
        before, sums = sums, sums.copy()
        share_a_doubling(answer(kind, "share"), before, sums, step, threads=threads)
        step *= 2
    np.testing.assert_array_equal(sums, np.cumsum(numbers))


def share_a_doubling(share, before: np.ndarray, after: np.ndarray, step: int, *, threads: int) -> None:
    def add(piece: int) -> None:
        if piece >= step:
            after[piece] = before[piece] + before[piece - step]

    share(len(after), add, threads)


def test_a_loop_by_the_librarys_pool_is_right_but_forbidden():
    def share(pieces, work, threads):
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(pieces)))

    verdict = grade(WEEK.exercises["share"], share)
    assert (verdict.status, verdict.kind) == ("wrong", "forbidden")


def test_grading_a_loop_leaves_no_thread_and_no_hook_behind():
    before = threading.enumerate(), threading.excepthook, threading.gettrace(), sys.gettrace()
    for mistake in WEEK.exercises["share"].mistakes:
        if mistake.name in ("a race on the counter", "a helper's error is lost"):
            assert grade(WEEK.exercises["share"], mistake.function).mistake == mistake.name
    after = threading.enumerate(), threading.excepthook, threading.gettrace(), sys.gettrace()
    assert after == before


@pytest.mark.parametrize("file", ["decoder.c", "kernels.h", "pool.h"])
def test_excerpts_are_whole_functions_of_the_file(file):
    """The braces of each are even, and together they are in the file as they stand."""
    kernel = load_script("08_quantization", "kernel")
    names = {"decoder.c": ("block", "forward"), "kernels.h": ("round_group", "panel_int8")}
    source = (ROOT / "shared/quantization" / file).read_text(encoding="utf-8")
    for name in names.get(file, ("take_piece", "share")):
        excerpt = kernel.c_function(file, name)
        assert excerpt in source and excerpt.count("{") == excerpt.count("}") > 0
        assert len(re.findall(r"^}", excerpt, re.MULTILINE)) == 1
    with pytest.raises(ValueError, match="no function nowhere"):
        kernel.c_function(file, "nowhere")


# ---- the run with her layers


@pytest.mark.slow
def test_the_run_with_her_layers_has_the_perplexity_of_int4(output, text_file, monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(tmp_path / "answers"))
    week = Week(8)
    for name in ("QuantizedLinear", "swap_linears"):
        week.check(getattr(ANSWERS, name))
    module, settings = script("08_quantization", data=text_file)
    plain = module.main(settings)
    mine = module.main(replace(settings, mine=True))
    assert "mine_perplexity" not in plain
    assert mine["int4_perplexity"] == pytest.approx(plain["int4_perplexity"], rel=1e-6)
    # The course's kernel for few rows rounds what a layer reads to 8 bits; hers reads it as it is.
    assert mine["mine_perplexity"] == pytest.approx(plain["int4_perplexity"], rel=1e-3)
    assert mine["mine_of_fp32"] == pytest.approx(plain["int4_of_fp32"], rel=1e-2)
    runs = read_runs(output / "logs/08_quantization/mine/smoke/my-code" / DATA)
    assert runs["mine"].summary["decode_tokens_per_second"] > 0
