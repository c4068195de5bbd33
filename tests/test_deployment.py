"""Dockerfile, compose.yaml, the workflow that builds the image, and docs/deploying.md: what can be held
without Docker. They agree with each other and with the server, everything that the server imports is
installed, and what the image runs was run.
"""

import ast
import fnmatch
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement

from shared.commandline import parse_args
from shared.course.structure import Structure, source_files
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import ROOT
from shared.serving.__main__ import Settings, wanted_key
from shared.serving.api import create_app
from shared.tokenizers import CharTokenizer

DOCS = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICE = COMPOSE["services"]["server"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/image.yml").read_text(encoding="utf-8"))
SHELL = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STRUCTURE = Structure.read()
MAKES_A_MODEL = re.search(r"<<'END'\n(.*?)\nEND", "\n".join(SHELL), re.DOTALL)[1]


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: (name, what follows), a line each."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    without_comments = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    lines = without_comments.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


IMAGE = instructions()
LAST = IMAGE[max(i for i, (name, _) in enumerate(IMAGE) if name == "FROM") :]
ENTRYPOINT, CMD = (json.loads(dict(LAST)[name]) for name in ("ENTRYPOINT", "CMD"))
HEALTHCHECK = json.loads(dict(LAST)["HEALTHCHECK"].partition("CMD ")[2])


def blocks(*languages: str) -> list[str]:
    """The page's blocks of code in these languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def plain(text: str) -> str:
    """What compose makes of ${NAME:-value} where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def seconds(text: str) -> int:
    return int(re.fullmatch(r"(\d+)s", text)[1])


def pods() -> dict:
    """What Kubernetes runs."""
    documents = [yaml.safe_load(text) for text in blocks("yaml")]
    deployment = next(d for d in documents if d.get("kind") == "Deployment")
    return deployment["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def app():
    model = GPT(GPTConfig(vocab_size=2, block_size=8, n_layer=1, n_head=1, n_embd=4))
    app = create_app(model, CharTokenizer("ab"))
    yield app
    app.state.server.engine.close()


# The server's own words.


def commands() -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command of this course that the page, the image, compose or the workflow
    names.
    """
    defaults = ENTRYPOINT[3:]
    served = [[*defaults, *CMD], [*defaults, *map(plain, SERVICE["command"])]]
    served.append([*defaults, *pods()["containers"][0]["args"]])
    for document in map(yaml.safe_load, blocks("yaml")):
        if "services" in document:
            served.append(document["services"]["server"]["command"])
    found = [("shared.serving", arguments) for arguments in served]
    for line in "\n".join([*blocks("sh", "ini"), *SHELL]).replace("\\\n", " ").splitlines():
        if "python -m shared." in line:
            words = shlex.split(line, comments=True)
            at = words.index("-m")
            found.append((words[at + 1], words[at + 2 :]))
    return found


def test_the_commands_are_found():
    assert Counter(module for module, _ in commands()) == {"shared.serving": 10, "shared.export": 2}


@pytest.mark.parametrize(("module", "arguments"), commands())
def test_every_command_is_one_that_the_course_knows(module, arguments):
    script = f"{module}.__main__" if module in STRUCTURE.packages else module
    parse_args(importlib.import_module(script).Settings, arguments)


def test_every_setting_in_the_text_is_one_of_the_server():
    known = {f"--{name.replace('_', '-')}" for name in Settings.__dataclass_fields__ if name != "limits"}
    switches = [
        name for name, field in Settings.__dataclass_fields__.items() if field.default in (True, False)
    ]
    known |= {f"--no-{name.replace('_', '-')}" for name in switches}
    limits = Settings.__dataclass_fields__["limits"].default_factory
    known |= {f"--limits.{name.replace('_', '-')}" for name in limits.__dataclass_fields__}
    named = {m for m in re.findall(r"`(--[\w.-]+)[^`]*`", DOCS)} - {"--gpus", "--help"}
    assert len(named) > 10 and named <= known


def test_every_metric_that_the_page_names_is_told(app):
    registry = app.state.server.metrics.registry
    told = {sample.name for family in registry.collect() for sample in family.samples}
    told.add("llm_requests_total")
    named = set(re.findall(r"`?(llm_\w+)", DOCS))
    assert len(named) >= 8 and {n for n in named if n not in told and f"{n}_count" not in told} == set()


def test_every_path_that_is_probed_or_proxied_is_one_of_the_app(app):
    paths = {route.path for route in app.routes}
    container = pods()["containers"][0]
    probes = [probe["httpGet"]["path"] for key, probe in container.items() if key.endswith("Probe")]
    health = re.search(r"'GET', '([^']+)'", HEALTHCHECK[-1])[1]
    asked = re.findall(r'(?<!base_url=")http://127\.0\.0\.1:8000(/[\w/]+)', DOCS + "\n".join(SHELL))
    assert len(probes) == 3 and len(asked) >= 3 and {*probes, health, *asked} <= paths
    prefixes = re.findall(r"location (/\w+/)", DOCS)
    assert all(any(path.startswith(prefix) for path in paths) for prefix in prefixes)


# They agree with each other.


def test_one_port_everywhere():
    port = parse_args(Settings, [*ENTRYPOINT[3:], *CMD]).port
    assert port == Settings("smollm2").port == int(dict(LAST)["EXPOSE"])
    assert f"'127.0.0.1', {port}," in HEALTHCHECK[-1]
    assert [plain(p) for p in SERVICE["ports"]] == [f"127.0.0.1:{port}:{port}"]  # for this machine only
    container = pods()["containers"][0]
    assert container["ports"] == [{"containerPort": port}]
    assert {probe["httpGet"]["port"] for key, probe in container.items() if key.endswith("Probe")} == {port}
    assert set(re.findall(r"proxy_pass http://[\d.]+:(\d+)", DOCS)) == {str(port)}
    assert set(re.findall(r"reverse_proxy \S+ [\d.]+:(\d+)", DOCS)) == {str(port)}


def test_nobody_kills_it_before_its_grace_is_over():

    def needed_seconds(arguments: list[str]) -> float:
        return parse_args(Settings, arguments).grace + 10

    command = [*ENTRYPOINT[3:], *map(plain, SERVICE["command"])]
    assert seconds(SERVICE["stop_grace_period"]) >= needed_seconds(command)
    service = next(text for text in blocks("ini") if "ExecStart" in text)
    grace = re.search(r"--grace (\d+)", service)[1]
    timeout = int(re.search(r"TimeoutStopSec=(\d+)", service)[1])
    assert timeout >= needed_seconds(["--model", "smollm2", "--grace", grace])
    pod = pods()
    container = pod["containers"][0]
    waits = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= waits + needed_seconds(container["args"])


def test_proxies_allow_what_the_server_allows():
    limits = Settings("smollm2").limits
    assert int(re.search(r"client_max_body_size (\d+)m;", DOCS)[1]) << 20 == limits.body
    assert all(int(s) > limits.seconds for s in re.findall(r"proxy_read_timeout (\d+)s;", DOCS))


def test_the_page_describes_the_variables_that_compose_reads():
    key_variable = Settings("smollm2").api_key_variable
    read = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text(encoding="utf-8")))
    rows = re.search(r"\| variable .*?\n\n", DOCS, re.DOTALL)[0].strip().splitlines()[2:]
    described = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert described == read | {key_variable}
    assert key_variable in SERVICE["environment"]  # without a value: passed on where it is set


# Who may do what.


def test_the_image_does_not_run_as_root_and_may_write_in_two_places():
    assert int(dict(LAST)["USER"]) > 0 and SERVICE["user"] == dict(LAST)["USER"]
    assert SERVICE["read_only"] and SERVICE["cap_drop"] == ["ALL"]
    assert SERVICE["security_opt"] == ["no-new-privileges:true"]
    writable = [v for v in SERVICE["volumes"] if isinstance(v, str) or not v["read_only"]]
    assert writable == ["data:/data"] and SERVICE["tmpfs"] == ["/tmp"] and "data" in COMPOSE["volumes"]
    variables = " ".join(value for name, value in LAST if name == "ENV").split()
    assert f"LLM_WEEKS_DATA={dict(LAST)['VOLUME']}" in variables
    assert SERVICE["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}
    mounted = next(v["target"] for v in SERVICE["volumes"] if not isinstance(v, str))
    assert mounted == dict(LAST)["WORKDIR"]  # so that --model NAME is a folder there


def test_only_what_is_copied_reaches_the_image():
    """Whatever else lies in the folder, keys and checkpoints among it, Docker is not even shown."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copies = [rest.split() for name, rest in IMAGE if name == "COPY" and "--from" not in rest]
    copied = [path for *paths, _ in copies for path in paths]
    assert rules[0] == "*" and sorted(rule[1:] for rule in rules if rule.startswith("!")) == sorted(copied)
    assert all((ROOT / path).exists() for path in copied)
    for name, rest in IMAGE:
        assert name != "ADD"
        assert name == "HEALTHCHECK" or not re.search("KEY|TOKEN|PASSWORD|SECRET", rest)


def test_the_workflow_may_do_no_more_than_it_must():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    jobs = WORKFLOW["jobs"]
    assert "permissions" not in jobs["test"] and jobs["publish"]["permissions"] == {"packages": "write"}
    assert jobs["publish"]["needs"] == "test"
    assert jobs["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    # What others name (a branch, a tag) is no part of a program.
    assert not any("${{" in script for script in SHELL)
    assert all("timeout-minutes" in job for job in jobs.values())


def test_every_block_of_yaml_on_the_page_can_be_read():
    assert len([yaml.safe_load(text) for text in blocks("yaml")]) == 3


# What is installed.


def needed(tree: ast.Module) -> ast.Module:
    """What a module cannot do without: imports whose failing it answers, and those that only its types are
    for, are taken out.
    """

    class Spare(ast.NodeTransformer):
        def visit_Try(self, node: ast.Try) -> ast.AST:
            if any("ImportError" in ast.dump(handler) for handler in node.handlers):
                node.body = [ast.Pass()]
            return self.generic_visit(node)

        def visit_If(self, node: ast.If) -> ast.AST:
            return ast.Pass() if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Spare().visit(tree)


def reachable(start: str) -> dict[str, ast.Module]:
    """The modules of `shared` that importing `start` may import, now or later, with their packages."""
    files = source_files()
    modules: dict[str, ast.Module] = {}
    left = [start]
    while left:
        name = left.pop()
        if name in files and name not in modules:
            modules[name] = needed(ast.parse(files[name].read_text(encoding="utf-8")))
            left += [*STRUCTURE.imports(modules[name]), name.rpartition(".")[0]]
    return modules


def foreign(tree: ast.Module) -> set[str]:
    """Packages of others that a module imports."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names} - {"shared"} - set(sys.stdlib_module_names)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(declared: list[str]) -> set[str]:
    """The distributions that pip installs for `declared`, with all that they ask for themselves."""
    found: set[tuple[str, str]] = set()
    left = [(normal(r.name), extra) for r in map(Requirement, declared) for extra in ("", *r.extras)]
    while left:
        name, extra = pair = left.pop()
        if pair in found:
            continue
        found.add(pair)
        for text in importlib.metadata.requires(name) or []:
            r = Requirement(text)
            if r.marker is None or r.marker.evaluate({"extra": extra}):
                left += [(normal(r.name), more) for more in ("", *r.extras)]
    return {name for name, _ in found}


DISTRIBUTIONS = cache(importlib.metadata.packages_distributions)


def missing(tree: ast.Module, distributions: set[str]) -> set[str]:
    """The packages that a module imports and none of these distributions has."""

    def is_there(name: str) -> bool:
        return any(normal(distribution) in distributions for distribution in DISTRIBUTIONS().get(name, []))

    return {name for name in foreign(tree) if not is_there(name)}


def extras() -> set[str]:
    """What the Dockerfile installs beside the package's own dependencies."""
    assert '".[$EXTRAS]"' in dict(IMAGE[: -len(LAST)])["RUN"]
    arguments = [value for name, value in IMAGE if name == "ARG"]
    (names,) = (value.removeprefix("EXTRAS=") for value in arguments if value.startswith("EXTRAS="))
    return set(names.split(","))


@pytest.mark.slow
def test_the_image_holds_everything_that_the_server_imports():
    project = PROJECT["project"]
    chosen = [d for extra in extras() for d in project["optional-dependencies"][extra]]
    distributions = installed(project["dependencies"] + chosen)
    modules = reachable("shared.serving.__main__")
    assert {"shared.serving.engine", "shared.serving.page", "shared.quantization.native"} <= modules.keys()
    assert {"shared.models", "shared.models.gpt", "shared.adapters.files"} <= modules.keys()
    gaps = {name: missing(tree, distributions) for name, tree in modules.items()}
    gaps["shared.trackers"] -= {"wandb", "trackio"}  # only a training that asks for one imports it
    for name in ("shared.retrieval.embedders", "shared.retrieval.stores"):  # only a server with documents
        gaps[name] -= {"sentence_transformers", "transformers", "faiss", "qdrant_client"}
    assert {name: gap for name, gap in gaps.items() if gap} == {}
    assert missing(modules["shared.serving.gate"], installed(project["dependencies"])) == {
        "fastapi",
        "prometheus_client",
        "starlette",
    }


def test_the_package_holds_all_its_files():
    """A wheel has no file that is not named, and no folder that is no package."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for path in (ROOT / "shared").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            folder = next(folder for folder in path.parents if (folder / "__init__.py").exists())
            package = ".".join(folder.relative_to(ROOT).parts)
            inside = path.relative_to(folder).as_posix()
            named = any(fnmatch.fnmatch(inside, pattern) for pattern in data.get(package, []))
            assert named or (path.suffix == ".py" and path.parent == folder), path


# The key.


def test_the_key_comes_from_a_file_or_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LLM_WEEKS_API_KEY", raising=False)
    assert wanted_key(Settings("m")) is None
    monkeypatch.setenv("LLM_WEEKS_API_KEY", "of the environment")
    (tmp_path / "key").write_text("of the file\n")  # as an editor ends it
    assert wanted_key(Settings("m")) == "of the environment"
    assert wanted_key(Settings("m", api_key_file=str(tmp_path / "key"))) == "of the file"


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n", "empty"), (b"\xff", "not UTF-8"), (None, "No such file")]
)
def test_a_key_that_was_meant_but_is_not_there_opens_no_door(tmp_path, monkeypatch, content, message):
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        wanted_key(Settings("m", api_key_file=str(tmp_path / "key")))
    monkeypatch.setenv("LLM_WEEKS_API_KEY", "")
    with pytest.raises(ValueError, match="LLM_WEEKS_API_KEY holds an empty API key"):
        wanted_key(Settings("m"))


# What the image runs.


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def environment_of_the_image(site: Path, data: Path) -> dict[str, str]:
    """The Dockerfile's variables, for a package in `site` and data in `data`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("LLM_WEEKS_TRACE", "LLM_WEEKS_API_KEY")}
    return kept | {
        "HOME": str(data),
        "LLM_WEEKS_DATA": str(data),
        "PYTHONPATH": str(site),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def port_of(server: subprocess.Popen) -> str:
    """The port that a starting server says it listens on."""
    output = ""
    while "running on" not in output:
        line = server.stderr.readline()
        assert line, output
        output += line
    return re.search(r"running on http://127\.0\.0\.1:(\d+)", output)[1]


def check_answers(port: str, environment: dict[str, str]) -> None:
    """The image's health check succeeds, and the workflow's question is answered to those with the key."""
    check = HEALTHCHECK[-1].replace("8000", port)
    subprocess.run([sys.executable, *HEALTHCHECK[1:-1], check], env=environment, check=True)
    question = json.loads(re.search(r"-d '(\{.*?\})'", "\n".join(SHELL))[1])
    url = f"http://127.0.0.1:{port}/v1/completions"
    answer = httpx.post(url, json=question, headers={"Authorization": "Bearer secret"}).json()
    assert answer["usage"]["completion_tokens"] == question["max_tokens"]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert httpx.post(url, json=question).status_code == 401


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the image is Linux's, and Windows has no SIGTERM")
def test_what_the_image_runs_answers_what_the_workflow_asks_and_ends_cleanly(tmp_path):
    """The Dockerfile's entry point and health check, its environment and its folders, with the workflow's
    model and question.
    """
    models, site, data = (tmp_path / name for name in ("models", "site", "data"))
    shutil.copytree(ROOT / "shared", site / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    models.mkdir()
    environment = environment_of_the_image(site, data)
    making = MAKES_A_MODEL.replace("/out/", f"{models}/")
    subprocess.run([sys.executable, "-"], input=making, text=True, env=environment, check=True)
    (models / "torch.py").write_text("raise SystemExit('a mounted file was imported')")
    (tmp_path / "key").write_text("secret\n")
    before = tree(models), tree(site)
    options = ["--model", "tiny", "--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    key = ["--api-key-file", str(tmp_path / "key")]
    with subprocess.Popen(
        [sys.executable, *ENTRYPOINT[1:], *options, *key],
        cwd=models,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            check_answers(port_of(server), environment)
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
    assert (tree(models), tree(site)) == before
