"""Week 0. C that is compiled on this machine when it is first needed, and called through ctypes."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shared.assets import cache_folder
from shared.devices import CPUINFO
from shared.runtime import write_atomically

FLAGS: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], [])
"""Tried in this order. Not every compiler knows the processor it runs on, or comes with OpenMP, without which
one core computes alone.
"""


def load_compiled(
    source: Path, *, headers: Sequence[Path] = (), flags: Sequence[list[str]] = FLAGS
) -> ctypes.CDLL:
    """The functions of a C file.

    headers: what it includes of ours. flags: for the compiler, tried in this order.

    They are compiled into the folder that assets are kept in, once for each version, user and kind of
    processor, and anew where the file is no longer what was written: one that was cut short would end the
    process. Raises RuntimeError, with the reason, where that does not work.
    """
    compiler = find_compiler()
    try:
        folder = cache_folder() / "native"
        version = _version(compiler, [source, *headers], flags)
        path = _whole(folder, version) or _compile(compiler, source, folder / version, flags)
        # The folder may be shared with other users: only code that we or root wrote is run.
        if path.stat().st_uid not in (0, os.getuid()):
            raise OSError(f"{path} belongs to another user")
        return ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"its compiled form could not be written or read: {error}") from None


def find_compiler() -> str:
    """The path of a C compiler: that of the environment variable CC, else cc, gcc or clang.

    Raises RuntimeError where there is none.
    """
    for name in (os.environ.get("CC", "cc"), "gcc", "clang"):
        path = shutil.which(name)
        if path and os.name == "posix":
            return path
    raise RuntimeError("it needs a C compiler (cc, gcc or clang) on Linux or macOS")


def _version(compiler: str, files: Sequence[Path], flags: Sequence[list[str]]) -> str:
    """A hash of all that decides what the compiled form is."""
    features: list[str] = []
    if CPUINFO.exists():
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
        features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    machine = (platform.platform(), platform.machine(), platform.node(), os.getuid(), features)
    sources = [file.read_text(encoding="utf-8") for file in files]
    version = repr((*sources, compiler, flags, *machine))
    return hashlib.sha256(version.encode()).hexdigest()[:16]


def _file_name(version: str, content: bytes) -> str:
    """What a compiled form is called: its own hash is in its name."""
    return f"{version}.{hashlib.sha256(content).hexdigest()[:16]}.so"


def _whole(folder: Path, version: str) -> Path | None:
    """The compiled form of this version, if it is there as it was written. One that is not is removed."""
    for path in sorted(folder.glob(f"{version}.*.so")):
        with suppress(FileNotFoundError):  # another process removed it first
            if path.name == _file_name(version, path.read_bytes()):
                return path
            path.unlink()
    return None


def _compile(compiler: str, source: Path, to: Path, flags: Sequence[list[str]]) -> Path:
    """Compiles a C file, and returns the file, whose name begins like `to`. Raises RuntimeError with what the
    compiler complained of.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as temporary:
        new = Path(temporary) / "new.so"
        compile_c(compiler, [source], new, "-shared", "-fPIC", flags=flags)
        content = new.read_bytes()
        path = to.with_name(_file_name(to.name, content))
        # Synced, then renamed: another process may compile it at the same moment.
        write_atomically(path, content)
        return path


def compile_c(
    compiler: str, sources: Sequence[Path], to: Path, *options: str, flags: Sequence[list[str]] = FLAGS
) -> None:
    """Compiles C files into one, with the first of `flags` that works.

    options: such as -shared, for a library. Raises RuntimeError with what the compiler complained of last.
    """
    complaint = ""
    for some in flags:
        command = [compiler, "-O3", *some, *options, *map(str, sources), "-o", str(to), "-lm"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, encoding="utf-8", errors="replace"
        )
        if done.returncode == 0:
            return
        complaint = done.stderr.strip()[:300]
    raise RuntimeError(f"{compiler} could not compile it: {complaint}")
