"""The numbers of the paper's experiment: calibration, statistics, and what is said of them."""

import math
import random

import pytest
import torch

from experiment_setup import made
from stability import calibrate, findings, statistics
from stability.arms import parse


def test_a_global_control_is_as_tight_as_its_component_cap():
    """Gradients are larger the less a run keeps, so that the first guess is off and has to be corrected."""
    asked = []

    def make(arms):
        found = {}
        for arm in arms:
            asked.append(arm.label)
            if arm.kind == "component":
                found[arm.label] = [
                    made(0.6, 0, kept=[0.1, 0.2, 0.3] if arm.cap < 1 else [1.0] * 3, total_norm=[2.0] * 3)
                ]
            else:
                norm = 4.0 - arm.cap
                found[arm.label] = [made(0.6, 0, kept=[min(1.0, arm.cap / norm)] * 3, total_norm=[norm] * 3)]
        return found

    arms = [parse(word) for word in ("none", "component:0.01", "matched:0.01", "matched:5")]
    settled, chosen = calibrate.choose(arms, 1e-3, make)
    assert [arm.label for arm in settled] == ["none", "component:0.01", "matched:0.01"]
    assert settled[2].kind == "global"
    cap = settled[2].cap
    assert cap / (4 - cap) == pytest.approx(0.2, rel=calibrate.CLOSE)
    assert chosen["matched:0.01"]["kept"] == pytest.approx(0.2, rel=calibrate.CLOSE)
    assert len(chosen["matched:0.01"]["tried"]) > 1
    assert chosen["matched:5"]["cap"] is None
    assert len(asked) == len(set(asked))


def test_the_stable_rate_is_the_one_with_fewest_failures_then_the_best_mean():
    scores = {3e-5: [0.5, 0.9], 2e-5: [0.6, 0.7], 1e-5: [0.6, 0.6]}

    def make(arms):
        return {arm.label: [made(score, i) for i, score in enumerate(scores[arm.lr])] for arm in arms}

    [arm], chosen = calibrate.choose([parse("stable")], 5e-5, make)
    assert (arm.kind, arm.lr, arm.label) == ("none", 2e-5, "stable")
    assert len(chosen["stable"]["tried"]) == 3


def test_summary_of_an_arm():
    one = statistics.summary([made(score, i) for i, score in enumerate([0.5, 0.55, 0.7, 0.75])])
    assert one["mean"] == pytest.approx(0.625)
    assert one["std"] == pytest.approx(0.1190, abs=1e-4)
    assert (one["min"], one["max"], one["failed"], one["failed_share"]) == (0.5, 0.75, 2, 0.5)
    assert (one["reached"], one["steps_to_target"]) == (2, 15)
    assert statistics.summary([made(0.5, 1)])["std"] is None


def test_wilson_intervals():
    assert statistics.wilson(0, 20) == pytest.approx([0, 0.1611], abs=1e-4)
    assert statistics.wilson(8, 20) == pytest.approx([0.2188, 0.6134], abs=1e-4)


def test_bootstrap_intervals_cover_and_are_paired():
    rng = random.Random(torch.initial_seed())
    base = [made(0.5 + 0.3 * rng.random(), i) for i in range(20)]
    shifted = [made(run["score"] + 0.1, run["seed"]) for run in base]
    found = statistics.difference(shifted, base)
    for key in ("difference", "low", "high"):  # the same for every seed: no doubt is left
        assert found["mean"][key] == pytest.approx(0.1)
        assert found["std"][key] == pytest.approx(0, abs=1e-9)
    assert statistics.difference(list(reversed(shifted))[:-4], base)["runs"] == 16
    assert statistics.difference(base[:1], base) is None
    assert statistics.difference(base, shifted) == statistics.difference(base, shifted)


def test_the_bootstrap_agrees_with_the_textbook_for_a_mean():
    torch.manual_seed(5)
    own, other = torch.randn(40).tolist(), torch.randn(40).tolist()
    pairs = [[made(score, i) for i, score in enumerate(side)] for side in (own, other)]
    found = statistics.difference(*pairs)["mean"]
    error = (torch.tensor(own) - torch.tensor(other)).std().item() / math.sqrt(40)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.06)


def sentences(component, seeds=20, none=None):
    runs = {
        "none": [made(0.5 if i % 2 else 0.7, i) for i in range(seeds)] if none is None else none,
        "component:0.01": [made(component(i), i) for i in range(seeds)],
    }
    return findings.gather([parse(word) for word in runs], runs)["sentences"]


def test_what_is_said_is_what_the_intervals_say():
    helped = sentences(lambda i: 0.7)[0]
    assert "fails less often (-0.500" in helped
    assert "scatters less" in helped
    assert "scores higher" in helped
    harmed = sentences(lambda i: 0.5)[0]
    assert "fails more often (+0.500" in harmed
    assert "scores lower" in harmed
    nothing = sentences(lambda i: 0.7 if i % 2 else 0.5)[0]
    assert "no difference is shown in how often runs fail (+0.000" in nothing
    assert "less often" not in nothing


def test_few_seeds_claim_nothing():
    said = sentences(lambda i: 0.7, seeds=4)
    assert "less" not in said[0]
    assert "under 10 seeds none is taken for a difference" in said[-1]


def test_a_report_without_control_or_without_failures_says_so():
    assert any("no global control" in sentence for sentence in sentences(lambda i: 0.7))
    good = [made(0.7, i) for i in range(20)]
    assert any("nothing here for clipping to mend" in sentence for sentence in sentences(lambda i: 0.7, none=good))


def test_each_component_cap_is_held_against_its_own_control():
    words = ["none", "component:0.01", "matched:0.01", "component:0.05", "matched:0.05"]
    runs = {word: [made(0.6 + 0.01 * n, i) for i in range(12)] for n, word in enumerate(words)}
    found = findings.gather([parse(word) for word in words], runs)
    assert {label: one["control"] for label, one in found["against_control"].items()} == {
        "component:0.01": "matched:0.01",
        "component:0.05": "matched:0.05",
    }
    assert found["baseline"] == "none"
