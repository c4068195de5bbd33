"""C for ARM's processors, tested on others: by a cross compiler, and under emulation."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CROSS_COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"
EMULATED = pytest.mark.skipif(
    not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)),
    reason=f"ARM is compiled for by {CROSS_COMPILER} and emulated by {EMULATOR}: install both"
    " (Debian: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)",
)


def run_on_arm(program: Path, processor: str, *arguments: str) -> dict[str, np.ndarray]:
    """What a program for ARM prints on an emulated processor, as `numbers_by_name` gives it."""
    return numbers_by_name(EMULATOR, "-cpu", processor, program, *arguments)


def numbers_by_name(*command: str | Path) -> dict[str, np.ndarray]:
    """What a program prints in lines of a name, a colon, and numbers as C's %a writes them: float32 by name.

    A name that comes again gets a number. Fails where the program does.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"status {done.returncode}: {done.stdout[-200:]} {done.stderr[-2000:]}"
    found: dict[str, np.ndarray] = {}
    for line in done.stdout.splitlines():
        name, _, numbers = line.partition(":")
        key = name if name not in found else f"{name} {len(found)}"
        found[key] = np.array([float.fromhex(number) for number in numbers.split()], dtype=np.float32)
    return found
