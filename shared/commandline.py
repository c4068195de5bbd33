"""Week 0. The command line of every script: presets, settings from flags and files, and one-line errors.

A script hands `cli` its `main` and its presets; the settings are frozen dataclasses, and their fields are the
flags.
"""

import errno
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from shared.devices import devices
from shared.runtime import os_error_in, read_json

HELP = {"-h", "--help", "--help-all"}
HEADING = re.compile(r"^ (\S+) options *$", re.M)
"""Above a group of settings in tyro's help, as it is where no terminal reads it."""
RULE = re.compile(r"-{20,}")
SWITCH_VALUES = {"True": True, "true": True, "False": False, "false": False}


def parse(presets: dict[str, Any], argv: list[str] | None = None, description: str = "") -> Any:
    """Settings from a command line. `presets` maps a name to a settings dataclass, all of one type with a
    field `preset`.

    `--preset NAME` chooses where to start (none given: the hardware chooses, and a line says so), `--config
    FILE.json` lays a file over it (as saved in a run's `run.json`, or only the fields to change), and every
    other flag is a field: `--train.lr 1e-3`, or `--lr 1e-3` where only one group of settings has such a
    field. A switch may be given a value: `--resume=True`. Raises ValueError for a flag that has no effect
    (see `idle_settings`).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    name = _take(args, "--preset")
    file = _take(args, "--config")
    if name is None:
        name = "laptop" if HELP.intersection(args) else _preset_for_this_machine(presets)
    if name not in presets:
        raise ValueError(f"no preset is called {name!r}; there are: {', '.join(presets)}")
    default = presets[name]
    if file is not None:
        default = _overlay(default, _read_config(file), file)
    args = [_spelled_out(arg, default) for arg in args]
    settings = parse_args(type(default), args, f"{description}\n{_more_flags(presets)}", default)
    _refuse_idle(settings, args)
    return settings


def _more_flags(presets: dict[str, Any]) -> str:
    """What `--help` says of the flags that are no fields."""
    return (
        f"--preset {{{','.join(presets)}}}: where the settings start; none: chosen for this machine.\n\n"
        "--config FILE.json: settings from a file, such as a run's run.json."
    )


def _preset_for_this_machine(presets: dict[str, Any]) -> str:
    best = devices()[0].type
    name = "gpu" if best == "cuda" and "gpu" in presets else "laptop"
    print(f"preset: {name} (chosen for this machine's {best}; there are: {', '.join(presets)})")
    return name


def parse_args(kind: type, args: list[str], description: str | None = "", default: Any = None) -> Any:
    """A dataclass of type `kind` from command-line flags.

    default: an instance that the flags change; None takes the defaults of `kind`. Raises ValueError, in one
    line, for an unknown flag or a value of the wrong type.
    """
    program = Path(sys.argv[0]).name
    if HELP.intersection(args):
        _print_help(kind, args, description, default)
    message = StringIO()
    try:
        with redirect_stderr(message):
            options: dict[str, Any] = {} if default is None else {"default": default}
            options |= {"prog": program, "description": description, "registry": JSON_FLAGS}
            return tyro.cli(kind, args=args, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(message.getvalue())) from None


JSON_FLAGS = ConstructorRegistry()
"""How tyro takes fields that hold a group of settings or none, or several groups: as JSON, in one flag."""


@JSON_FLAGS.primitive_rule
def _as_json(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    inside: list[Any] = [kind for kind in get_args(info.type) if is_dataclass(kind)]
    if len(inside) != 1:
        return None
    (kind,) = inside
    several = info.type_origin is tuple

    def read(words: list[str]) -> Any:
        values = json.loads(words[0])
        if several:
            return tuple(kind(**value) for value in values)
        return None if values is None else kind(**values)

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, tuple if several else kind),
        str_from_instance=lambda value: [_json_text(value)],
    )


def _json_text(value: Any) -> str:
    """A group of settings, several, or none, as JSON."""
    several = isinstance(value, tuple)
    return json.dumps([asdict(group) for group in value] if several else value and asdict(value))


def _print_help(kind: type, args: list[str], description: str | None, default: Any) -> NoReturn:
    """Prints what there is to set and ends the program; groups of settings in a line each, if not all are
    asked for.
    """
    text = StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    with redirect_stdout(text), suppress(SystemExit):
        options |= {"prog": Path(sys.argv[0]).name, "description": description, "registry": JSON_FLAGS}
        tyro.cli(kind, args=["--help"], **options)
    print(text.getvalue() if "--help-all" in args else folded_help(text.getvalue()), end="")
    raise SystemExit(0)


def folded_help(text: str) -> str:
    """Tyro's help with each group of settings as one line: how many there are, and what they are for."""
    parts = HEADING.split(text)  # the head and the plain options, then a name and a text for each group
    groups = list(zip(parts[1::2], parts[2::2]))
    if not groups:
        return text
    lines = [_folded_group(name, inside.splitlines()) for name, inside in groups]
    return f"{parts[0].rstrip()}\n\n groups of settings (--help-all lists them)\n" + "\n".join(lines) + "\n"


def _folded_group(name: str, lines: list[str]) -> str:
    inside = [line.strip() for line in lines]
    settings = [line for line in inside if line.startswith("--") and not RULE.fullmatch(line)]
    rules = [i for i, line in enumerate(inside) if RULE.fullmatch(line)]
    about = " ".join(inside[rules[0] + 1 : rules[1]]) if len(rules) > 1 else ""
    text = f"--{name}.*  {len(settings)} settings. {about}"
    return textwrap.fill(text, 79, initial_indent="  ", subsequent_indent="        ")


def idle_settings(settings: Any) -> dict[str, str]:
    """The settings, or groups of them, that a run with these does not read: dotted paths, with the reason.

    They are what the method `idle()` gives, of the settings and of each group among them that has one.
    """
    idle = dict(settings.idle()) if hasattr(settings, "idle") else {}
    for field in fields(settings):
        group = getattr(settings, field.name)
        if is_dataclass(group) and field.name not in idle:
            idle |= {f"{field.name}.{path}": why for path, why in idle_settings(group).items()}
    return idle


def without_idle(settings: Any, preset: Any) -> Any:
    """The settings with the values of `preset` where they are not read."""
    for path in idle_settings(settings):
        settings = _with(settings, path, preset)
    return settings


def _with(settings: Any, path: str, other: Any) -> Any:
    """The settings with the value that `path` has in `other`."""
    name, _, rest = path.partition(".")
    value = getattr(other, name)
    if rest:
        value = _with(getattr(settings, name), rest, value)
    return replace(settings, **{name: value})


def _refuse_idle(settings: Any, args: list[str]) -> None:
    """Raises ValueError for the flags among `args` (spelled out) that this run does not read."""
    idle = idle_settings(settings)
    without_effect = []
    for path in _given(settings, args):
        for idle_path, why in idle.items():
            if path == idle_path or path.startswith(f"{idle_path}."):
                without_effect.append(f"{_flag(path)} has no effect in this run ({why})")
                break
    if without_effect:
        raise ValueError(f"{'; '.join(without_effect)}. Leave out what has no effect")


def _given(settings: Any, args: list[str]) -> Iterator[str]:
    """The dotted paths of the fields that these flags set."""
    for path, _ in _flat(settings):
        names = {_flag(path), _flag(path, negated=True)}
        if any(arg.partition("=")[0].replace("_", "-") in names for arg in args):
            yield path


def flags(settings: Any, preset: Any) -> list[str]:
    """The flags that make `settings` of `preset`: what `parse` reads back, and what a run's log says of how
    it was started.

    >>> from shared.training import TrainConfig
    >>> flags(TrainConfig(steps=5, log_updates=True, eval_windows=3), TrainConfig())
    ['--steps', '5', '--eval-windows', '3', '--log-updates']
    """
    preset_values = dict(_flat(preset))
    words: list[str] = []
    for path, value in _flat(settings):
        if value == preset_values[path]:
            continue
        if isinstance(value, bool):
            words.append(_flag(path, negated=not value))
        else:
            words += [_flag(path), *_as_words(value, preset_values[path])]
    return words


def _as_words(value: Any, other: Any) -> list[str]:
    """A value as it is written behind its flag. other: one that the flag may have, too, which tells the kind
    of an empty one.
    """
    values, others = (given if isinstance(given, tuple) else (given,) for given in (value, other))
    if any(map(is_dataclass, (*values, *others))):
        return [_json_text(value)]
    return list(map(str, values))


def _flag(path: str, negated: bool = False) -> str:
    """The flag of a field: "--train.warmup-steps" for "train.warmup_steps", "--no-resume" for a switch."""
    group, dot, field = path.replace("_", "-").rpartition(".")
    prefix = "no-" if negated else ""
    return f"--{group}{dot}{prefix}{field}"


def _take(args: list[str], flag: str) -> str | None:
    """The value of `flag`, which is removed from `args`; None if it isn't there."""
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
    """A flag as tyro takes it: `--lr=1` as `--train.lr=1`, `--resume=False` as `--no-resume`."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    name = flag[2:].replace("-", "_")
    values = dict(_flat(settings))
    paths = [name] if name in values else [path for path in values if path.endswith(f".{name}")]
    if len(paths) != 1:
        return arg
    path = paths[0]
    if isinstance(values[path], bool) and value in SWITCH_VALUES:
        return _flag(path, negated=not SWITCH_VALUES[value])
    return f"{_flag(path)}{equals}{value}"


def _read_config(file: str) -> dict[str, Any]:
    """The settings in a JSON file: the whole of it, or its field `settings`, as a run.json has it."""
    try:
        values = read_json(Path(file))
    except OSError as error:
        raise ValueError(f"--config {file} cannot be read as JSON: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"--config {file} cannot be read as JSON: {error}") from None
    if isinstance(values, dict):
        values = values.get("settings", values)
    if not isinstance(values, dict):
        raise ValueError(
            f"--config {file} holds no settings: expected a JSON object, or a run.json with settings"
        )
    return values


def _overlay(settings: Any, values: dict[str, Any], file: str) -> Any:
    """`settings` with the fields that `values` names changed, in groups of settings too."""
    types = {field.name: str(get_type_hints(type(settings))[field.name]) for field in fields(settings)}
    changes = {}
    for key, value in _as_called_now(values, types).items():
        if key not in types:
            raise ValueError(f"--config {file}: no setting {key!r}; there are: {', '.join(types)}")
        old = getattr(settings, key)
        if not is_dataclass(old):
            value = tuple(value) if isinstance(value, list) else value
            _check_config_value(f"--config {file}: {key}", old, value, optional="None" in types[key])
            changes[key] = value
        elif isinstance(value, dict):
            changes[key] = _overlay(old, value, file)
        else:
            raise ValueError(
                f"--config {file}: {key}={value!r}, but {key} is a group of settings: expected a JSON object"
            )
    return replace(settings, **changes)


def _as_called_now(values: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """The values with the switch that older runs kept for TensorBoard as the setting that replaced it."""
    if "tensorboard" not in values or "tensorboard" in names:
        return values
    rest = {key: value for key, value in values.items() if key != "tensorboard"}
    return {**rest, "tracker": "tensorboard" if values["tensorboard"] else "none"}


def _check_config_value(what: str, old: Any, value: Any, optional: bool) -> None:
    """Raises ValueError where `value` cannot stand for `old`, the preset's: another type, or None."""
    if value is None and old is not None and not optional:
        raise ValueError(f"{what} must have a value, such as {old!r}")
    if value is None or old is None or type(value) is type(old):
        return
    if isinstance(old, float) and type(value) is int:
        return
    raise ValueError(f"{what}={value!r} is not of the kind of {old!r}, its value in the preset")


def _one_line(box: str) -> str:
    """The message of a boxed tyro error, without the box and without the help below its rule."""
    words = []
    for line in box.splitlines():
        inner = line.strip().strip("│").strip()
        is_rule = inner.startswith("──")
        if inner.startswith("For full help") or (is_rule and "Perhaps" not in box):
            break
        if is_rule or line.startswith(("╭", "╰")):
            continue
        words.append(inner)
    message = " ".join(words)
    group = re.match(r"Error parsing ([\w.-]+):", message)  # of settings inside of settings
    flags = f"; these begin with --{group[1]}." if group else ""
    return f"{message} (--help lists the settings{flags})"


def cli(main: Callable[[Any], Any], presets: dict[str, Any], description: str = "") -> None:
    """Runs a week's `main(settings)` from the command line, with errors for people: one line, and an exit
    status that is not 0.

    Of several processes that torchrun started, only the first prints; errors are printed by each. Settings
    with a true `quiet` are not shown.
    """
    with errors_for_people(), ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
        settings = parse(presets, description=description)
        shown = () if getattr(settings, "quiet", False) else _description(settings)
        for line in shown:
            print(textwrap.fill(line, 120, subsequent_indent="  "))
        main(settings)


def _description(settings: Any) -> Iterator[str]:
    """A line for each group of settings that the run reads. Of a group inside another, only what differs from
    its class's defaults: a run's log has all.
    """
    yield from _group_lines(settings, "settings", {}, idle_settings(settings))


def _group_lines(settings: Any, name: str, defaults: dict[str, Any], idle: Container[str]) -> Iterator[str]:
    prefix = "" if name == "settings" else f"{name}."
    values = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if f"{prefix}{field.name}" not in idle
    }
    groups = {key: value for key, value in values.items() if is_dataclass(value)}
    shown = [
        f"{key}={value}"
        for key, value in values.items()
        if key not in groups and value != defaults.get(key, MISSING)
    ]
    if shown:
        yield f"{name}: {', '.join(shown)}"
    for key, group in groups.items():
        class_defaults = {field.name: field.default for field in fields(group)}
        yield from _group_lines(group, f"{prefix}{key}", class_defaults, idle)


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each field's dotted path ("train.lr") and value, in the order of the dataclasses."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value) and is_dataclass(field.type):  # not one of a group or none
            yield from _flat(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


DISK_FULL = "free some space and run again (a week's script with --resume); what was complete is kept"
ELSEWHERE = "choose another place (LLM_WEEKS_DATA for what is fetched, LLM_WEEKS_OUTPUT for what runs write)"
REFUSALS = {
    errno.ENOSPC: ("the disk is full", DISK_FULL),
    errno.EDQUOT: ("your quota on this disk is used up", DISK_FULL),
    errno.EFBIG: ("the file would be larger than is allowed here", ELSEWHERE),
    errno.EROFS: ("the file system is read-only", ELSEWHERE),
    errno.EACCES: ("permission denied", f"have it allowed, or {ELSEWHERE}"),
    errno.EPERM: ("not permitted", f"have it allowed, or {ELSEWHERE}"),
    errno.ENOENT: ("no such file or folder", "look at the path"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "look at the path"),
    errno.EISDIR: ("this is a folder, and a file is needed", "look at the path"),
    errno.EEXIST: ("something of this name is there already", "choose another name, or move it away"),
    errno.ENOTEMPTY: ("this folder is not empty", "choose another, or move away what is in it"),
    errno.ENAMETOOLONG: ("this name is too long", "choose a shorter one"),
    errno.ELOOP: ("these links lead round in a circle", "look at the path"),
    errno.EMFILE: ("too many files are open", "allow more (ulimit -n), or ask for less at a time"),
    errno.ENOMEM: ("there is not enough memory", "ask for less at a time, or choose a smaller model"),
    errno.EADDRINUSE: ("another program listens there", "choose another --port"),
}
"""What the operating system may refuse and a person can mend: what it is, and what to do."""
CLOSED_PIPE = 141
"""The exit status of a program that wrote where nobody reads (128 + the number of SIGPIPE)."""


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Turns errors that the user can mend into one line on stderr and an exit status.

    A ValueError, which is what this course's code raises for wrong input, gives status 2, what the operating
    system refuses (a full disk, no permission) and too little memory 3, Ctrl-C 130, and output that nobody
    reads any more (`| head -1`) 141. With LLM_WEEKS_TRACE=1 the traceback is shown instead.
    Output that the console or the file behind it has no characters for is printed as escapes: it never ends a
    run.
    """
    _print_what_the_console_lacks_as_escapes()
    if os.environ.get("LLM_WEEKS_TRACE"):
        yield
        return
    try:
        try:
            yield
        finally:
            _flush_output()  # here, where an error is still caught, and not as the interpreter ends
    except KeyboardInterrupt:
        print(file=sys.stderr)  # behind the ^C of the terminal
        _end("stopped (Ctrl-C); what was there is kept", 130)
    except BrokenPipeError:
        # What is still to be written would raise the error again as the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(BrokenPipeError):  # stderr may go there too
            _end("stopped: nobody reads the output any more; what was there is kept", CLOSED_PIPE)
        raise SystemExit(CLOSED_PIPE) from None
    except ValueError as error:
        _end(f"error: {error}", 2)
    except RecursionError:
        _end("error: something that was read is nested too deeply (LLM_WEEKS_TRACE=1 shows where)", 2)
    except Exception as error:
        refused = OSError(errno.ENOMEM, "") if _is_memory(error) else os_error_in(error)
        if refused is None or refused.errno not in REFUSALS:
            raise
        _end(f"error: {_refusal(refused)}", 3)


def _is_memory(error: Exception) -> bool:
    """Whether there was too little memory, for Python or for PyTorch."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _flush_output() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _end(line: str, status: int) -> NoReturn:
    print(" ".join(line.split("\n")), file=sys.stderr)
    raise SystemExit(status) from None


def _refusal(error: OSError) -> str:
    """What was refused, of which file, and what to do."""
    assert error.errno is not None
    what, advice = REFUSALS[error.errno]
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    where = f"{' -> '.join(files)}: " if files else ""
    return f"{where}{what}: {advice}"


def _print_what_the_console_lacks_as_escapes() -> None:
    """Greek in a console of code page 1252 becomes "\\u03b1", where Python would raise UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
