"""Week 0. The course as a whole: where a week keeps its things, and `python -m shared.course run | status | doctor`.

    python -m shared.course run --weeks 1 4 --preset smoke
    python -m shared.course status
    python -m shared.course doctor

A week writes `logs/NN_topic/mine/PRESET/DATA/RUN`, `reports/NN_topic/mine/` and `checkpoints/NN_topic/PRESET/DATA/RUN`, none of which git
tracks. The runs that the course ships are in `logs/NN_topic/reference/DATA/RUN`, their plots in `reports/NN_topic/`.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import requests
import torch
import tyro

from shared.assets import ASSETS, cache_folder, cached
from shared.commandline import errors_for_people, parse_args
from shared.exercise import Week
from shared.runtime import DEVICE_TOLERANCE, ROOT, RunLog, clock, device_name, devices, table, write_json, wrong_by

TOPICS = (
    "01_bigram", "02_mlp", "03_attention", "04_mini_gpt", "05_bpe", "06_gpt2",
    "07_amp", "08_quantization", "09_lora", "10_ppo_dpo", "11_rag", "12_deploy",
)  # fmt: skip
PRESETS = ("smoke", "laptop", "gpu")


@dataclass(frozen=True)
class WeekSettings:
    """What every week's script takes; a week adds its own."""

    preset: tyro.conf.Suppress[str] = "laptop"
    data: str = "tinyshakespeare"
    """tinyshakespeare, shakespeare, or the path of a text file."""
    device: str = "auto"
    resume: bool = False
    """Go on with an interrupted run."""
    tensorboard: bool = False
    """Also write TensorBoard files beside each run's log."""
    reference: bool = False
    """Keep this as the reference run that the course ships (for the course's authors)."""


def output_root() -> Path:
    """Where logs, reports and checkpoints go: the repository, or the folder that LLM_WEEKS_OUTPUT names."""
    return Path(os.environ.get("LLM_WEEKS_OUTPUT") or ROOT)


class Workspace:
    """A week's folders for one script run. `data` is the name of the data set that is really used."""

    def __init__(self, script: str | Path, settings: WeekSettings, data: str, device: torch.device):
        self.topic, self.settings, self.data, self.device = Path(script).resolve().parent.name, settings, data, device
        root = output_root()
        owner = Path("reference", data) if settings.reference else Path("mine", settings.preset, data)
        self.logs = root / "logs" / self.topic / owner
        self.reports = root / "reports" / self.topic / ("" if settings.reference else "mine")
        if settings.reference and data != "tinyshakespeare":
            self.reports /= data
        self.checkpoints = root / "checkpoints" / self.topic / settings.preset / data
        self._started = clock()

    def log(self, run: str, settings: Any = None) -> RunLog:
        """The run log called `run`."""
        s = self.settings
        return RunLog(self.logs / run, settings or s, self.device, resume=s.resume, tensorboard=s.tensorboard)

    def finish(self, metrics: dict[str, float], draw: Callable[[Path, Path], list[Path]]) -> dict[str, float]:
        """Writes the week's figures, draws its plots from the logs, and prints both."""
        metrics = {k: v for k, v in metrics.items() if v is not None}
        seconds = clock() - self._started
        write_json(self.logs / "week.json", {"preset": self.settings.preset, "data": self.data, "seconds": round(seconds, 1), "metrics": metrics})
        plots = draw(self.logs, self.reports)
        print("\n" + table([{"metric": k, "value": v} for k, v in metrics.items()]))
        print(f"\n{self.topic}: {seconds:.0f} s; logs in {_relative(self.logs)}, {len(plots)} plots in {_relative(self.reports)}")
        return metrics


def _relative(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def weeks() -> list[str]:
    """The topics whose script exists."""
    return [t for t in TOPICS if (ROOT / "weeks" / t / "run.py").exists()]


def choose(numbers: tuple[int, ...]) -> list[str]:
    """Topics by week number, all that exist if none is given. Raises ValueError for a week that doesn't exist."""
    there = {int(t[:2]): t for t in weeks()}
    missing = [n for n in numbers if n not in there]
    if missing:
        raise ValueError(f"no week {', '.join(map(str, missing))}; there are: {', '.join(map(str, there))}")
    return [there[n] for n in sorted(set(numbers))] if numbers else list(there.values())


def newest_logs(topic: str, owner: str, data: str | None = None, preset: str | None = None) -> Path | None:
    """The folder with the logs of a week's newest run; None if there is none. owner: "reference" (the course's) or "mine".

    data, preset: only runs with these. Smoke runs count only where nothing else is there: they prove that a week runs, no more.
    """
    root = (ROOT if owner == "reference" else output_root()) / "logs" / topic / owner
    found = [p for p in root.rglob("week.json") if data in (None, p.parent.name) and preset in (None, p.parent.parent.name)]
    newest = max(found, key=lambda p: ("smoke" not in p.relative_to(root).parts, p.stat().st_mtime), default=None)
    return newest and newest.parent


def week_results(topic: str, owner: str, data: str | None = None, preset: str | None = None) -> dict | None:
    """What the run of `newest_logs` came to (its `week.json`)."""
    logs = newest_logs(topic, owner, data, preset)
    return logs and json.loads((logs / "week.json").read_text(encoding="utf-8"))


# ---- run


@dataclass(frozen=True)
class Run:
    """Runs weeks one after the other, and ends with a table."""

    weeks: tuple[int, ...] = ()
    """Which; none: all there are."""
    preset: Literal["smoke", "laptop", "gpu"] | None = None
    """None: the one for this machine."""


def run(settings: Run) -> None:
    """Each week in a process of its own; a week that fails is named, the others run all the same, and the exit status is 1."""
    preset = settings.preset or ("gpu" if devices()[0].type == "cuda" else "laptop")
    rows, failed = [], []
    chosen = choose(settings.weeks)
    for number, topic in enumerate(chosen, 1):
        print(f"\n=== {topic} ({number} of {len(chosen)}, preset {preset}) ===", flush=True)
        started = clock()
        code = subprocess.run([sys.executable, str(ROOT / "weeks" / topic / "run.py"), "--preset", preset], cwd=ROOT).returncode
        if code in (130, -2):
            raise KeyboardInterrupt
        row = {"week": topic, "time": f"{clock() - started:.0f} s"}
        if code:
            failed.append(topic)
            row["result"] = f"failed with exit status {code}"
        else:
            metrics = week_results(topic, "mine", preset=preset)["metrics"]
            row |= {"result": headline(metrics), "plots": f"{_relative(output_root() / 'reports' / topic / 'mine')}{os.sep}"}
        rows.append(row)
    subprocess.run([sys.executable, "-m", "shared.report", "--mine"], cwd=ROOT, check=True)  # the ladder, over all weeks
    print("\n" + table(rows))
    if failed:
        print(f"\nfailed: {', '.join(failed)}; run one alone with: python weeks/{failed[0]}/run.py --preset {preset}", file=sys.stderr)
        raise SystemExit(1)


def headline(metrics: dict[str, float]) -> str:
    """A week's first figures in words."""
    return ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in list(metrics.items())[:2])


# ---- status


@dataclass(frozen=True)
class Status:
    """Which weeks are done, exercises solved, and your figures beside the course's."""


def status(settings: Status) -> None:
    """Prints a row a week, and what comes next."""
    rows = []
    for topic in weeks():
        mine = week_results(topic, "mine")
        week = Week(int(topic[:2]))
        row = {"week": topic, "done": "yes" if mine else "no", "exercises": f"{len(week.solved())} of {len(week.exercises)}"}
        if mine:
            course = week_results(topic, "reference", mine["data"])
            figure = next(iter(mine["metrics"]))
            row["yours"] = f"{figure.replace('_', ' ')} {mine['metrics'][figure]:.3f} ({mine['preset']}, {mine['data']})"
            row["course"] = f"{course['metrics'][figure]:.3f}" if course and figure in course["metrics"] else "none on this data"
        rows.append(row)
    print(table(rows))
    later = [r["week"] for r in rows if r["done"] == "no"]
    if later:
        print(f"\nnext: open weeks/{later[0]}/notebook.ipynb, or run: python weeks/{later[0]}/run.py")


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
        self.rows.append({"check": what, "": "ok" if good else "PROBLEM" if fatal else "note", "found": found})
        if not good:
            self.rows.append({"check": "", "": "", "found": f"-> {cure}"})


def doctor(settings: Doctor) -> None:
    """Prints each finding with its cure; exit status 1 if there is a problem that keeps the course from running."""
    f = Findings()
    f.add("Python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer, delete .venv and run make course again")
    pinned = next((line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch==")), "torch")
    have = torch.__version__.split("+")[0]
    f.add("PyTorch", f"torch=={have}" == pinned, f"{torch.__version__}, the course is tested with {pinned}", f"pip install {pinned}", fatal=False)
    for device in devices():
        if device.type == "cpu":
            threads = torch.get_num_threads()
            f.add("device cpu", threads > 1, f"{device_name(device)}", "only one thread: unset OMP_NUM_THREADS if you set it", fatal=False)
        else:
            off = wrong_by(device)
            f.add(f"device {device}", off <= DEVICE_TOLERANCE, f"{device_name(device)}; 20 training steps differ from the CPU's by {off:.1e}",
                  "it computes wrong results and will not be used; update its driver and PyTorch (--device cpu is chosen until then)", fatal=False)  # fmt: skip
    folder = cache_folder()
    free = shutil.disk_usage(folder).free / 1e9
    f.add(
        "disk", free > 5, f"{free:.0f} GB free for data and checkpoints", "the twelve weeks need about 5 GB: free some space, or set LLM_WEEKS_DATA"
    )
    memory = total_memory()
    if memory:
        f.add(
            "memory", memory > 3.5, f"{memory:.0f} GB", "the laptop presets need up to 4 GB: close other programs, or use --preset smoke", fatal=False
        )
    for name, asset in ASSETS.items():
        if cached(name):
            f.add(name, True, "in the cache, checksum right")
        elif settings.offline:
            f.add(name, False, "not in the cache", f"run once with a network, or put {asset.file} into {folder} by hand", fatal=False)
        else:
            for source in asset.sources:
                good, found = reachable(source)
                cure = f"another source is tried next; by hand: put {asset.file} into {folder}"
                f.add(name, good, found, cure + (f"; without it, {asset.fallback} is used" if asset.fallback else ""), fatal=False)
    kernel = subprocess.run([sys.executable, "-c", "import ipykernel, jupyterlab"], capture_output=True, text=True)
    cure = f"{Path(sys.executable).name} -m pip install -r requirements.txt"
    f.add("Jupyter kernel", kernel.returncode == 0, "ipykernel and jupyterlab are installed" if kernel.returncode == 0 else "missing", cure)
    print(table(f.rows))
    problems = sum(row[""] == "PROBLEM" for row in f.rows)
    print(f"\n{problems} problems" if problems else "\nready: nothing here keeps the course from running")
    if problems:
        raise SystemExit(1)


def reachable(source: Any) -> tuple[bool, str]:
    """Whether a source answers, and what to say about it."""
    if not isinstance(source, str):
        name, _, version = source.requirement.partition("==")
        command = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check", "--retries", "0"]
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


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {"run": (Run, run), "status": (Status, status), "doctor": (Doctor, doctor)}


def main(argv: list[str]) -> None:
    """Runs one of COMMANDS."""
    if not argv or argv[0] not in COMMANDS:
        raise ValueError(f"usage: python -m shared.course {' | '.join(COMMANDS)}")
    kind, function = COMMANDS[argv[0]]
    function(parse_args(kind, argv[1:], kind.__doc__))


if __name__ == "__main__":
    with errors_for_people():
        main(sys.argv[1:])
