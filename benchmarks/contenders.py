"""Who takes part in decode.py and serving.py: our library, transformers and llama.cpp with the same weights,
each in a process of its own that sleeps while another is measured.

This file is also what runs in such a process, where it is not llama.cpp's (`shared.serving.llama_cpp`): it
loads a model, and answers each line of JSON with another until its input ends.

    python benchmarks/contenders.py library 2 '{"model": "smollm2", "scheme": "int8"}'    # 2 threads
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import torch
from gguf import GGUFReader

from shared.commandline import errors_for_people
from shared.export import to_gguf
from shared.models.gpt import GPT
from shared.models.pretrained import load_model
from shared.quantization.modules import num_bytes, quantize
from shared.quantization.race import our_times, their_times, their_tokens
from shared.runtime import ROOT, clock
from shared.sampling import generate
from shared.sampling.completion import generate_batch
from shared.tokenizers.base import tokenizer_of

GROUP_SIZES = {"int8": 64, "int4": 32}
"""How many weights of a row share a scale in ours, by scheme."""
KINDS = {"fp32": ("F32",), "int8": ("Q8_0",), "int4": ("Q4_0", "Q4_1")}
"""llama.cpp's types of as many bits, by our scheme."""
SAME_WEIGHTS = {"F32": "fp32", "Q8_0": "int8", "Q4_1": "int4"}
"""Those that hold our own codes. Q4_0 has no lowest value beside its scale: gguf rounds to it anew."""
TEMPERATURE = 0.8
"""What `shared.serving.load` asks servers for too."""
WORDS = (
    "the ship sailed north for nine days before anyone on board saw land and when they did it was not the"
    " coast that their maps had promised".split()
)


# ---- the same weights for all


def write_gguf(model: GPT, kind: str, folder: Path) -> Path:
    """The fp32 model as a file of this type, with the codes of our scheme where the type can hold them."""
    path = folder / f"{kind}.gguf"
    scheme = SAME_WEIGHTS.get(kind)
    if scheme not in GROUP_SIZES:
        return to_gguf(model, path, kind=kind)
    packed = quantize(deepcopy(model), scheme, GROUP_SIZES[scheme], say=lambda line: None)
    return to_gguf(packed, path)


def gguf_bytes(path: Path) -> int:
    """Bytes of a GGUF file's weights that are read for a token: all, but for an embedding beside the output
    layer, of which one row is read.
    """
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    return sum(tensors.values())


def model_bytes(model: GPT) -> int:
    """The same of our model."""
    embedding = 0 if model.config.tie_weights else num_bytes(model.token_embedding)
    return num_bytes(model) - embedding


# ---- processes


class Worker:
    """One of `PROGRAMS` in a process of its own until `close`.

    options: what its class takes. Raises ValueError with what the process said where it does not start, or
    ends.
    """

    def __init__(self, program: str, threads: int, **options: Any):
        paths = [path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path]
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._name = f"{program} {options}"
        self.process = subprocess.Popen(
            [sys.executable, __file__, program, str(threads), json.dumps(options)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
        )
        about = self._answer()
        self.bytes: int = about["bytes"]
        """Of its weights that are read for a token."""
        self.about: str = about["about"]
        """How it computes."""

    def ask(self, method: str, **arguments: Any) -> Any:
        """What the method of its program's class returns."""
        print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self._said.seek(0)
            raise ValueError(f"{self._name} ended: {self._said.read().strip()}")
        return json.loads(line)

    def tokens(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The likeliest tokens."""
        return self.ask("tokens", prompt=prompt, new_tokens=new_tokens)

    def times(self, prompt: list[int], new_tokens: int) -> list[float]:
        """The times of a contender of `shared.quantization.race`."""
        return self.ask("times", prompt=prompt, new_tokens=new_tokens)

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.communicate()
        self._said.close()


class IdleWatch:
    """Notes how much of a core each process uses between its own turns, by the name of its contender."""

    def __init__(self) -> None:
        self.most: dict[str, float] = {}
        """The largest share."""
        self._ended: dict[str, tuple[float, float]] = {}

    @contextmanager
    def turn(self, name: str, process: subprocess.Popen[str]) -> Iterator[None]:
        """Inside, it is this process' turn."""
        if name in self._ended:
            moment, seconds = self._ended[name]
            share = (cpu_seconds(process) - seconds) / (clock() - moment)
            self.most[name] = max(share, self.most.get(name, 0.0))
        yield
        self._ended[name] = (clock(), cpu_seconds(process))


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    """How long the threads of a process have computed so far, all together."""
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


@contextmanager
def busy_core(busy: bool = True) -> Iterator[None]:
    """Another process keeps one core busy until the block ends; if not `busy`, none does."""
    if not busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


# ---- figures


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, turn by turn."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest, for a table.

    >>> spread([2.0, 1.0, 4.0])
    '2 (1 to 4)'
    """
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def count_alike(a: Sequence[int], b: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def append_line(path: Path | None, row: Mapping[str, Any]) -> None:
    """Adds a line of JSON to a file; to none, if there is no path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            print(json.dumps(row, ensure_ascii=False), file=file)


# ---- what runs in the processes


class Library:
    """Our library."""

    def __init__(self, model: str, scheme: str | None = None, group_size: int | None = None):
        said: list[str] = []
        self.model = load_model(model, "cpu", torch.float32)
        if scheme is not None:
            quantize(self.model, scheme, group_size, say=said.append)
        self.tokenizer = tokenizer_of(self.model)
        self.about = " ".join(said) or f"PyTorch {torch.__version__}"
        self.bytes = model_bytes(self.model)

    def tokens(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The likeliest tokens."""
        return list(generate(self.model, prompt, new_tokens, temperature=0))

    def times(self, prompt: list[int], new_tokens: int) -> list[float]:
        """When it began and when each token came, in seconds."""
        return our_times(self.model, prompt, new_tokens)

    def rate(self, prompts: list[str], new_tokens: int, at_once: int) -> float:
        """Tokens a second, prompts read included: one text after another by `generate`, or several at once by
        `generate_batch`, whose texts may end before they have so many tokens.
        """
        started = clock()
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        if at_once == 1:
            texts = [
                list(generate(self.model, one, new_tokens, TEMPERATURE, seed=i)) for i, one in enumerate(ids)
            ]
        else:
            written = generate_batch(
                self.model, ids, new_tokens, temperature=TEMPERATURE, seed=0, batch_size=at_once
            )
            texts = [list(completion.ids) for completion in written]
        return sum(map(len, texts)) / (clock() - started)


class Transformers:
    """The library transformers, in fp32."""

    def __init__(self, model: str):
        from transformers import AutoModelForCausalLM, __version__
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.about = f"transformers {__version__}"
        embedding, output = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        if embedding.weight is not output.weight:
            self.bytes -= embedding.weight.nbytes

    def tokens(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The likeliest tokens."""
        return their_tokens(self.model, prompt, new_tokens)

    def times(self, prompt: list[int], new_tokens: int) -> list[float]:
        """When it began and when each token came, in seconds."""
        return their_times(self.model, prompt, new_tokens)


class Memory:
    """An array that is much larger than the processor's caches."""

    def __init__(self, size: int):
        self.array = torch.ones(size // 8, dtype=torch.int64)
        self.about = "the largest value of an array"
        self.bytes = self.array.nbytes

    def bandwidth(self, repeats: int = 4) -> float:
        """Bytes a second that all threads read: the best of some times."""
        times = []
        for _ in range(repeats):
            started = clock()
            self.array.amax()
            times.append(clock() - started)
        return self.bytes / min(times)


PROGRAMS = {"library": Library, "transformers": Transformers, "memory": Memory}


def work(program: str, threads: str, options: str) -> None:
    """Loads a model, and answers lines of JSON, [method, arguments], until there are no more."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    torch.set_num_threads(int(threads))
    loaded = PROGRAMS[program](**json.loads(options))
    print(json.dumps({"bytes": loaded.bytes, "about": loaded.about}), file=answers, flush=True)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(loaded, method)(**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    with errors_for_people():
        work(*sys.argv[1:])
