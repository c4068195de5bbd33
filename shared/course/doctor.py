"""Week 0. Looks over this machine for what would keep the course from running, and says how to mend it."""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import torch

from shared.assets import ASSETS, cache_folder, cached
from shared.runtime import DEVICE_TOLERANCE, ROOT, device_name, devices, table, wrong_by

# ---- doctor


@dataclass(frozen=True)
class Doctor:
    """Looks for what would get in the way, and says what to do about it."""

    offline: bool = False
    """Don't try to reach anything."""


@dataclass
class Findings:
    """What doctor found, a row each; a bad one is followed by its cure."""

    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, what: str, good: bool, found: str, cure: str = "", fatal: bool = True) -> None:
        self.rows.append(
            {"check": what, "": "ok" if good else "PROBLEM" if fatal else "note", "found": found}
        )
        if not good:
            self.rows.append({"check": "", "": "", "found": f"-> {cure}"})


def doctor(settings: Doctor) -> None:
    """Prints each finding with its cure; exit status 1 if there is a problem that keeps the course from
    running.
    """
    f = Findings()
    f.add(
        "Python",
        sys.version_info >= (3, 11),
        platform.python_version(),
        "install Python 3.11 or newer, delete .venv and run make course again",
    )
    pinned = next(
        (
            line.strip()
            for line in (ROOT / "requirements.txt").read_text().splitlines()
            if line.startswith("torch==")
        ),
        "torch",
    )
    have = torch.__version__.split("+")[0]
    f.add(
        "PyTorch",
        f"torch=={have}" == pinned,
        f"{torch.__version__}, the course is tested with {pinned}",
        f"pip install {pinned}",
        fatal=False,
    )
    for device in devices():
        if device.type == "cpu":
            threads = torch.get_num_threads()
            f.add(
                "device cpu",
                threads > 1,
                f"{device_name(device)}",
                "only one thread: unset OMP_NUM_THREADS if you set it",
                fatal=False,
            )
        else:
            off = wrong_by(device)
            f.add(
                f"device {device}",
                off <= DEVICE_TOLERANCE,
                f"{device_name(device)}; 20 training steps differ from the CPU's by {off:.1e}",
                "it computes wrong results and will not be used; update its driver and PyTorch (--device cpu"
                " is chosen until then)",
                fatal=False,
            )
    folder = cache_folder()
    free = shutil.disk_usage(folder).free / 1e9
    f.add(
        "disk",
        free > 5,
        f"{free:.0f} GB free for data and checkpoints",
        "the twelve weeks need about 5 GB: free some space, or set LLM_WEEKS_DATA",
    )
    memory = total_memory()
    if memory:
        f.add(
            "memory",
            memory > 3.5,
            f"{memory:.0f} GB",
            "the laptop presets need up to 4 GB: close other programs, or use --preset smoke",
            fatal=False,
        )
    for name, asset in ASSETS.items():
        if cached(name):
            f.add(name, True, "in the cache, checksum right")
        elif settings.offline:
            f.add(
                name,
                False,
                "not in the cache",
                f"run once with a network, or put {asset.file} into {folder} by hand",
                fatal=False,
            )
        else:
            for source in asset.sources:
                good, found = reachable(source)
                cure = f"another source is tried next; by hand: put {asset.file} into {folder}"
                f.add(
                    name,
                    good,
                    found,
                    cure + (f"; without it, {asset.fallback} is used" if asset.fallback else ""),
                    fatal=False,
                )
    kernel = subprocess.run(
        [sys.executable, "-c", "import ipykernel, jupyterlab"], capture_output=True, text=True
    )
    cure = f"{Path(sys.executable).name} -m pip install -r requirements.txt"
    f.add(
        "Jupyter kernel",
        kernel.returncode == 0,
        "ipykernel and jupyterlab are installed" if kernel.returncode == 0 else "missing",
        cure,
    )
    print(table(f.rows))
    problems = sum(row[""] == "PROBLEM" for row in f.rows)
    print(f"\n{problems} problems" if problems else "\nready: nothing here keeps the course from running")
    if problems:
        raise SystemExit(1)


def reachable(source: Any) -> tuple[bool, str]:
    """Whether a source answers, and what to say about it."""
    if not isinstance(source, str):
        name, _, version = source.requirement.partition("==")
        command = [
            sys.executable,
            "-m",
            "pip",
            "index",
            "versions",
            name,
            "--disable-pip-version-check",
            "--retries",
            "0",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        good = done.returncode == 0 and version in re.findall(r"[\w.]+", done.stdout)
        return good, f"{source}: {'pip finds it' if good else 'pip does not find it'}"
    try:
        answer = requests.head(source, timeout=10, allow_redirects=True)
        return answer.ok, f"{source}: {'answers' if answer.ok else f'answers {answer.status_code}'}"
    except requests.RequestException:
        return False, f"{source}: cannot be reached"


def total_memory() -> float | None:
    """Gigabytes of memory, or None where the system doesn't tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, AttributeError, OSError):
        return None
