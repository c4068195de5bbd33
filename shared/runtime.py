"""Week 0. What every script needs before it starts: seeds, whole files and a log of the run."""

import json
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import torch

from shared.devices import device_name
from shared.locks import process_lock
from shared.trackers import Tracker, TrackerName, check_tracker, open_tracker, remove_tracked

ROOT = Path(__file__).resolve().parent.parent
"""The repository's folder."""
PACKAGES = ("torch", "numpy", "safetensors", "tiktoken", "transformers")
"""Those whose versions a run log keeps."""
SEED_LIMIT = 2**32
"""NumPy takes seeds below this."""


# ---- seeds


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch. Raises ValueError for a seed outside 0 … 2³² − 1 (NumPy's range)."""
    check_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def check_seed(seed: int) -> int:
    """The seed again, or ValueError for one that NumPy or torch would refuse."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed {seed!r} is out of range: choose a whole number from 0 to {SEED_LIMIT - 1}")
    return seed


# ---- files


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file so that `path` holds all of `data` or what it held before.

    The data goes to a file of another name, is synced to disk, and that file is renamed to `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError, and ValueError for what is no JSON or nested too deeply."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def os_error_in(error: BaseException) -> OSError | None:
    """What the operating system refused, where that is what an error is about.

    Libraries in Rust, such as safetensors, raise errors of their own, with "(os error 28)" in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None:
        return None
    return OSError(int(number[1]), os.strerror(int(number[1])))


def write_json(path: Path, value: Any) -> None:
    """`write_atomically`, of a value as indented JSON."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# ---- the run log


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSONL file.

    A last line cut short by a kill is left out; any other line that isn't JSON raises ValueError.
    """
    rows = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines):  # no newline at its end: the process was killed while writing it
                break
            raise ValueError(f"{path}, line {number}: not JSON") from None
    return rows


class RunLog:
    """A folder that keeps a run: its identity, a line of metrics per step, and what came out.

    `run.json` has the settings, versions, seed, commit, device and state; `metrics.jsonl` a line per call of
    `log`; `summary.json` what `finish` is given; `artifacts.json` what `artifact` is given. Each line is on
    disk when `log` returns, so an interrupted run keeps what it had. As a context manager it ends the run
    where `finish` was not called: finished, with the last value of each metric as its summary, or
    interrupted, or failed.

    folder: made if needed, and held until the run is closed. A new run replaces what an earlier one left
    there, a tracker's files as well; with `resume`, its lines stay (see `rewind`). tracker: where the metrics
    go as well. Raises ValueError, naming it, where another process has a run in the folder, and for a tracker
    that is not installed.
    """

    def __init__(
        self,
        folder: Path,
        settings: Any = None,
        device: torch.device | str = "cpu",
        resume: bool = False,
        tracker: TrackerName = "none",
    ):
        check_tracker(tracker)
        self.folder = Path(folder)
        lock = ExitStack()
        lock.enter_context(process_lock(self.folder, f"the run {self.folder.name}"))
        self._unlock = weakref.finalize(self, lock.close)  # of a run that is never closed, too
        self._metrics = self.folder / "metrics.jsonl"
        if not resume:
            for name in ("metrics.jsonl", "summary.json", "artifacts.json"):
                (self.folder / name).unlink(missing_ok=True)
            remove_tracked(self.folder)
        training = getattr(settings, "train", settings)
        self._run: dict[str, Any] = {
            "state": "running",
            "settings": plain(settings),
            "seed": getattr(training, "seed", None),
            "command": _command_line(),
            "started": _now(),
            "commit": commit(),
            "device": f"{torch.device(device)}: {device_name(torch.device(device))}",
            "versions": {"python": platform.python_version(), **_versions()},
            "system": platform.system(),
        }
        self._save()
        self._file: TextIO | None = None  # metrics.jsonl, open from the first line on
        self._tracker_name = tracker
        self._tracker: Tracker | None = None  # open from the first line on too: rewinding comes before

    def _save(self) -> None:
        write_json(self.folder / "run.json", self._run)

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`: a resumed run writes them again."""
        if self._file:
            self._file.close()
            self._file = None  # the next call of `log` opens the new file
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None  # and a tracker that has what is kept
        if self._metrics.exists():
            kept = [row for row in read_jsonl(self._metrics) if row["step"] <= step]
            write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, step: int, **values: float) -> None:
        """Appends one line of numbers for `step`."""
        if self._tracker is None and self._tracker_name != "none":
            self._tracker = open_tracker(
                self._tracker_name, self.folder, self._run["settings"] or {}, self.rows()
            )
        if self._file is None:
            self._file = open(self._metrics, "a", encoding="utf-8")
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log(step, values)

    def rows(self) -> list[dict]:
        """The lines so far."""
        return read_jsonl(self._metrics) if self._metrics.exists() else []

    def artifact(self, **values: Any) -> None:
        """Keeps data for plots (counts, activations, attention maps) as JSON beside the metrics.

        A later value replaces an earlier one of the same name.
        """
        path = self.folder / "artifacts.json"
        artifacts = read_json(path) if path.exists() else {}
        artifacts.update(plain(values))
        write_atomically(path, json.dumps(artifacts) + "\n")

    def finish(self, **summary: Any) -> dict:
        """Writes the summary, marks the run as finished and returns the summary."""
        write_json(self.folder / "summary.json", plain(summary))
        self.close("finished")
        return summary

    def close(self, state: str) -> None:
        """Closes the files and writes `state` ("finished", "interrupted", "failed: ...") to `run.json`."""
        self._run["state"] = state
        self._run["ended"] = _now()
        self._save()
        for handle in (self._file, self._tracker):
            if handle is not None:
                handle.close()
        self._file = None
        self._tracker = None
        self._unlock()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._run["state"] != "running":
            return
        logged_nothing = self._file is None
        if error is None and logged_nothing and (self.folder / "summary.json").exists():
            self.close("finished")  # a run that was opened again, to add to its artifacts, say
        elif error is None:
            self.finish(**{name: value for row in self.rows() for name, value in row.items()})
        elif isinstance(error, KeyboardInterrupt):
            self.close("interrupted")
        else:
            self.close(f"failed: {error}")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: dataclasses as dicts, tensors and tuples as lists, paths as strings.

    Floats are rounded to 6 significant digits.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return str(value) if isinstance(value, Path) else value


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _command_line() -> str | None:
    """The command that started this process, as one could type it; None in an interactive session."""
    if not sys.argv[0]:
        return None
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str | None:
    """The checkout's commit, with a + behind it when tracked files were changed since.

    None outside a checkout or without git.
    """
    try:
        revision = _git("rev-parse", "--short", "HEAD")
        changes = _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{revision}+" if changes else revision


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, encoding="utf-8", errors="replace"
    )
    return done.stdout.strip()


# ---- signals, time, tables


@contextmanager
def finish_first(what: str) -> Iterator[Callable[[], bool]]:
    """Lets a step of `what` be finished before the program is stopped.

    Inside, the first Ctrl-C or SIGTERM only sets a flag, which the function that is yielded returns; a second
    one raises KeyboardInterrupt. In a thread other than the main one nothing changes, since Python lets only
    the main thread handle signals.
    """
    signals: list[int] = []

    def note(number: int, frame: Any) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        print(f"\nfinishing {what} and saving; once more stops at once", flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within `with`, PyTorch computes in this thread alone.

    After an operation that they shared, OpenMP's other threads wait actively for the next one, for
    milliseconds, and so keep a core from other programs and from threads that are not PyTorch's. For
    something short between two steps of such threads that costs more than it gains. (A thread whose first
    operation falls into this moment keeps one thread, too: PyTorch begins with the number set last.)
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def clock() -> float:
    """Seconds from some fixed moment: only differences mean anything."""
    return time.perf_counter()


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as a plain text table with aligned columns; floats with four significant digits.

    >>> print(table([{"model": "bigram", "loss": 2.5}, {"model": "mlp", "loss": 2.0}]))
    model   loss
    bigram  2.5
    mlp     2
    """
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
