"""shared/serving/engine.py: what it keeps of a text, whom it serves next, and that its threads never meet."""

import threading
from collections import deque

import pytest

from shared.serving.engine import Draining, Engine, QueueFull
from shared.serving.generation import Request
from tests.serving.helpers import before_each_read
from tests.serving.test_engine import alone, gpt, ids, run, stepped


def is_taken(lock: threading.Condition) -> bool:
    """Whether some thread holds it; asked from another thread, which would get it otherwise."""
    found = []

    def probe():
        free = lock.acquire(blocking=False)
        found.append(not free)
        if free:
            lock.release()

    thread = threading.Thread(target=probe)
    thread.start()
    thread.join()
    return found[0]


class Watched(deque):
    """A queue that notes, each time that it is changed, whether the engine's lock was held."""

    def __init__(self, lock: threading.Condition):
        super().__init__()
        self.lock = lock
        self.held: list[tuple[str, bool]] = []

    def append(self, item):
        self.held.append(("append", is_taken(self.lock)))
        super().append(item)

    def popleft(self):
        self.held.append(("popleft", is_taken(self.lock)))
        return super().popleft()

    def remove(self, item):
        self.held.append(("remove", is_taken(self.lock)))
        super().remove(item)


def test_the_queue_is_changed_under_the_lock_only():
    engine = stepped(gpt(), slots=1, queue=2)
    engine._waiting = Watched(engine._changed)
    first, second, third = (engine.submit(Request([i], 3)) for i in range(3))
    with pytest.raises(QueueFull):
        engine.submit(Request([1], 1))
    engine.step()
    second.cancel()
    run(engine)
    engine.submit(Request([1], 9))
    engine.close()
    changes = [what for what, _ in engine._waiting.held]
    assert {"append", "popleft", "remove"} == set(changes) and changes.count("append") == 4
    assert all(held for _, held in engine._waiting.held)
    assert [g.finish_reason for g in (first, second, third)] == ["length", "cancelled", "length"]


def test_slots_are_given_under_the_lock_only(monkeypatch):
    engine, held = stepped(gpt(), slots=2), []
    prepare = engine._prepare_slot

    def watched(request):
        held.append(is_taken(engine._changed))
        return prepare(request)

    monkeypatch.setattr(engine, "_prepare_slot", watched)
    for i in range(3):
        engine.submit(Request([i], 2))
    run(engine)
    assert held == [True] * 3


def test_the_model_runs_without_the_lock_so_that_requests_are_taken_meanwhile():
    engine, held = stepped(gpt()), []
    before_each_read(engine, lambda: held.append(is_taken(engine._changed)))
    engine.submit(Request([1] * 10, 3))
    run(engine)
    assert held == [False] * 4


def test_whoever_waits_for_an_idle_engine_hears_of_it():
    engine = Engine(gpt(), slots=1, chunk=8)
    engine.submit(Request([1], 20))
    assert engine.wait_idle(20)
    engine.close()


@pytest.mark.parametrize("start", [True, False])
def test_a_closed_engine_takes_nothing(start):
    engine = Engine(gpt(), start=start)
    engine.close()
    with pytest.raises(Draining, match="shutting down"):
        engine.submit(Request([1], 1))


def test_steps_that_did_something_are_counted():
    engine = stepped(gpt(), slots=2)
    for i in range(5):
        engine.submit(Request([i] * 12, 4))
    worked = 0
    while engine.step():
        worked += 1
    assert engine.steps == worked and not engine.step() and engine.steps == worked


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one():
    engine = stepped(gpt())
    long, short = engine.submit(Request([1] * 60, 2)), engine.submit(Request([2], 2))
    for _ in range(3):
        engine.step()
    assert short.drawn == 2 and long.drawn == 0 and 0 < long.read < 60
    run(engine)
    assert len(ids(long)) == 2


def test_the_slot_used_longest_ago_is_given_away():
    engine = stepped(gpt(), slots=2)

    def reused(first_token: int) -> int:
        g = engine.submit(Request([first_token] * 20, 2))
        run(engine)
        return g.reused

    assert [reused(token) for token in (1, 2, 1, 3)] == [0, 0, 16, 0]  # the third kept 1's slot in use
    assert reused(1) == 16 and reused(2) == 0


def test_one_after_another_they_are_written_in_the_first_rows():
    engine = stepped(gpt(), slots=8)
    slots = []
    for token in range(12):
        g = engine.submit(Request([token] * 9, 2))
        run(engine)
        slots.append(g.slot)
    assert set(slots) == {0, 1, 2, 3}  # a batch of four rows, not of eight


class Spoiler:
    """Makes the keys and values of a model not a number while it is on; its third forward pass may fail."""

    def __init__(self, model, fails: bool):
        self.on = True
        self.fails = fails
        self.passes = 0
        for name, module in model.named_modules():
            if name.endswith(("k_proj", "v_proj")):
                module.register_forward_hook(self._spoil)
        model.register_forward_hook(self._fail)

    def _spoil(self, module, args, output):
        return output * float("nan") if self.on else None

    def _fail(self, module, args, output):
        self.passes += 1
        if self.fails and self.passes == 3:
            raise MemoryError("no memory left")


@pytest.mark.parametrize("fails", [False, True], ids=["not finite", "fails"])
@pytest.mark.parametrize("prompt", [[1] * 20, [3, 4], [1] * 17], ids=len)
def test_nothing_of_a_spoilt_text_is_reused(fails, prompt):
    model = gpt()
    spoiler = Spoiler(model, fails)
    engine = Engine(model, slots=1, chunk=8)
    spoilt = engine.submit(Request([1] * 20, 5, temperature=0))
    with pytest.raises(RuntimeError, match="could not finish"):
        ids(spoilt)
    assert engine.wait_idle(20)
    spoiler.on = False
    again = engine.submit(Request(prompt, 6, seed=1))
    found = list(ids(again))
    engine.close()
    assert again.reused == 0 and found == alone(gpt(), Request(prompt, 6, seed=1))
