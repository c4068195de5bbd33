"""decoder.c for ARM's processors: compiled by a cross compiler, run under emulation, and compared with plain
C here. That plain C computes what PyTorch does is for test_decoder.py and test_kernels.py.
"""

import numpy as np
import pytest

from shared.compiled import compile_c, find_compiler
from shared.quantization.native import STANDARD, VARIANTS, variants
from shared.runtime import ROOT
from tests.arm import CROSS_COMPILER, EMULATED, numbers_by_name, run_on_arm

MAIN = ROOT / "tests/quantization/decoder_main.c"
PROCESSORS = {"dotprod": "cortex-a76", "neon": "cortex-a72"}
"""The variants for ARM, each with a processor that runs it and nothing newer."""
UNFUSED = ("-O1", "-ffp-contract=off")
"""ARM multiplies and adds in one instruction, which rounds once. Without that, and with as many lanes as in
plain C, all sums are the same.
"""
RASPBERRY_PI_4 = "processor : 0\nFeatures : fp asimd evtstrm crc32 cpuid\nCPU part : 0xd08\n"
GRAVITON_2 = "processor : 0\nFeatures : fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimddp\n"
EPYC = "processor : 0\nflags : fpu sse2 avx avx2 fma avx512f avx512bw avx512vl avx512dq avx512_vnni\n"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """decoder_main.c, for a variant and with the compiler's options: for ARM, or "plain" for this machine."""
    folder = tmp_path_factory.mktemp("arm")

    def build(variant, *options):
        program = folder / "_".join((variant, *options))
        if not program.exists():
            compiler = find_compiler() if variant == "plain" else CROSS_COMPILER
            strict = ("-Wall", "-Wextra", "-Werror", *(("-static",) if variant != "plain" else ()))
            compile_c(
                compiler, [MAIN], program, *strict, *options, flags=[[*VARIANTS[variant][0], *STANDARD]]
            )
        return program

    return build


@pytest.fixture(scope="module")
def plain(built) -> dict[str, np.ndarray]:
    """What plain C computes on this machine."""
    return numbers_by_name(built("plain", *UNFUSED), "print")


@EMULATED
@pytest.mark.parametrize("variant", PROCESSORS)
def test_without_fused_multiplication_arm_gives_plain_cs_bits(variant, built, plain):
    got = run_on_arm(built(variant, *UNFUSED), PROCESSORS[variant], "print")
    assert got.keys() == plain.keys() and len(got) > 20
    for name, expected in plain.items():
        if "erf" in name:  # the C library's, of which ARM's is another
            np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], expected, err_msg=name)


def tolerance(name: str) -> float:
    """By how much results may differ that are computed with fused multiplication, of the largest number."""
    if name.startswith("rounded"):
        return 0
    if "product" in name:
        return 1e-6
    # In a whole model an activation near the middle between two codes may be rounded to the other one.
    return 1e-5 if name.startswith(("fp32", "bf16")) else 1e-2


@EMULATED
@pytest.mark.parametrize("variant", PROCESSORS)
def test_as_it_is_compiled_for_use_arm_computes_what_plain_c_does(variant, built, plain):
    got = run_on_arm(built(variant), PROCESSORS[variant], "print")
    for name, expected in plain.items():
        scale = max(1.0, np.abs(expected[np.isfinite(expected)]).max())
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=tolerance(name) * scale, err_msg=name)


@EMULATED
@pytest.mark.parametrize("variant", PROCESSORS)
def test_on_arm_any_chunks_and_any_threads_give_the_same_bits(variant, built):
    run_on_arm(built(variant), PROCESSORS[variant])


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (RASPBERRY_PI_4, ["neon", "plain"]),
        (GRAVITON_2, ["dotprod", "neon", "plain"]),
        (EPYC, ["avx512", "avx2", "plain"]),
        ("processor : 0\n", ["plain"]),
    ],
    ids=["ARM of 2015", "ARM with dot products", "x86", "unknown"],
)
def test_the_variants_are_those_that_the_processor_says_it_runs(cpuinfo, expected, monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    monkeypatch.setattr("shared.quantization.native.CPUINFO", path)
    assert variants.__wrapped__() == expected


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("arm64", ["dotprod", "neon", "plain"]), ("x86_64", ["plain"])],
    ids=["Apple's", "Intel's"],
)
def test_without_a_cpuinfo_only_apples_processors_are_known(machine, expected, monkeypatch, tmp_path):
    monkeypatch.setattr("shared.quantization.native.CPUINFO", tmp_path / "none")
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert variants.__wrapped__() == expected
