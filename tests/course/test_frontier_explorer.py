"""Reward against KL: best policies and measures are those of PyTorch, and nothing is above the frontier."""

from itertools import product

import pytest
import torch
from torch import Tensor

from shared.alignment.logprobs import sequence_logprobs
from shared.course.explorers.frontier import likely_answers
from tests.course.explored import ENDS, GUESSES, brief, digits, frontier, guessers
from tests.course.test_explorers import status

BETAS = (0.03, 0.3, 1.0, 8.0)
PROMPT = GUESSES.encode("1+2>")


def worlds() -> list[tuple[Tensor, list[Tensor]]]:
    """Of each prompt: the policies' log-probabilities, brought to sum 1, and the rewards; from the models."""
    found = []
    for prompt in ("1+2>", "0>", "3+3>"):
        ids = GUESSES.encode(prompt)
        answers, logprobs = likely_answers(list(guessers().values()), ids, end=ENDS, longest=3, least=0.01)
        rows = torch.full((len(answers), len(ids) + 3), ENDS)
        mask = torch.zeros_like(rows, dtype=torch.bool)
        for i, answer in enumerate(answers):
            rows[i, : len(ids) + len(answer)] = torch.tensor([*ids, *answer])
            mask[i, len(ids) : len(ids) + len(answer)] = True
        rewards = [judge(rows, mask).double() for judge in (digits, brief)]
        found.append((logprobs.log_softmax(-1), rewards))
    return found


def measured(policy: Tensor, reference: Tensor, rewards: list[Tensor]) -> tuple[float, list[float]]:
    p = torch.distributions.Categorical(logits=policy)
    kl = torch.distributions.kl_divergence(p, torch.distributions.Categorical(logits=reference))
    return kl.item(), [(p.probs * reward).sum().item() for reward in rewards]


def test_all_likely_answers_are_found_each_with_its_probability():
    models = list(guessers().values())
    answers, logprobs = likely_answers(models, PROMPT, end=ENDS, longest=3, least=0.01)
    every = [
        list(tokens)
        for length in (1, 2, 3)
        for tokens in product(range(GUESSES.vocab_size), repeat=length)
        if ENDS not in tokens[:-1] and (tokens[-1] == ENDS or length == 3)
    ]
    expected = {}
    for answer in every:
        ids = torch.tensor([[*PROMPT, *answer]])
        mask = torch.arange(ids.size(1))[None] >= len(PROMPT)
        each = torch.stack([sequence_logprobs(model(ids), ids, mask)[0] for model in models]).double()
        if each.exp().max() >= 0.01:
            expected[tuple(answer)] = each
    assert {tuple(answer) for answer in answers} == set(expected)
    for answer, row in zip(answers, logprobs.T, strict=True):
        assert torch.allclose(row, expected[tuple(answer)], atol=1e-5)
    assert logprobs[0].tolist() == sorted(logprobs[0].tolist(), reverse=True)


@pytest.mark.slow
def test_best_policies_and_measures_are_those_of_pytorch(visit):
    script = """([beta, which]) => {
        const { prompts } = JSON.parse(document.getElementById("data").textContent);
        return prompts.map((entry) => {
            const world = new World(entry);
            const best = world.best(beta, which);
            const each = world.policies.map((policy) => world.measures(policy));
            return { best, at: world.measures(best), each };
        });
    }"""
    seen = visit(frontier())
    for beta, which in product(BETAS, (0, 1)):
        for shown, (policies, rewards) in zip(
            seen.frame.evaluate(script, [beta, which]), worlds(), strict=True
        ):
            best = (policies[0] + rewards[which] / beta).log_softmax(-1)
            assert torch.allclose(torch.tensor(shown["best"], dtype=torch.float64), best, atol=1e-3)
            for at, policy in zip([shown["at"], *shown["each"]], [best, *policies], strict=True):
                kl, earned = measured(policy, policies[0], rewards)
                assert at["kl"] == pytest.approx(kl, abs=1e-3)
                assert at["rewards"] == pytest.approx(earned, abs=1e-3)


@pytest.mark.slow
def test_along_the_frontier_reward_rises_by_beta_for_each_nat_and_no_policy_is_above_it(visit):
    seen = visit(frontier())
    script = """([beta, which]) => {
        const { prompts } = JSON.parse(document.getElementById("data").textContent);
        const worlds = prompts.map((entry) => new World(entry));
        const at = (price) => meanOf(worlds, (world) => world.best(price, which));
        const each = worlds[0].policies.map((_, i) => meanOf(worlds, (world) => world.policies[i]));
        return { now: at(beta), more: at(beta * 1.001), each, again: betaFor(worlds, which, at(beta).kl) };
    }"""
    for beta, which in product(BETAS, (0, 1)):
        found = seen.frame.evaluate(script, [beta, which])
        now, more = found["now"], found["more"]
        if now["kl"] - more["kl"] > 1e-7:
            slope = (now["rewards"][which] - more["rewards"][which]) / (now["kl"] - more["kl"])
            assert slope == pytest.approx(beta, rel=2e-3)
            assert found["again"] == pytest.approx(beta, rel=1e-3)
        objective = now["rewards"][which] - beta * now["kl"]
        assert all(one["rewards"][which] - beta * one["kl"] <= objective + 1e-9 for one in found["each"])


@pytest.mark.slow
def test_the_slider_moves_what_is_said_and_the_bars(visit):
    seen = visit(frontier())
    seen.frame.locator("[aria-label=Prompt]").locator("[tabindex='0']").focus()
    seen.page.keyboard.press("Home")
    policies, rewards = worlds()[0]
    answers = frontier().data["prompts"][0]["answers"]
    for exponent in ("-1", "0", "1"):
        seen.frame.locator("#beta").fill(exponent)
        best = (policies[0] + rewards[0] / 10 ** float(exponent)).log_softmax(-1)
        kl, earned = measured(best, policies[0], rewards)
        words = status(seen)
        assert f"KL {kl:.2f} nats" in words and f"mean reward {earned[0]:.2f} by digits" in words
        rows = seen.frame.locator(".bars .row").all()
        assert len(rows) == min(12, len(answers))
        for row in rows:
            token = row.locator(".token").text_content().replace("⏎", "\n")
            share = row.locator(".share").first.text_content()
            expected = 100 * best.exp()[answers.index(token)].item()
            assert float(share.replace("<", "").replace(">", "").split()[0]) == pytest.approx(
                expected, abs=0.51
            )


@pytest.mark.slow
def test_keys_choose_the_reward_and_a_policy(visit):
    seen = visit(frontier())
    seen.frame.locator("[aria-label='Reward that is climbed'] [tabindex='0']").focus()
    seen.page.keyboard.press("ArrowRight")
    assert "by brief" in status(seen).split(",")[1]
    seen.frame.locator("[aria-label='Policy whose answers are shown'] [tabindex='0']").focus()
    seen.page.keyboard.press("ArrowRight")
    kls = [measured(policies[1], policies[0], rewards)[0] for policies, rewards in worlds()]
    assert status(seen).startswith(f"trained: KL {sum(kls) / len(kls):.2f} nats")
    seen.frame.locator("#beta").press("ArrowRight")
    assert status(seen).startswith("The best policy for β = ")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"policies": {}}, "0 policies, 3 prompts"),
        ({"prompts": []}, "3 policies, 0 prompts"),
        ({"rewards": {}}, "0 rewards"),
        ({"least": 0.0}, "least=0.0"),
        ({"longest": 0}, "longest=0"),
        ({"least": 0.99}, "take a smaller least"),
        ({"rewards": {"bad": lambda ids, mask: torch.full((len(ids),), float("inf"))}}, "not finite"),
        ({"rewards": {"bad": lambda ids, mask: mask.float()}}, "a number for each answer"),
    ],
    ids=["policies", "prompts", "rewards", "least", "longest", "too-few", "infinite", "shape"],
)
def test_what_has_no_frontier_is_refused(changed, says):
    with pytest.raises(ValueError, match=says):
        frontier(**changed)
