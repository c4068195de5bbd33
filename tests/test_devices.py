"""shared/devices.py: the best device that computes right, by a test against the CPU."""

import math

import pytest
import torch

from shared import devices
from shared.devices import pick_device, resolve_device, wrong_by

CPU = torch.device("cpu")
MPS = torch.device("mps")


@pytest.fixture
def said() -> list[str]:
    return []


def test_auto_says_which_device_it_took(monkeypatch, said):
    monkeypatch.setattr(devices, "devices", lambda: [CPU])
    assert pick_device(say=said.append) == CPU
    assert len(said) == 1 and said[0].startswith("device: cpu (") and "threads" in said[0]


def test_auto_takes_an_accelerator_that_computes_right(monkeypatch, said):
    monkeypatch.setattr(devices, "devices", lambda: [MPS, CPU])
    monkeypatch.setattr(devices, "wrong_by", lambda device: 1e-5)
    assert pick_device(say=said.append) == MPS and said[0].startswith("device: mps")


@pytest.mark.parametrize("off", [0.02, math.inf])
def test_a_device_that_computes_wrong_is_named_and_not_used(monkeypatch, said, off):
    monkeypatch.setattr(devices, "devices", lambda: [MPS, CPU])
    monkeypatch.setattr(devices, "wrong_by", lambda device: off)
    assert pick_device(say=said.append) == CPU
    assert said[0].startswith("device: mps computes wrong results, so it is not used")
    assert said[1].startswith("device: cpu")
    with pytest.raises(ValueError, match="'mps' computes wrong results.*use --device cpu"):
        pick_device("mps", said.append)


def test_the_self_test_finds_a_device_whose_losses_differ(monkeypatch):
    right = devices.training_losses(CPU)
    assert wrong_by(CPU) == 0 and right[-1] < right[0]

    def wrong_by_when_mps_has(change):
        def losses(device, steps=20):
            return right if device == CPU else change(right)

        monkeypatch.setattr(devices, "training_losses", losses)
        return wrong_by(MPS)

    def crash(r):
        raise RuntimeError("kernel missing")

    assert wrong_by_when_mps_has(lambda r: [x * 1.05 for x in r]) == pytest.approx(0.05)
    assert wrong_by_when_mps_has(lambda r: [*r[:-1], math.nan]) == math.inf
    assert wrong_by_when_mps_has(crash) == math.inf


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "no device is called 'gpu'; this machine has: auto, cpu"),
        ("cuda", "device 'cuda' is not on this machine; it has: auto, cpu"),
        ("cpu:7", "device 'cpu:7' is not on this machine"),
        ("", "no device is called ''"),
    ],
)
def test_an_unknown_device_is_refused_with_those_there_are(monkeypatch, name, message):
    monkeypatch.setattr(devices, "devices", lambda: [CPU])
    with pytest.raises(ValueError, match=message):
        pick_device(name)


def test_of_several_gpus_those_that_are_there_can_be_asked_for(monkeypatch, said):
    monkeypatch.setattr(devices, "devices", lambda: [torch.device("cuda"), CPU])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_computes_right", lambda device: True)
    for name in ("cuda", "cuda:0", "cuda:1"):
        assert pick_device(name, said.append) == torch.device(name)
    with pytest.raises(ValueError, match="device 'cuda:2' is not on this machine"):
        pick_device("cuda:2")


def test_a_device_asked_for_is_taken_and_said(said):
    assert pick_device("cpu", said.append) == CPU and said == ["device: cpu (asked for)"]


def test_a_call_takes_the_best_device_quietly_and_tries_each_once(monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(devices, "devices", lambda: [MPS, CPU])
    monkeypatch.setattr(devices, "wrong_by", lambda device: tried.append(device) or 0.0)
    resolve_device.cache_clear()
    try:
        assert {resolve_device("auto"), resolve_device("auto"), resolve_device(MPS)} == {MPS}
        assert tried == [MPS] and capsys.readouterr().out == ""
        with pytest.raises(ValueError, match="no device is called 'abacus'"):
            resolve_device("abacus")
    finally:
        resolve_device.cache_clear()
