"""Week 2. What is to happen beside the steps of a training: objects that the Trainer calls.

    class StopAtTarget(Callback):
        def on_evaluation(self, trainer):
            if trainer.final["val_loss"] < 1.5:
                trainer.stop("the loss is low enough")

    Trainer(model, corpus, config, callbacks=[StopAtTarget(), SampleText("ROMEO:", every=500)]).fit()

Stopping early has a setting of its own (`TrainConfig.patience`), and where metrics go is the log's affair
(`RunLog(tracker=...)`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from shared.sampling.generate import check_sampling, generate

if TYPE_CHECKING:
    from shared.training.trainer import Trainer


class Callback:
    """What the Trainer calls while it trains; every hook does nothing until a subclass says otherwise.

    The Trainer that is handed over has all there is to see: `step`, `last_loss`, `final` (the last
    evaluation), `best`, `history`, `model`, `task`, `config`, `log`. A hook may add metrics with
    `trainer.record({"name": number})` and end the training with `trainer.stop("why")`. It leaves the
    training as it is otherwise: the model's mode and weights, and torch's random numbers, which a resumed run
    would not have drawn. Of several processes each calls its own; `trainer.processes.rank` is 0 in the first.
    """

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step that is taken, of a resumed run too."""

    def on_step_start(self, trainer: "Trainer") -> None:
        """Before each step; `trainer.step` counts those that are done."""

    def on_step(self, trainer: "Trainer") -> None:
        """After each step, before its evaluation where one is due."""

    def on_evaluation(self, trainer: "Trainer") -> None:
        """After each evaluation, which is in `trainer.final`, and once the best weights are saved."""

    def on_end(self, trainer: "Trainer") -> None:
        """Once the training has ended and is saved: by its last step, early, or by `stop`. Not after an error
        or Ctrl-C.
        """

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, in JSON: saved with each checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""


class Callbacks(Callback):
    """Several as one, each called in their order. Raises ValueError for what is no Callback."""

    def __init__(self, callbacks: Sequence[Callback]):
        if isinstance(callbacks, Callback):
            raise ValueError(f"callbacks={callbacks!r}: give a list, [{type(callbacks).__name__}(...)]")
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ValueError(
                    f"callbacks: {callback!r} is no Callback. Derive a class from shared.training.Callback"
                    " and give it the hooks that it needs, such as on_step(self, trainer)"
                )
        self.all = list(callbacks)

    def on_start(self, trainer: "Trainer") -> None:
        """Calls each."""
        for callback in self.all:
            callback.on_start(trainer)

    def on_step_start(self, trainer: "Trainer") -> None:
        """Calls each."""
        for callback in self.all:
            callback.on_step_start(trainer)

    def on_step(self, trainer: "Trainer") -> None:
        """Calls each."""
        for callback in self.all:
            callback.on_step(trainer)

    def on_evaluation(self, trainer: "Trainer") -> None:
        """Calls each."""
        for callback in self.all:
            callback.on_evaluation(trainer)

    def on_end(self, trainer: "Trainer") -> None:
        """Calls each."""
        for callback in self.all:
            callback.on_end(trainer)

    def state(self) -> dict[str, Any]:
        """Those that have one, by name."""
        states = {name: callback.state() for name, callback in self._named()}
        return {name: state for name, state in states.items() if state}

    def restore(self, state: dict[str, Any]) -> None:
        """Gives each its own; one that had none when it was saved stays as it is."""
        for name, callback in self._named():
            if name in state:
                callback.restore(state[name])

    def _named(self) -> Iterator[tuple[str, Callback]]:
        """Each by its class's name, the second of a class with a 2 behind it: so others may come and go."""
        seen: Counter[str] = Counter()
        for callback in self.all:
            name = type(callback).__name__
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name} {seen[name]}"), callback


class SampleText(Callback):
    """Lets the model go on from a prompt, every so many steps, and prints what it wrote.

    The same seed each time, so that what changes is the model. say: what a text is handed to, in the first
    process; `samples` has them all, as (step, text without the prompt). Raises ValueError for settings out of
    range, and when training starts for a task without a tokenizer and a prompt that it cannot encode.
    """

    def __init__(
        self,
        prompt: str,
        every: int,
        max_new_tokens: int = 100,
        *,
        temperature: float = 1.0,
        top_p: float | None = None,
        seed: int = 0,
        say: Callable[[str], object] = tqdm.write,
    ):
        if every < 1 or max_new_tokens < 1:
            raise ValueError(f"every={every}, max_new_tokens={max_new_tokens}: both must be at least 1")
        check_sampling(temperature, None, top_p)
        self.prompt = prompt
        self.every = every
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self.say = say
        self.samples: list[tuple[int, str]] = []

    def on_start(self, trainer: "Trainer") -> None:
        """Encodes the prompt once, so that what is wrong with it is said before the first step."""
        if trainer.task.tokenizer is None:
            raise ValueError(f"SampleText needs a tokenizer, and the task {trainer.task.name} has none")
        if not trainer.task.tokenizer.encode(self.prompt):
            raise ValueError(f"prompt={self.prompt!r}: SampleText needs at least one token to start from")

    def on_step(self, trainer: "Trainer") -> None:
        """Writes, where it is due."""
        tokenizer = trainer.task.tokenizer
        if trainer.step % self.every or tokenizer is None:
            return
        with trainer.precision.autocast(trainer.device):
            ids = generate(
                trainer.model,
                tokenizer.encode(self.prompt),
                self.max_new_tokens,
                self.temperature,
                top_p=self.top_p,
                seed=self.seed,
            )
            text = tokenizer.decode(list(ids))
        self.samples.append((trainer.step, text))
        if trainer.processes.rank == 0:
            self.say(f"  step {trainer.step}: {self.prompt}{text}")
