"""Week 12. llama.cpp with a GGUF file, in a process of its own: the program that ours is compared with.

    with closing(LlamaCpp(Path("model.gguf"), 512, threads=2, slots=8)) as server:
        server.tokens([1, 2, 3], 64)                            # the likeliest
        asyncio.run(throughput(server.url, prompts, Load()))    # as shared.serving.load measures ours

Needs the package xllamacpp. The process runs this file alone, without the rest of the library: the threads of
PyTorch and of llama.cpp would be in each other's way.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import requests


class LlamaCpp:
    """llama.cpp's server with a GGUF file, until `close`.

    length: tokens of the longest text, prompt included. slots: how many texts it writes at once. half_cache:
    keys and values in 16 bits, which is llama.cpp's own default, instead of fp32 as ours are. Raises
    ModuleNotFoundError where xllamacpp is not installed, and ValueError for a file that llama.cpp cannot
    read.
    """

    def __init__(
        self, path: Path, length: int, *, threads: int, slots: int = 1, half_cache: bool = False
    ) -> None:
        if not find_spec("xllamacpp"):
            raise ModuleNotFoundError(
                "xllamacpp, the package with llama.cpp, is not installed: pip install -r"
                " requirements-test.txt (Linux on x86-64)",
                name="xllamacpp",
            )
        # -P: otherwise the folder of this file comes first among those that imports are looked for in.
        command = [sys.executable, "-P", __file__, str(path), str(length * slots), str(threads), str(slots)]
        self.process = subprocess.Popen(
            [*command, "F16" if half_cache else "F32"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        """Without /v1."""
        if not self.address:
            self.close()
            raise ValueError(f"llama.cpp cannot serve {path.name}: try it with its own program")
        self.system = self.process.stdout.readline().strip()
        """What llama.cpp was built for: the processor's instructions that it uses."""

    @property
    def url(self) -> str:
        """Where OpenAI's API is, with /v1 at the end."""
        return f"{self.address}/v1"

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.communicate()

    def tokens(self, prompt: list[int], new_tokens: int, *, ignore_ends: bool = True) -> list[int]:
        """The likeliest tokens. ignore_ends: never one that ends a text; otherwise those up to such a one."""
        return self._complete(prompt, new_tokens, ignore_ends)["tokens"]

    def times(self, prompt: list[int], new_tokens: int) -> list[float]:
        """The times of a contender of `shared.quantization.race`, by llama.cpp's own watch: without HTTP.
        Between the first token and the last, they are evenly spread.
        """
        timings = self._complete(prompt, new_tokens)["timings"]
        first, rest = timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000
        return [0.0, *(first + rest * i / max(1, new_tokens - 1) for i in range(new_tokens))]

    def _complete(self, prompt: list[int], new_tokens: int, ignore_ends: bool = True) -> dict[str, Any]:
        body = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "return_tokens": True,
            "ignore_eos": ignore_ends,
        }
        answer = requests.post(f"{self.address}/completion", json=body, timeout=600)
        answer.raise_for_status()
        return answer.json()


def serve(path: str, length: str, threads: str, slots: str, cache_type: str) -> None:
    """Runs llama.cpp's server until this process' input ends. Prints its address and what it was built for.

    length: tokens of all slots together.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise SystemExit(str(error)) from None
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = int(length)
    params.n_parallel = int(slots)
    params.warmup = False
    params.fit_params = False
    params.cpuparams.n_threads = int(threads)
    params.cpuparams_batch.n_threads = int(threads)
    params.cache_type_k = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache_type}")
    params.cache_type_v = params.cache_type_k
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    print(xllamacpp.get_system_info(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(*sys.argv[1:])
