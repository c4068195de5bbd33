"""shared/quantization/native.py and kernels.py: what is compiled, whose code runs, which kernel is used."""

import os
import subprocess
import sys

import pytest
import torch

from shared import compiled
from shared.quantization import native, quantize
from shared.quantization.kernels import find_kernel
from shared.quantization.modules import save_quantized
from shared.runtime import ROOT
from tests.quantization.helpers import COMPILED, TIED, gpt, packed, quiet, random


@COMPILED
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_what_is_compiled_is_right_and_used(scheme, fresh):
    assert find_kernel(scheme) == ("native", "")


@COMPILED
def test_a_kernel_that_is_missing_or_computes_wrong_is_not_used(monkeypatch, fresh):
    assert find_kernel("nf4", ("torch",)) == (None, "torch: it does not know nf4")
    monkeypatch.setattr(native, "product", lambda x, weight: x.new_zeros(2, 64))
    assert find_kernel("int8") == ("torch", "native: it computes something else here")
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    find_kernel.cache_clear()
    kernel, reason = find_kernel("int8")
    assert kernel is None and "_weight_int8pack_mm" in reason


@pytest.mark.slow
@COMPILED
def test_a_library_that_another_user_wrote_is_not_run(monkeypatch, tmp_path, fresh):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path))
    uid = os.getuid()
    if uid == 0:
        native.library()
        native.load_variant.cache_clear()
        (path,) = (tmp_path / "native").glob("*.so")
        os.chown(path, 12345, -1)
    else:  # only root can give a file away: here we are another user than its writer from the start
        monkeypatch.setattr(compiled.os, "getuid", lambda: uid + 1)
    with pytest.raises(RuntimeError, match="belongs to another user"):
        native.library()


@COMPILED
def test_without_a_compiler_pytorchs_kernel_is_used_and_that_is_said(monkeypatch, fresh, capsys):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    quantize(gpt(TIED), "int8")
    reason = "decoder.c is not used: native: it needs a C compiler (cc, gcc or clang)"
    assert f"go through PyTorch's kernel ({reason}" in capsys.readouterr().out


@pytest.mark.slow
@COMPILED
def test_the_compiled_form_is_kept_and_belongs_to_its_source(monkeypatch, fresh, tmp_path):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path))
    x, layer = torch.ones(1, 32), packed(torch.ones(3, 32), "int8", ("native",))
    for _ in range(2):
        native.load_variant.cache_clear()
        torch.testing.assert_close(layer.product(x), torch.full((1, 3), 32.0))
        assert len(list((tmp_path / "native").iterdir())) == 1
    changed = tmp_path / "decoder.c"
    doubled = "to[o] + sums[PANEL * row + o] : 2 * sums[PANEL * row + o]"
    changed.write_text(native.SOURCE.read_text().replace(doubled.replace("2 * ", ""), doubled))
    for header in native.HEADERS:
        (tmp_path / header.name).write_text(header.read_text())
    monkeypatch.setattr(native, "SOURCE", changed)
    native.load_variant.cache_clear()
    torch.testing.assert_close(layer.product(x), torch.full((1, 3), 64.0))
    changed.write_text("this is not C")
    native.load_variant.cache_clear()
    with pytest.raises(RuntimeError, match="could not compile it"):
        native.library()
    assert len(list((tmp_path / "native").iterdir())) == 2


DAMAGES = {
    0: lambda whole: b"",
    64: lambda whole: whole[:64],
    0.5: lambda whole: whole[: len(whole) // 2],
    0.99: lambda whole: whole[: int(0.99 * len(whole))],
    "other bytes": lambda whole: whole[:1000] + bytes(byte ^ 255 for byte in whole[1000:1100]) + whole[1100:],
}
USING_EACH = """
import os, sys, torch
from pathlib import Path
from shared.quantization.kernels import find_kernel
for folder in sys.argv[1:]:
    if os.fork() == 0:
        os.environ["LLM_WEEKS_DATA"] = folder
        Path(folder, "said").write_text(repr(find_kernel("int8")))
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Folders of data by damage, each with a compiled form that was damaged before it was used; and the bytes
    of a whole one.

    Each is used in a process of its own: opening a library that was cut short can end the process.
    """
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_WEEKS_DATA", str(folder / "whole"))
        native.load_variant.cache_clear()
        native.library()
        native.load_variant.cache_clear()
    (path,) = (folder / "whole" / "native").iterdir()
    folders = {keep: folder / str(keep) for keep in DAMAGES}
    for keep, damage in DAMAGES.items():
        (folders[keep] / "native").mkdir(parents=True)
        (folders[keep] / "native" / path.name).write_bytes(damage(path.read_bytes()))
    command = [sys.executable, "-c", USING_EACH, *map(str, folders.values())]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    return folders, path.read_bytes()


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("keep", DAMAGES)
def test_a_compiled_form_that_is_damaged_is_compiled_anew(damaged, keep):
    folders, whole = damaged
    assert (folders[keep] / "said").read_text() == "('native', '')"
    (again,) = (folders[keep] / "native").iterdir()
    assert again.stat().st_size == len(whole)


@pytest.mark.slow
@COMPILED
def test_a_compiled_form_is_synced_before_it_has_its_name(monkeypatch, fresh, tmp_path):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path))
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append("replace") or replace(old, new))
    native.library()
    assert done == ["fsync", "replace"]


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_all_variants_compute_the_same(monkeypatch, scheme):
    x, layer = random(5, 256), packed(random(70, 256), scheme, ("native",))
    expected = layer.product(x)
    for variant in native.variants():
        monkeypatch.setenv(native.CHOICE, variant)
        torch.testing.assert_close(layer.product(x), expected, rtol=1e-4, atol=1e-4)


@COMPILED
def test_a_variant_that_the_processor_does_not_run_is_refused(monkeypatch):
    monkeypatch.setenv(native.CHOICE, "fastest")
    with pytest.raises(RuntimeError, match="LLM_WEEKS_KERNELS=fastest: this processor runs .*plain"):
        native.library()
    monkeypatch.setenv(native.CHOICE, "none")
    with pytest.raises(RuntimeError, match="asks for PyTorch"):
        native.library()


@COMPILED
def test_it_is_said_how_products_are_computed(capsys):
    quantize(gpt(TIED), "int4", kernels=("native",))
    quantize(gpt(TIED), "int4", kernels=("torch",))
    quantize(gpt(TIED), "nf4", kernels=("torch",))
    lines = capsys.readouterr().out.splitlines()
    assert "int4: up to 64 rows at a time go through the course's kernel in C; for more" in lines[0]
    assert "int4: up to 64 rows at a time go through PyTorch's kernel; for more" in lines[1]
    assert "nf4: no kernel multiplies by such weights here" in lines[2]
    assert "less memory, not more speed" in lines[2]


@COMPILED
def test_the_file_does_not_depend_on_the_kernel(tmp_path):
    contents = set()
    for kernels in (("native",), ("torch",), ()):
        model = quantize(gpt(TIED), "int4", say=quiet, kernels=kernels)
        folder = save_quantized(model, tmp_path / "_".join(("m", *kernels)))
        contents.add((folder / "model.safetensors").read_bytes())
    assert len(contents) == 1
