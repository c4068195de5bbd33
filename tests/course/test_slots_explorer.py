"""The slots' explorer: it shows what the engine does, and every request has the text that it has alone."""

import re
from types import SimpleNamespace

import pytest

from shared.course.explorers import slots_explorer
from shared.sampling import generate
from tests.course.explored import ARRIVALS, LENGTHS, LETTERS, PROMPTS, SLOTS, engines, requests, slots, writer
from tests.course.test_explorers import status

NUMBERS = range(len(ARRIVALS))


@pytest.fixture
def shown(visit):
    """Each timeline of the page, and what the page makes of it."""
    return visit(slots()).frame.evaluate(
        """() => {
            const data = JSON.parse(document.getElementById("data").textContent);
            const arrivals = data.requests.map((request) => request.arrival);
            return data.timelines.map((recorded) => {
                const timeline = new Timeline(recorded, arrivals);
                const numbers = arrivals.map((_, i) => i);
                const steps = recorded.milliseconds.map((_, step) => step);
                return {
                    ...recorded,
                    states: steps.map((step) => numbers.map((i) => timeline.state(i, step))),
                    written: steps.map((step) => numbers.map((i) => timeline.written(i, step))),
                    measures: numbers.map((i) => timeline.measures(i)),
                    all: timeline.ofAll(),
                };
            });
        }"""
    )


def test_every_request_has_the_text_that_the_model_writes_for_it_alone():
    model = writer()
    for request, entry in zip(requests(), slots().data["requests"], strict=True):
        alone = generate(model, request.prompt, request.max_new_tokens, temperature=0)
        assert "".join(entry["text"]) == LETTERS.decode(list(alone))


def test_with_continuous_batching_each_step_does_what_an_engine_stepped_by_hand_does():
    for timeline in slots().data["timelines"][::2]:
        engine, running = engines()(slots=timeline["slots"]), []
        for step in range(len(timeline["milliseconds"])):
            while len(running) < len(ARRIVALS) and ARRIVALS[len(running)] <= step:
                running.append(engine.submit(requests()[len(running)]))
            engine.step()
            for one, course in zip(running, timeline["courses"]):
                assert one.read == sum(n for at, n in course["reads"] if at <= step)
                assert one.drawn == sum(n for at, n in course["draws"] if at <= step)
                assert (one.slot is None) == (course["begin"] > step) and one.slot in (None, course["slot"])
        assert all(one.finish_reason == "length" for one in running)
        engine.close()


def last(course: dict) -> int:
    return course["draws"][-1][0]


def test_nobody_shares_a_slot_and_nobody_waits_beside_a_free_one_but_for_the_batch_to_end():
    for timeline in slots().data["timelines"]:
        courses = timeline["courses"]
        assert [sum(n for _, n in course["reads"]) for course in courses] == PROMPTS
        assert [sum(n for _, n in course["draws"]) for course in courses] == LENGTHS
        for step in range(len(timeline["milliseconds"])):
            busy = [course["slot"] for course in courses if course["begin"] <= step <= last(course)]
            waiting = [i for i in NUMBERS if ARRIVALS[i] <= step < courses[i]["begin"]]
            assert len(set(busy)) == len(busy) <= timeline["slots"]
            assert timeline["whole"] or not waiting or len(busy) == timeline["slots"]
            begun = [i for i in NUMBERS if courses[i]["begin"] == step]
            if timeline["whole"] and begun:
                assert all(last(courses[i]) < step for i in range(begun[0]))
                assert len(begun) == timeline["slots"] or not waiting


@pytest.mark.slow
def test_the_times_of_a_request_are_sums_of_steps(shown):
    for timeline in shown:
        times = timeline["milliseconds"]
        for i, (course, measured) in enumerate(zip(timeline["courses"], timeline["measures"])):
            ends = {"wait": course["begin"], "first": course["draws"][0][0] + 1, "done": last(course) + 1}
            for name, end in ends.items():
                assert measured[name]["steps"] == end - ARRIVALS[i]
                assert measured[name]["milliseconds"] == pytest.approx(sum(times[ARRIVALS[i] : end]))
            assert measured["tokens"] == LENGTHS[i]
            assert measured["rate"] == pytest.approx(
                1000 * LENGTHS[i] / sum(times[ARRIVALS[i] : last(course) + 1])
            )
        every = timeline["all"]
        assert every["all"] == {"steps": len(times), "milliseconds": pytest.approx(sum(times))}
        waits = [course["begin"] - arrival for course, arrival in zip(timeline["courses"], ARRIVALS)]
        assert every["wait"]["steps"] == pytest.approx(sum(waits) / len(waits))
        firsts = [
            course["draws"][0][0] + 1 - arrival for course, arrival in zip(timeline["courses"], ARRIVALS)
        ]
        assert every["first"]["steps"] == max(firsts)
        assert every["perStep"] == pytest.approx(sum(LENGTHS) / len(times))
        assert every["rate"] == pytest.approx(1000 * sum(LENGTHS) / sum(times))


@pytest.mark.slow
def test_the_states_follow_each_other(shown):
    for timeline in shown:
        for i in NUMBERS:
            states = [of_all[i] for of_all in timeline["states"]]
            inside = r"(not there yet,)*(waits,)*((waits in its slot|reads|writes),)+(done,)*"
            assert re.fullmatch(inside, ",".join(states) + ",")
            assert states.count("not there yet") == ARRIVALS[i]
            assert states.count("reads") == len(timeline["courses"][i]["reads"])
            assert timeline["written"][-1][i] == LENGTHS[i]


def test_a_steps_time_is_the_shortest_of_the_runs():
    first = slots().data["timelines"][0]["milliseconds"]
    assert first == [pytest.approx((4 * step + 1) / 1000, rel=1e-3) for step in range(len(first))]


@pytest.mark.slow
def test_keys_choose_slots_requests_and_steps(visit):
    seen = visit(slots())
    seen.frame.locator("[aria-label='Number of slots'] [tabindex='0']").focus()
    seen.page.keyboard.press("Home")
    data = slots().data
    seen.frame.locator("[aria-label=Request] [tabindex='0']").focus()
    seen.page.keyboard.press("Home")
    seen.page.keyboard.press("ArrowRight")
    seen.frame.locator("#step").focus()
    seen.page.keyboard.press("Home")
    text = data["requests"][1]["text"]
    steps = [len(timeline["milliseconds"]) for timeline in data["timelines"][:2]]
    for step in range(max(steps)):
        said = status(seen)
        assert said.startswith(f"Step {step + 1}, request B: ")
        for timeline, place in zip(data["timelines"][:2], seen.frame.locator("pre").all(), strict=True):
            written = sum(n for at, n in timeline["courses"][1]["draws"] if at <= step)
            assert f"({written} of 12 tokens)" in said
            assert place.text_content() == ("".join(text[:written]) or "(nothing yet)")
        seen.page.keyboard.press("ArrowRight")
    assert max(steps) > min(steps) and "All are done." in seen.frame.locator(".now").first.text_content()


@pytest.mark.slow
def test_a_click_on_a_timeline_chooses_the_step_and_the_request_in_that_slot(visit):
    seen = visit(slots())
    courses = slots().data["timelines"][2]["courses"]
    at, top, left, cell = seen.frame.evaluate(
        """(() => { const canvas = document.querySelectorAll("canvas")[0], { timelines } = JSON.parse(
            document.getElementById("data").textContent), shown = timelines.slice(2, 4);
          const longest = Math.max(...shown.map((t) => t.milliseconds.length));
          const queue = canvas.clientHeight - 20 - COST - SLOT * shown[0].slots;
          return [longest, queue, 62, (canvas.clientWidth - 63) / longest]; })()"""
    )
    number = 4
    step = courses[number]["reads"][0][0]
    position = {"x": left + (step + 0.5) * cell, "y": top + 24 * (courses[number]["slot"] + 0.5)}
    seen.frame.locator("canvas").first.click(position=position)
    assert status(seen).startswith(f"Step {step + 1}, request E: with continuous batching it reads")
    assert at == int(seen.frame.locator("#step").get_attribute("max"))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"arrivals": [0, 1]}, "6 requests and 2 arrivals"),
        ({"arrivals": [0, 0, 2, 1, 3, 4]}, "come in order"),
        ({"slots": ()}, "at least one number of slots"),
        ({"runs": 0}, "at least one number of slots and one run"),
        ({"requests": requests(max_new_tokens=0)}, "at least one token"),
        ({"requests": requests(temperature=1.0)}, "give each temperature 0, or a seed"),
    ],
    ids=["arrivals", "order", "no-slots", "no-runs", "no-tokens", "no-seed"],
)
def test_what_cannot_be_recorded_is_refused(changed, says):
    given = {"requests": requests(), "arrivals": ARRIVALS, "slots": SLOTS, "runs": 2} | changed
    with pytest.raises(ValueError, match=says):
        slots_explorer(engines(), given.pop("requests"), given.pop("arrivals"), LETTERS, **given)


def test_an_engine_that_does_nothing_is_refused():
    running = SimpleNamespace(finish_reason=None, slot=None, read=0, drawn=0)
    idle = SimpleNamespace(submit=lambda request, listen: running, step=lambda: False)
    with pytest.raises(ValueError, match="does nothing"):
        slots_explorer(lambda slots: idle, requests(), ARRIVALS, LETTERS)
