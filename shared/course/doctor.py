"""Week 0. Checks this machine for what would keep the course from running, and says how to mend it."""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import requests
import torch

from shared.assets import ASSETS, Asset, Wheel, WheelParts, cache_folder, cached
from shared.devices import DEVICE_TOLERANCE, device_name, devices, wrong_by
from shared.runtime import ROOT, table


@dataclass(frozen=True)
class Doctor:
    """Looks for what would get in the way, and says what to do about it."""

    offline: bool = False
    """Don't try to reach anything."""


@dataclass
class Findings:
    """What `doctor` found: a row for each check, and below a bad one a row with its cure."""

    rows: list[dict[str, str]] = field(default_factory=list)
    problems: int = 0
    """Of those that keep the course from running."""

    def add(self, what: str, good: bool, found: str, *, cure: str, fatal: bool = True) -> None:
        """Notes a check. fatal: whether the course cannot run where it is bad."""
        mark = "ok"
        if not good:
            mark = "PROBLEM" if fatal else "note"
        self.rows.append({"check": what, "": mark, "found": found})
        if not good:
            self.rows.append({"check": "", "": "", "found": f"-> {cure}"})
            self.problems += fatal


def doctor(settings: Doctor) -> None:
    """Prints each finding, and the cure of a bad one.

    The exit status is 1 if there is a problem that keeps the course from running.
    """
    findings = Findings()
    check_versions(findings)
    for device in devices():
        check_device(findings, device)
    check_space(findings)
    for name, asset in ASSETS.items():
        if asset.terms is None:  # what has terms, the course needs for nothing
            check_asset(findings, name, asset, settings.offline)
    check_jupyter(findings)
    print(table(findings.rows))
    if findings.problems:
        print(f"\n{findings.problems} problems")
        raise SystemExit(1)
    print("\nready: nothing here keeps the course from running")


def check_versions(findings: Findings) -> None:
    """Python's and PyTorch's versions."""
    findings.add(
        "Python",
        sys.version_info >= (3, 11),
        platform.python_version(),
        cure="install Python 3.11 or newer, delete .venv and run make course again",
    )
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = next((line.strip() for line in requirements if line.startswith("torch==")), "torch")
    installed = torch.__version__.split("+")[0]
    findings.add(
        "PyTorch",
        f"torch=={installed}" == pinned,
        f"{torch.__version__}, the course is tested with {pinned}",
        cure=f"pip install {pinned}",
        fatal=False,
    )


def check_device(findings: Findings, device: torch.device) -> None:
    """Whether the CPU has several threads, or an accelerator computes right."""
    if device.type == "cpu":
        findings.add(
            "device cpu",
            torch.get_num_threads() > 1,
            device_name(device),
            cure="only one thread: unset OMP_NUM_THREADS if you set it",
            fatal=False,
        )
        return
    difference = wrong_by(device)
    findings.add(
        f"device {device}",
        difference <= DEVICE_TOLERANCE,
        f"{device_name(device)}; 20 training steps differ from the CPU's by {difference:.1e}",
        cure=(
            "it computes wrong results and will not be used; update its driver and PyTorch (--device cpu is"
            " chosen until then)"
        ),
        fatal=False,
    )


def check_space(findings: Findings) -> None:
    """Room on the disk that the cache lies on, and memory."""
    free = shutil.disk_usage(cache_folder()).free / 1e9
    findings.add(
        "disk",
        free > 5,
        f"{free:.0f} GB free for data and checkpoints",
        cure="the twelve weeks need about 5 GB: free some space, or set LLM_WEEKS_DATA",
    )
    memory = total_memory()
    if memory is not None:
        findings.add(
            "memory",
            memory > 3.5,
            f"{memory:.0f} GB",
            cure="the laptop presets need up to 4 GB: close other programs, or use --preset smoke",
            fatal=False,
        )


def check_asset(findings: Findings, name: str, asset: Asset, offline: bool) -> None:
    """Whether a file is in the cache or, unless offline, can be had from its sources."""
    folder = cache_folder()
    if cached(name):
        findings.add(name, True, "in the cache, checksum right", cure="")
        return
    if offline:
        cure = f"run once with a network, or put {asset.file} into {folder} by hand"
        findings.add(name, False, "not in the cache", cure=cure, fatal=False)
        return
    cure = f"another source is tried next; by hand: put {asset.file} into {folder}"
    if asset.fallback:
        cure += f"; without it, {asset.fallback} is used"
    for source in asset.sources:
        good, answer = reachable(source)
        findings.add(name, good, answer, cure=cure, fatal=False)


def check_jupyter(findings: Findings) -> None:
    """Whether this Python can run the notebooks."""
    command = [sys.executable, "-c", "import ipykernel, jupyterlab"]
    good = subprocess.run(command, capture_output=True).returncode == 0
    findings.add(
        "Jupyter kernel",
        good,
        "ipykernel and jupyterlab are installed" if good else "missing",
        cure=f"{Path(sys.executable).name} -m pip install -r requirements.txt",
    )


def reachable(source: str | Wheel | WheelParts) -> tuple[bool, str]:
    """Whether a source answers, and what to say about it."""
    if not isinstance(source, str):
        wheels = source.wheels if isinstance(source, WheelParts) else (source,)
        good = all(_pip_finds(wheel.requirement) for wheel in wheels)
        return good, f"{source}: {'pip finds it' if good else 'pip does not find it'}"
    try:
        answer = requests.head(source, timeout=10, allow_redirects=True)
    except requests.RequestException:
        return False, f"{source}: cannot be reached"
    return answer.ok, f"{source}: {'answers' if answer.ok else f'answers {answer.status_code}'}"


def _pip_finds(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    command = [sys.executable, "-m", "pip", "index", "versions", name]
    command += ["--disable-pip-version-check", "--retries", "0"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    return done.returncode == 0 and version in re.findall(r"[\w.]+", done.stdout)


def total_memory() -> float | None:
    """Gigabytes of memory, or None where the system doesn't tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, AttributeError, OSError):
        return None
