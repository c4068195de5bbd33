"""What the tests of the weeks share."""

import pytest

from shared import commandline
from shared.course import report
from tests.weeks.helpers import RHYME


@pytest.fixture
def error_lines(output, monkeypatch, capsys):
    """Starts a week's script from the command line, where it must fail; returns what stderr says."""

    def start(topic, *arguments):
        module = report.load_script(topic)
        monkeypatch.setattr("sys.argv", ["run.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            commandline.cli(module.main, module.PRESETS, module.__doc__)
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()

    return start


@pytest.fixture
def refuses(output, error_lines):
    """Starts a week's script: it must end in one line that has `words`, and log nothing."""

    def start(topic, arguments, words):
        last = error_lines(topic, "--preset", "smoke", *arguments)[-1]
        assert last.startswith("error: ") and words in last
        assert not (output / "logs" / topic).exists()

    return start


@pytest.fixture
def text_file(tmp_path):
    """A small text of its own, so that nothing is fetched."""
    path = tmp_path / "rhyme.txt"
    path.write_text(RHYME, encoding="utf-8")
    return str(path)
