"""Week 0. The command line of every script: presets, settings from flags and files, and errors for people.

A script hands `cli` its `main` and its presets; the settings are frozen dataclasses, and their fields are the
flags.
"""

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import MISSING, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import tyro

from shared.runtime import devices


def parse(presets: dict[str, Any], argv: list[str] | None = None, description: str = "") -> Any:
    """Settings from a command line. `presets` maps a name to a settings dataclass, all of one type with a
    field `preset`.

    `--preset NAME` chooses where to start (none given: the hardware chooses, said aloud), `--config
    FILE.json` lays a file over it (as saved in a run's `run.json`, or only the fields to change), and every
    other flag is a field: `--train.lr 1e-3`, or `--lr 1e-3` where only one group of settings has such a
    field. A switch may be given a value: `--resume=True`.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    name, file = _take(args, "--preset"), _take(args, "--config")
    if name is None and not {"-h", "--help"} & set(args):
        name = "gpu" if devices()[0].type == "cuda" and "gpu" in presets else "laptop"
        print(
            f"preset: {name} (chosen for this machine's {devices()[0].type}; there are: {', '.join(presets)})"
        )
    name = name or "laptop"
    if name not in presets:
        raise ValueError(f"no preset is called {name!r}; there are: {', '.join(presets)}")
    default = presets[name]
    if file is not None:
        default = _overlay(default, _read_config(file), file)
    return parse_args(type(default), [_spelled_out(arg, default) for arg in args], description, default)


def parse_args(kind: type, args: list[str], description: str = "", default: Any = None) -> Any:
    """A dataclass from command-line flags. Raises ValueError, in one line, for a flag or a value that won't
    do.
    """
    message = StringIO()
    try:
        with redirect_stderr(message):
            extra = {} if default is None else {"default": default}
            return tyro.cli(kind, args=args, prog=Path(sys.argv[0]).name, description=description, **extra)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(message.getvalue())) from None


def flags(settings: Any, preset: Any) -> list[str]:
    """The flags that make `settings` of `preset`: what `parse` reads back, and what a run's log says of how
    it was started.

    >>> from shared.training import TrainConfig
    >>> flags(TrainConfig(steps=5, log_updates=True, eval_windows=3), TrainConfig())
    ['--steps', '5', '--eval-windows', '3', '--log-updates']
    """
    found, usual = [], dict(_flat(preset))
    for path, value in _flat(settings):
        if value == usual[path]:
            continue
        group, _, field = path.replace("_", "-").rpartition(".")
        dotted = f"--{group}." if group else "--"
        if isinstance(value, bool):
            found.append(dotted + ("" if value else "no-") + field)
        else:
            found += [dotted + field, *map(str, value if isinstance(value, tuple) else [value])]
    return found


def _take(args: list[str], flag: str) -> str | None:
    for i, arg in enumerate(args):
        if arg == flag:
            if i + 1 == len(args):
                raise ValueError(f"{flag} needs a value")
            value = args[i + 1]
            del args[i : i + 2]
            return value
        if arg.startswith(flag + "="):
            del args[i]
            return arg.split("=", 1)[1]
    return None


def _spelled_out(arg: str, settings: Any) -> str:
    """`--lr=1` as `--train.lr=1`, and a switch's `--resume=True` or `=False` as `--resume` or `--no-resume`."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    name = flag[2:].replace("-", "_")
    values = dict(_flat(settings))
    paths = [name] if name in values else [path for path in values if path.endswith(f".{name}")]
    if len(paths) != 1:
        return arg
    group, _, field = paths[0].rpartition(".")
    dotted = f"{group}." if group else ""
    if isinstance(values[paths[0]], bool) and value in ("True", "true", "False", "false"):
        return f"--{dotted}{'' if value in ('True', 'true') else 'no-'}{field.replace('_', '-')}"
    return f"--{dotted}{field}{equals}{value}"


def _read_config(file: str) -> dict:
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--config {file} cannot be read as JSON: {getattr(error, 'strerror', None) or error}"
        ) from None
    values = values.get("settings", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise ValueError(
            f"--config {file} holds no settings: expected a JSON object, or a run.json with settings"
        )
    return values


def _overlay(settings: Any, values: dict, file: str) -> Any:
    changes = {}
    for key, value in values.items():
        if key not in settings.__dataclass_fields__:
            raise ValueError(
                f"--config {file}: no setting {key!r}; there are: {', '.join(settings.__dataclass_fields__)}"
            )
        old = getattr(settings, key)
        value = tuple(value) if isinstance(value, list) else value
        if is_dataclass(old):
            if not isinstance(value, dict):
                raise ValueError(
                    f"--config {file}: {key}={value!r}, but {key} is a group of settings: expected a JSON"
                    " object"
                )
            value = _overlay(old, value, file)
        elif value is None and old is not None and "None" not in str(settings.__dataclass_fields__[key].type):
            raise ValueError(f"--config {file}: {key} must have a value, such as {old!r}")
        elif (
            None not in (old, value)
            and type(value) is not type(old)
            and (type(old), type(value)) != (float, int)
        ):
            raise ValueError(
                f"--config {file}: {key}={value!r} is not of the kind of {old!r}, its value in the preset"
            )
        changes[key] = value
    return type(settings)(**({f: getattr(settings, f) for f in settings.__dataclass_fields__} | changes))


def _one_line(box: str) -> str:
    """The message of a boxed tyro error, without the box and without the help below its rule."""
    words = []
    for line in box.splitlines():
        inner = line.strip().strip("│").strip()
        if line.startswith(("╭", "╰")):
            continue
        if inner.startswith("──"):
            if "Perhaps" not in box:
                break
            continue
        if inner.startswith("For full help"):
            break
        words.append(inner)
    return " ".join(words) + " (--help lists the settings)"


def cli(main: Callable[[Any], Any], presets: dict[str, Any], description: str = "") -> None:
    """Runs a week's `main(settings)` from the command line, with errors for people: one line, and an exit
    status that is not 0.

    Of several processes that torchrun started, the first one speaks for all; errors are printed by each.
    """
    speaks = os.environ.get("RANK", "0") == "0"
    with (
        errors_for_people(),
        open(os.devnull, "w") as nowhere,
        nullcontext() if speaks else redirect_stdout(nowhere),
    ):
        settings = parse(presets, description=description)
        for line in _description(settings):
            print(textwrap.fill(line, 120, subsequent_indent="  "))
        main(settings)


def _description(settings: Any, group: str = "settings") -> Iterator[str]:
    """A line for each group of settings. Of a group inside another, only what differs from its class's
    defaults: a run's log has all.
    """
    fields = {key: getattr(settings, key) for key in settings.__dataclass_fields__}
    usual = (
        {key: f.default for key, f in settings.__dataclass_fields__.items()} if group != "settings" else {}
    )
    shown = [f"{k}={v}" for k, v in fields.items() if not is_dataclass(v) and v != usual.get(k, MISSING)]
    if shown:
        yield f"{group}: {', '.join(shown)}"
    for key, value in fields.items():
        if is_dataclass(value):
            yield from _description(value, key if group == "settings" else f"{group}.{key}")


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in settings.__dataclass_fields__:
        value = getattr(settings, key)
        if is_dataclass(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Turns mistakes a person can mend (ValueError, by the rule of the house) into one line on stderr and
    exit status 2, a full disk into 3, Ctrl-C into 130. With LLM_WEEKS_TRACE=1 the traceback is shown instead.
    """
    if os.environ.get("LLM_WEEKS_TRACE"):
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped (Ctrl-C); what was there is kept", file=sys.stderr)
        raise SystemExit(130) from None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno != 28:  # ENOSPC
            raise
        print(
            "error: the disk is full: free some space and run again (a week's script with --resume); what was"
            " complete is kept",
            file=sys.stderr,
        )
        raise SystemExit(3) from None
