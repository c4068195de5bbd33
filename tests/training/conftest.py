"""What the tests of this folder share as fixtures."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from shared.training import memory, tricks


class Calls(TorchDispatchMode):
    """The names of the operations that are carried out."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def here(monkeypatch):
    """What else has a process of its own is done in this one; gives the names of each one's operations."""
    calls = []

    def call(function, *args, **named):
        with Calls() as mode:
            calls.append(mode.names)
            return function(*args, **named)

    peaks = {"fp32": 1e9, "bf16": 1e8, "fp16": 1e8}
    monkeypatch.setattr(tricks, "in_own_process", call)
    monkeypatch.setattr(memory, "in_own_process", call)
    monkeypatch.setattr(tricks, "format_peak", lambda name, device: peaks[name])
    return calls
