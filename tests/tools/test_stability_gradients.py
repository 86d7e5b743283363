"""Where in a model the experiment says that failed runs differ, and what it says that caps hold back."""

import pytest

from experiment_setup import made
from stability import gradients, report

NAMES = [
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.0.output.dense.weight",
    "bert.encoder.layer.1.output.dense.weight",
    "bert.encoder.relative_attention_bias.weight",
    "bert.pooler.dense.bias",
    "classifier.bias",
]


def runs_with(norms, **more):
    """Of three looked-at steps each, whose norms of NAMES are the same number times 1, 10 and 100."""
    rows = [[norm * scale for norm in norms] for scale in (1.0, 10.0, 100.0)]
    return made(more.pop("score", 0.7), 0, components=NAMES, norms=rows, norm_steps=[1, 2, 3], **more)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert.encoder.layer.11.attention.self.query.weight", (11, "attention.self.query.weight")),
        ("transformer.h.0.blocks.2.bias", (2, "bias")),
        ("classifier.out_proj.weight", (None, "classifier.out_proj.weight")),
    ],
)
def test_a_component_has_a_layer_and_a_name_in_it(name, expected):
    assert gradients.place(name) == expected


def test_every_component_is_in_one_part_of_the_depth():
    parts = gradients.by_depth(NAMES)
    assert parts == {"embeddings": [0], "layer 0": [1], "layer 1": [2], "head": [4, 5], "others": [3]}
    assert gradients.by_type(NAMES) == {"output.dense.weight": [1, 2]}
    layers = [f"h.{layer}.weight" for layer in range(12)]
    assert list(gradients.by_depth(layers)) == [f"layer {layer}" for layer in range(12)]  # not 0, 1, 10, 11, 2


def test_failed_and_good_runs_are_told_apart_in_the_first_and_the_last_third():
    good = [runs_with([1, 3, 4, 5, 6, 8]), runs_with([1, 3, 4, 5, 6, 8])]
    failed = [runs_with([0.1, 0.3, 0.4, 5, 6, 8], score=0.5)]
    rows = gradients.compare([*good, *failed], {})
    depth = {row["part"]: row for row in rows["depth"]}
    assert depth["layer 1"]["early"] == {"failed": pytest.approx(0.4), "good": pytest.approx(4)}
    assert depth["layer 1"]["late"] == {"failed": pytest.approx(40), "good": pytest.approx(400)}
    assert depth["head"]["early"] == {"failed": pytest.approx(10), "good": pytest.approx(10)}  # of 6 and 8 together
    (kind,) = rows["type"]
    assert kind["early"]["good"] == pytest.approx(5)
    assert gradients.compare(good, {})["depth"][0]["early"]["failed"] is None


def test_what_a_cap_keeps_is_of_the_median_step_and_norms_that_are_not_finite_count():
    run = runs_with([1, 3, 4, 5, 6, 0], cap=10.0)
    rows = {row["part"]: row for row in gradients.compare([run], {"component:10": [run]})["depth"]}
    assert rows["embeddings"]["kept"] == {"component:10": pytest.approx(1.0)}
    assert rows["layer 1"]["kept"] == {"component:10": pytest.approx(10 / 40)}
    for row in run["norms"]:
        row[0] = None
    rows = {row["part"]: row for row in gradients.compare([run], {"component:10": [run]})["depth"]}
    assert rows["embeddings"]["kept"]["component:10"] < 1e-90


def test_the_report_has_a_row_for_each_part():
    run = runs_with([1, 3, 4, 5, 6, 8], cap=10.0)
    compared = gradients.compare([run], {"component:10": [run]})
    _, depth, kinds, legend = report._gradients({"baseline": "none", "gradients": compared})
    assert "| layer 1 | 1 | - | 4 | - | 4e+02 | 0.25 |" in depth.splitlines()
    assert "kept by component:10" in kinds
    assert "`none`" in legend
