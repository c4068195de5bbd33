"""Week 10's script: what it refuses, and how it goes on after an interruption."""

import shutil
import sys
from dataclasses import replace
from shutil import copytree, rmtree

import pytest

from shared.alignment.countdown import Countdown
from shared.course import report
from tests.weeks.helpers import DATA, script

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("base_model", "unrendered_plots")]


@pytest.fixture(scope="module")
def whole_run(trained_on_the_rhyme, tmp_path_factory):
    """The folder of what the week left, and its metrics."""
    folder = copytree(trained_on_the_rhyme, tmp_path_factory.mktemp("whole") / "output")
    module, settings = script("10_ppo_dpo", data=str(trained_on_the_rhyme / "rhyme.txt"), study="exclaim")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_WEEKS_OUTPUT", str(folder))
        return folder, module.main(settings)


@pytest.mark.parametrize("method", ["ppo", "grpo", "dpo"])
def test_week_10_goes_on_where_it_was_interrupted(method, output, text_file, whole_run, monkeypatch):
    module, settings = script("10_ppo_dpo", data=text_file, study="exclaim")
    folder, whole = whole_run
    copytree(folder, output, dirs_exist_ok=True)
    policies = sys.modules["weeks.10_ppo_dpo.policies"]  # where the methods' runs look it up
    study = sys.modules["weeks.10_ppo_dpo.exclaim"]
    measure, seen = policies.measure_policy, []

    def interrupted(policy, start, settings, log=None):
        seen.append(log)
        if (
            len(seen) == 1 + 3 * ["ppo", "grpo", "dpo"].index(method) + 2
        ):  # the base, three of each method before, this one's second
            raise KeyboardInterrupt
        return measure(policy, start, settings, log)

    monkeypatch.setattr(study, "measure_policy", interrupted)
    monkeypatch.setattr(policies, "measure_policy", interrupted)
    rmtree(output / "checkpoints" / "10_ppo_dpo")
    with pytest.raises(KeyboardInterrupt):
        module.main(settings)
    logs = output / "logs" / "10_ppo_dpo" / "mine" / "smoke" / DATA
    assert report.read_runs(logs)[method].run["state"] == "interrupted"
    monkeypatch.setattr(study, "measure_policy", measure)
    monkeypatch.setattr(policies, "measure_policy", measure)
    assert module.main(replace(settings, resume=True)) == whole


def test_week_10_without_preferences_says_so(output, text_file):
    module, settings = script("10_ppo_dpo", data=text_file, min_words=99, study="exclaim")
    with pytest.raises(ValueError, match="answers that score alike, so there is no preference to learn from"):
        module.main(settings)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(rows=9), "rows=9: must be even"),
        (dict(mark="ab"), "mark='ab'"),
        (dict(answers=1), "answers=1: must be at least 2"),
        (dict(dpo_betas=(0.0,)), "dpo_betas: betas must be above 0"),
        (dict(countdown=dict(rows=12)), "rows=12: must be a multiple of expert's 8"),
        (dict(countdown=dict(problems=Countdown(sizes=(4,)))), "base.block_size: a problem with its answer"),
        (dict(countdown=dict(samples=4)), "samples=4: must be at least 8"),
    ],
)
def test_week_10_refuses_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        _, settings = script("10_ppo_dpo")
        if "countdown" in changes:
            changes = dict(countdown=replace(settings.countdown, **changes["countdown"]))
        replace(settings, **changes)


def test_week_10s_study_trains_a_reward_model_anew_where_it_is_to_be_another(output, text_file, capsys):
    """The week's is taken where nothing else is asked for; a setting of its training is never ignored."""
    module, settings = script("10_ppo_dpo", data=text_file)
    settings = replace(settings, study="hacking")
    said = []
    for reward in (settings.reward, settings.reward, replace(settings.reward, steps=2)):
        module.main(replace(settings, reward=reward))
        said.append(capsys.readouterr().out)
    assert ["reward model: right on" in out for out in said] == [True, False, True]
    assert "was not trained for {'steps': 2}: it is trained anew" in said[2]


def finished(logs):
    """The summaries of countdown's runs by name, without what the clock says."""
    return {
        name: {key: value for key, value in run.summary.items() if "seconds" not in key}
        for name, run in report.read_runs(logs).items()
        if name.startswith("countdown-")
    }


def test_countdown_goes_on_where_it_was_interrupted_and_does_nothing_twice(output, text_file, monkeypatch):
    """In the base, in a control and in a method; runs that were at their end are not made again."""
    module, settings = script("10_ppo_dpo", data=text_file)
    logs = output / "logs" / "10_ppo_dpo" / "mine" / "smoke" / DATA
    whole = module.main(settings)
    expected = finished(logs)
    shutil.rmtree(output / "logs")
    shutil.rmtree(output / "checkpoints")
    solving = sys.modules["weeks.10_ppo_dpo.solving"]
    measure = solving.measure_solving
    seen = []

    def interrupted(*arguments):
        seen.append(arguments)
        if len(seen) in (1, 3, 6):
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(solving, "measure_solving", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            module.main(replace(settings, resume=True))
    again = module.main(replace(settings, resume=True))
    assert again.pop("cpu_seconds") > 0 < whole.pop("cpu_seconds")
    assert again == whole and finished(logs) == expected
    assert len(seen) == 3 + 4  # each of the four runs was measured to its end once


def test_the_same_seed_gives_the_same_run_in_the_week_and_in_the_study(output, text_file):
    module, settings = script("10_ppo_dpo", data=text_file)
    logs = output / "logs" / "10_ppo_dpo" / "mine" / "smoke" / DATA
    module.main(settings)
    week = finished(logs)
    module.main(replace(settings, study="methods"))
    study = finished(logs)
    assert week and all(study[name] == summary for name, summary in week.items())
    of_grpo = [study[f"countdown-grpo-{seed}"]["pass_at_8"] for seed in settings.countdown.seeds]
    mean = study["countdown-grpo"]
    assert mean["pass_at_8"] == pytest.approx(sum(of_grpo) / 2) and mean["seeds"] == 2
    assert [mean["pass_at_8_low"], mean["pass_at_8_high"]] == [min(of_grpo), max(of_grpo)]
