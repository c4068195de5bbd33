"""Which small faults do the tests notice? Puts faults into `shared`, one at a time, and runs the tests.

    make mutants                                    a sample of 300
    python -m tests.mutants --only shared/sampling  of one package
    python -m tests.mutants --again FAULTS.jsonl    those that were not noticed, once more

Places are drawn evenly from all where a fault can be put (operators of cosmic-ray, and calls left out), then
a fault for the place. A type annotation is no place: breaking one breaks the import, which any test notices.
A fault is noticed where a test of the module's own folder of tests fails or runs out of time, the short ones
first, then those marked slow. Each worker has a checkout of its own, so the working tree is not touched; what
is not committed is not tested.
"""

import ast
import difflib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import cosmic_ray.plugins
import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from tqdm import tqdm

from shared.commandline import errors_for_people, parse_args
from shared.runtime import ROOT, clock

KINDS = (
    "AddNot",
    "NumberReplacer",
    "ReplaceAndWithOr",
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_Div_Mul",
    "ReplaceBinaryOperator_FloorDiv_Div",
    "ReplaceBinaryOperator_Mod_Div",
    "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Pow_Mul",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBreakWithContinue",
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_IsNot_Is",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceContinueWithBreak",
    "ReplaceFalseWithTrue",
    "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse",
    "ReplaceUnaryOperator_Delete_Invert",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_USub_UAdd",
    "ZeroIterationForLoop",
)
"""Slips that a hand makes; not those that no hand makes, such as a shift in place of a sum, which all tests
notice.
"""
NOT_RUN_HERE = {"shared/training/kernels.py", "shared/serving/page_html.py"}
"""Triton's kernels need a GPU; the other is a page's text."""
TESTED_ELSEWHERE = {
    "shared/registry.py": ("tests/test_checkpoint.py",),
    "shared/checkpoint.py": ("tests/test_checkpoint.py", "tests/training/test_resume.py"),
    "shared/training/base_model.py": ("tests/weeks/test_week_06.py",),
}
OF_EXERCISES = (
    "exercise_command",
    "grading",
    "in_a_notebook",
    "kept_answers",
    "properties",
    "running",
    "shrinking",
    "week",
    "written_in_place",
)
"""Of tests/course, those of shared/course/exercise."""
TOO_LONG = ("exercises", "foreign")
"""Of tests/course, those that grade every answer to every exercise, for many minutes: never run here."""
MARKS = ("not slow", "slow")
LONGEST = 1800
"""Seconds that tests without a fault may take."""


@dataclass(frozen=True)
class Settings:
    """Puts faults into the package and counts those that the tests notice."""

    sample: int = 300
    seed: int = 0
    workers: int = 2
    only: str = "shared"
    """A file or a folder."""
    again: Path | None = None
    """Results of an earlier run: only what it did not notice."""
    out: Path = Path("build/mutants.jsonl")


@dataclass(frozen=True)
class Fault:
    """The `occurrence`-th place for an operator in a file."""

    file: str
    operator: str
    occurrence: int
    line: int


class LeaveOutCall(Operator):
    """A statement that is nothing but a call becomes `pass`."""

    def mutation_positions(self, node: parso.tree.NodeOrLeaf) -> Iterator[tuple]:
        is_call = node.type == "atom_expr" and node.children[-1].type == "trailer"
        if is_call and node.parent is not None and node.parent.type == "simple_stmt":
            yield node.start_pos, node.end_pos

    def mutate(self, node: parso.tree.NodeOrLeaf, index: int) -> parso.tree.NodeOrLeaf:
        return parso.parse("pass").children[0]

    @classmethod
    def examples(cls) -> tuple:
        return ()


def operators() -> dict[str, Operator]:
    """The kinds of fault, by name."""
    made = {name: cosmic_ray.plugins.get_operator(f"core/{name}")() for name in KINDS}
    return {**made, "LeaveOutCall": LeaveOutCall()}


def faults(file: Path, kinds: dict[str, Operator]) -> dict[tuple[int, int], list[Fault]]:
    """All faults that can be put into a file, by their place (line and column)."""
    source = (ROOT / file).read_text(encoding="utf-8")
    annotations = set(_places_of_annotations(ast.parse(source)))
    nodes = list(ast_nodes(get_ast(source)))
    places: dict[tuple[int, int], list[Fault]] = {}
    for name, kind in kinds.items():
        positions = ((place, node) for node in nodes for place, _ in kind.mutation_positions(node))
        for occurrence, (place, node) in enumerate(positions):
            is_separator = node.parent is not None and node.parent.type in ("parameters", "lambdef")
            if place not in annotations and not is_separator:  # the * before parameters that need a name
                places.setdefault(place, []).append(Fault(str(file), name, occurrence, place[0]))
    return places


def _places_of_annotations(tree: ast.Module) -> Iterator[tuple[int, int]]:
    for node in ast.walk(tree):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(annotation, ast.expr):
                lines = range(annotation.lineno, annotation.end_lineno + 1)
                yield from (
                    (line, column)
                    for line in lines
                    for column in range(200)
                    if _inside(annotation, line, column)
                )


def _inside(node: ast.expr, line: int, column: int) -> bool:
    return (node.lineno, node.col_offset) <= (line, column) < (node.end_lineno, node.end_col_offset)


def drawn(settings: Settings) -> list[Fault]:
    """The sample: places drawn evenly, then one fault for each."""
    if settings.again is not None:
        rows = [json.loads(line) for line in settings.again.read_text(encoding="utf-8").splitlines()]
        return [fault for row in rows if not row["noticed"] for fault in found_again(row)]
    chosen = ROOT / settings.only
    files = [chosen] if chosen.is_file() else sorted(chosen.rglob("*.py"))
    names = [file.relative_to(ROOT) for file in files]
    kinds = operators()
    places = [at for name in names if str(name) not in NOT_RUN_HERE for at in faults(name, kinds).values()]
    if not places:
        raise ValueError(f"--only {settings.only} names no Python code of shared: a file or folder is wanted")
    generator = random.Random(settings.seed)
    return [generator.choice(at) for at in generator.sample(places, min(settings.sample, len(places)))]


def found_again(row: dict) -> list[Fault]:
    """The fault of an earlier run in today's source, where its line may be another one; none where the line
    that it changed is gone, which is said.
    """
    old = Fault(**row["fault"])
    kind = operators()[old.operator]
    path = ROOT / old.file
    if path.exists():
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for at in faults(Path(old.file), {old.operator: kind}).values():
            for fault in at:
                on_such_a_line = f"-{lines[fault.line - 1]}" in row["change"].splitlines()
                if (
                    on_such_a_line
                    and change_of(source, mutate_code(source, kind, fault.occurrence)) == row["change"]
                ):
                    return [fault]
    print(f"{old.file}:{old.line} is not as it was, and left out:\n{row['change']}\n")
    return []


def change_of(source: str, broken: str) -> str:
    """The lines that differ, with - and +."""
    difference = difflib.unified_diff(source.splitlines(), broken.splitlines(), n=0, lineterm="")
    return "\n".join(list(difference)[3:])


def tests_of(file: str) -> tuple[str, ...]:
    """The tests of a module: those of its package, or the one file of a module that stands alone."""
    if file in TESTED_ELSEWHERE:
        return TESTED_ELSEWHERE[file]
    part = file.split("/")[1].removesuffix(".py")
    if file.startswith("shared/course/exercise/"):
        return tuple(f"tests/course/test_{name}.py" for name in OF_EXERCISES)
    if part == "course":
        left_out = {f"test_{name}.py" for name in (*OF_EXERCISES, *TOO_LONG)}
        files = sorted((ROOT / "tests/course").glob("test_*.py"))
        return tuple(f"tests/course/{path.name}" for path in files if path.name not in left_out)
    folder = f"tests/{part}"
    return (folder if (ROOT / folder).exists() else f"tests/test_{part}.py",)


def passes(checkout: Path, tests: tuple[str, ...], marks: str, limit: float) -> bool:
    """Runs tests in a checkout, in a process forked from this one: PyTorch is imported already."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(_run_tests(checkout, tests, marks))
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, limit)
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return os.waitstatus_to_exitcode(status) in (0, 5)  # 5: no test has these marks


def _run_tests(checkout: Path, tests: tuple[str, ...], marks: str) -> int:
    import pytest

    os.chdir(checkout)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.path.insert(0, str(checkout))
    plugins = ("no:nbval", "no:cacheprovider", "no:xdist")
    arguments = [*tests, "-x", "-q", "-m", marks, *(part for name in plugins for part in ("-p", name))]
    return int(pytest.main(arguments))


class Bench:
    """Tries faults in one checkout."""

    def __init__(self, checkout: Path):
        self.checkout = checkout
        self.kinds = operators()

    def tried(self, fault: Fault, limits: dict[tuple[tuple[str, ...], str], float]) -> dict:
        """The fault, whether it was noticed, by tests with which marks, and what it changed."""
        path = self.checkout / fault.file
        source = path.read_text(encoding="utf-8")
        broken = mutate_code(source, self.kinds[fault.operator], fault.occurrence)
        change = change_of(source, broken)
        tests = tests_of(fault.file)
        for marks in MARKS:
            path.write_text(broken, encoding="utf-8")
            try:
                noticed = not passes(self.checkout, tests, marks, limits[tests, marks])
            finally:
                path.write_text(source, encoding="utf-8")
            if noticed:
                return {"fault": asdict(fault), "noticed": True, "by": marks, "change": change}
        return {"fault": asdict(fault), "noticed": False, "by": None, "change": change}

    def limit(self, tests: tuple[str, ...], marks: str) -> float:
        """Seconds after which tests count as failed. Raises ValueError where they fail without a fault."""
        started = clock()
        if not passes(self.checkout, tests, marks, LONGEST):
            raise ValueError(f"{' '.join(tests)} ({marks}) fail without any fault: mend that first")
        return 60 + 3 * (clock() - started)


bench: Bench
"""Of this worker."""


def set_up(folder: str) -> None:
    """Makes this process a worker, with a checkout of its own in `folder`."""
    global bench
    checkout = Path(folder) / str(os.getpid())
    subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    # Two faults of one size in one second have the same stamp: a compiled form would be taken for the other.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(checkout)}
    for name in [name for name in sys.modules if name.split(".")[0] in ("shared", "tests")]:
        del sys.modules[name]  # the tests import those of the checkout
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    for library in ("torch", "transformers", "hypothesis"):
        importlib.import_module(library)  # once, not in every process of tests
    bench = Bench(checkout)


def limit_of(tests_and_marks: tuple[tuple[str, ...], str]) -> float:
    """How long this worker's bench lets tests run."""
    return bench.limit(*tests_and_marks)


def try_fault(limits: dict[tuple[tuple[str, ...], str], float], fault: Fault) -> dict:
    """What this worker's bench says."""
    return bench.tried(fault, limits)


def main(settings: Settings) -> None:
    """Tries the sample, writes a line for each fault and prints what was not noticed."""
    sample = drawn(settings)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with (
        settings.out.open("w", encoding="utf-8") as file,
        tempfile.TemporaryDirectory() as folder,
        # Its workers are no daemons: tests start processes of their own.
        ProcessPoolExecutor(settings.workers, get_context("fork"), set_up, (folder,)) as pool,
    ):
        wanted = [(tests, marks) for tests in {tests_of(f.file): 0 for f in sample} for marks in MARKS]
        measured = tqdm(pool.map(limit_of, wanted), total=len(wanted), desc="tests without a fault")
        limits = dict(zip(wanted, measured))
        tries = as_completed([pool.submit(try_fault, limits, fault) for fault in sample])
        for row in tqdm((done.result() for done in tries), total=len(sample), desc="faults"):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
    for row in rows:
        if not row["noticed"]:
            print(f"{row['fault']['file']}:{row['fault']['line']}, not noticed:\n{row['change']}\n")
    noticed = sum(row["noticed"] for row in rows)
    print(f"{noticed} of {len(rows)} faults noticed ({noticed / len(rows):.0%}); all in {settings.out}")


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
