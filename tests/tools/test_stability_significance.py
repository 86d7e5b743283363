"""The tests of the paper's experiment: p-values against textbooks and enumeration, power against simulation."""

import itertools
import random

import numpy as np
import pytest
import torch

from experiment_setup import made
from stability import findings, significance, statistics
from stability.arms import parse


# McNemar's exact test is a sign test: 0 of 6 is 2 / 2^6, 3 of 11 is in tables of the sign test.
@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(0, 0, 1), (4, 4, 1), (0, 6, 2 / 64), (6, 0, 2 / 64), (3, 8, 0.2265625), (1, 9, 22 / 1024)],
)
def test_mcnemar(first, second, p):
    assert significance.mcnemar(first, second) == pytest.approx(p)


def test_sign_flips_are_those_of_all_signs():
    rng = np.random.default_rng(torch.initial_seed())
    differences = rng.normal(0.4, 1.0, 9)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=9)]
    exact = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)
    assert significance.sign_flip(differences) == pytest.approx(exact, abs=0.01)
    assert significance.sign_flip(np.zeros(9)) == 1
    assert significance.sign_flip(np.ones(20)) < 1e-4


def test_holm():
    # From Holm's procedure by hand: 4 * .01, 3 * .02, then never less than before.
    assert significance.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []


def test_power_is_how_often_a_difference_is_found():
    rng = np.random.default_rng(torch.initial_seed())
    first, second, seeds = 0.35, 0.05, 30
    drawn = rng.multinomial(seeds, [first, second, 1 - first - second], size=4000)
    found = np.mean([significance.mcnemar(int(a), int(b)) <= 0.05 for a, b, _ in drawn])
    assert significance.mcnemar_power(seeds, first, second, 0.05) == pytest.approx(found, abs=0.04)


def test_what_could_have_been_found():
    row = {"of": "failures", "seeds": 40}
    share = significance.detectable(row, 0.0125)
    other = significance.OTHERS
    assert significance.mcnemar_power(40, share + other, other, 0.0125) >= 0.8
    assert significance.mcnemar_power(40, share + other - 0.01, other, 0.0125) < 0.8
    assert significance.detectable({"of": "failures", "seeds": 4}, 0.0125) is None
    # (1.96 + 0.84) * 0.1 / sqrt(100)
    assert significance.detectable({"of": "scores", "seeds": 100, "std": 0.1}, 0.05) == pytest.approx(0.028, abs=1e-4)


def experiment(component, matched, seeds=40):
    words = ["none", "component:0.01", "matched:0.01"]
    sides = (lambda i: 0.7, component, matched)
    runs = {word: [made(side(i), i) for i in range(seeds)] for word, side in zip(words, sides, strict=True)}
    return findings.gather([parse(word) for word in words], runs)


def test_each_pair_of_arms_is_tested_twice():
    found = experiment(lambda i: 0.7, lambda i: 0.5 if i < 12 else 0.7)
    failures, scores = found["tests"]
    assert failures["alone"] == [0, 12]
    assert failures["p"] == pytest.approx(2 / 2**12)
    assert failures["holm"] <= 2 * failures["p"] + 1e-12
    assert scores["mean"] == pytest.approx(0.06)
    said = [sentence for sentence in found["sentences"] if sentence.startswith("Test")]
    assert all(": differs from chance" in sentence for sentence in said)
    assert "0 seeds failed under `component:0.01` alone and 12 under `matched:0.01` alone" in said[0]


def test_arms_that_do_the_same_do_not_differ():
    rng = random.Random(torch.initial_seed())
    score = [rng.choice([0.5, 0.7]) for _ in range(40)]
    found = experiment(lambda i: score[i], lambda i: score[39 - i])
    assert all(0 < row["p"] <= row["holm"] <= 1 for row in found["tests"])
    assert found["tests"][0]["alone"][0] == found["tests"][0]["alone"][1]
    said = [sentence for sentence in found["sentences"] if sentence.startswith("Test")]
    assert len(said) == 2
    assert all("doesn't differ from chance" in sentence for sentence in said)


def test_steps_and_good_runs_are_compared_too():
    own = [made(0.7, i, steps_to_target=30, kept=[1.0] * 90) for i in range(10)]
    other = [made(0.5 if i < 3 else 0.65, i, steps_to_target=None, kept=[1.0] * 90) for i in range(10)]
    found = statistics.difference(own, other)
    assert found["steps"]["difference"] == -60
    assert found["mean_of_good"]["difference"] == pytest.approx(0.05)
    assert found["mean_of_good"]["low"] == pytest.approx(0.05)
    assert statistics.summary(other)["mean_of_good"] == pytest.approx(0.65)
    nobody = statistics.difference([made(0.5, i) for i in range(10)], other)
    assert "mean_of_good" not in nobody
