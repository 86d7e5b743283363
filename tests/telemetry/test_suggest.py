"""Suggested caps: the rate that they lead to, patterns that match, what is said of the run, the command."""

import json
import math
import random
import re
import sys

import pytest
import torch

from cwclip_kernels import ComponentClipper, ComponentSpec
from cwclip_kernels.__main__ import main
from cwclip_kernels.components.grouping import type_of
from cwclip_kernels.components.patterns import match_patterns
from cwclip_kernels.result import ClipStatistics
from cwclip_kernels.telemetry import ClipRecorder, Run, plot_suggestion, suggest
from helpers import DEVICE, parameter

# The pattern of the first also matches the second and third.
NAMES = tuple(f"h.{i}.{kind}" for i in range(3) for kind in ("weight", "attn.weight", "mlp.0.weight")) + (
    "head.bias",
)


def run_of(norms, names=None, steps=None, coefs=None):
    norms = torch.as_tensor(norms, dtype=torch.float64)
    names = tuple(f"h.{i}.w" for i in range(norms.shape[1])) if names is None else names
    coefs = torch.ones_like(norms) if coefs is None else coefs
    return Run(names, list(range(len(norms))) if steps is None else steps, norms, torch.full_like(norms, 1.0), coefs)


def lognormal(steps, names=NAMES):
    """Norms, each type with a scale of its own; a tenth of them without a gradient."""
    scales = torch.tensor([float(len(type_of(name))) for name in names])
    norms = torch.randn(steps, len(names)).exp() * scales
    return norms.where(torch.rand(norms.shape) > 0.1, 0.0)


def replay(norms, max_norm, components=None, names=NAMES, recorder=None):
    """Statistics of a clipper that gets gradients of these norms."""
    params = {name: parameter(torch.zeros(1, device=DEVICE)) for name in names}
    clipper = ComponentClipper(params.items(), max_norm, components=components)
    statistics = ClipStatistics()
    for row in norms.tolist():
        for p, norm in zip(params.values(), row, strict=True):
            p.grad = torch.full((1,), -norm, device=DEVICE)
        result = clipper.clip_()
        statistics.add(result)
        if recorder is not None:
            recorder.record(result)
    return clipper, statistics


@pytest.mark.parametrize("by", ["type", "component"])
@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_the_mapping_clips_at_the_wanted_rate(tmp_path, by, rate):
    norms = lognormal(300)
    with ClipRecorder(tmp_path / "run") as recorder:
        replay(norms, math.inf, recorder=recorder)
    suggestion = suggest(tmp_path / "run.jsonl", rate, by=by)
    clipper, statistics = replay(norms, suggestion.max_norm)
    found = dict(zip(clipper.names, statistics.clip_rates.tolist(), strict=True))
    assert statistics.clip_rate.item() == pytest.approx(suggestion.clip_rate)
    counts = dict(zip(NAMES, (norms != 0).sum(0).tolist(), strict=True))
    for cap in suggestion.caps:
        counted = sum(counts[name] for name in cap.components)
        assert cap.counted == counted
        clipped = sum(found[name] * counts[name] for name in cap.components)
        assert cap.rate == pytest.approx(clipped / counted)
        # Two digits change a cap by up to 10 %: the wanted rate is that of a cap within that.
        own = norms[:, [NAMES.index(name) for name in cap.components]]
        lower, higher = ((own > change * cap.cap).sum().item() / counted for change in (1.11, 0.9))
        assert lower - 1.5 / counted <= rate <= higher + 1.5 / counted
    assert len(suggestion.caps) == (4 if by == "type" else len(NAMES))
    assert sorted(name for cap in suggestion.caps for name in cap.components) == sorted(NAMES)


def test_types_and_caps_are_the_librarys():
    """A clipper of components="type" has the components that caps are for; a cap is the quantile, rounded."""
    norms = lognormal(200)
    suggestion = suggest(run_of(norms, NAMES), 0.1)
    params = [(name, parameter(torch.zeros(1, device=DEVICE))) for name in NAMES]
    assert tuple(cap.name for cap in suggestion.caps) == ComponentClipper(params, 1.0, components="type").names
    for cap in suggestion.caps:
        own = norms[:, [NAMES.index(name) for name in cap.components]].double()
        own = own[own != 0]
        assert cap.cap == float(f"{cap.cap:.1e}")
        assert cap.cap == pytest.approx(own.quantile(0.9).item(), rel=0.11)
        assert cap.largest == own.max()
        assert cap.median == pytest.approx(own.quantile(0.5).item())
        assert cap.percentile_99 == pytest.approx(own.quantile(0.99).item())


@pytest.mark.parametrize("exact", [1.0, 0.0994, 99.6, 3e-5, 1.04e6])
def test_the_rate_is_that_of_the_rounded_cap(exact):
    norms = torch.full((100, 1), exact)
    norms[0] = 1.5 * exact
    suggestion = suggest(run_of(norms), 0.01)
    (cap,) = suggestion.caps
    assert cap.rate == suggestion.clip_rate == 0.01  # and not 1, as for a cap rounded down
    assert exact < cap.cap == float(f"{cap.cap:.1e}") <= 1.2 * exact
    assert len(f"{cap.cap:e}".partition("e")[0].rstrip("0")) <= 3


def random_names():
    parts = random.Random(torch.initial_seed()).choices
    for _ in range(40):
        names = {".".join(parts(("a", "h", "0", "1", "22", "w"), k=1 + i % 5)) for i in range(25)}
        yield tuple(names | {f"{name}[{slice_}]" for name in sorted(names)[:8] for slice_ in ("0", "1", "q")})


@pytest.mark.parametrize("by", ["type", "component"])
def test_the_first_pattern_that_matches_a_component_is_its_own(by):
    for names in random_names():
        norms = torch.arange(1.0, len(names) + 1).repeat(2, 1)
        suggestion = suggest(run_of(norms, names), 0.5, by=by)
        # Each its own number, so that another's would show.
        numbered = {pattern: float(i) for i, pattern in enumerate(suggestion.max_norm)}
        assert set(numbered) == {cap.name for cap in suggestion.caps}
        found = match_patterns(names, numbered)
        for cap in suggestion.caps:
            for name in cap.components:
                assert found[name] == numbered[cap.name]


def test_slices_that_are_numbered_share_a_type():
    spec = ComponentSpec("parameter").split("*.qkv", sizes=(1, 1), names=("q", "k")).unitwise("head")
    params = {"h.0.qkv": (2, 3), "h.1.qkv": (2, 3), "head": (4, 2)}
    named = [(name, parameter(torch.ones(shape, device=DEVICE))) for name, shape in params.items()]
    clipper = ComponentClipper(named, math.inf, components=spec)
    suggestion = suggest(run_of(torch.rand(30, len(clipper.names)) + 1, clipper.names))
    assert [cap.name for cap in suggestion.caps] == ["h.*.qkv[q]", "h.*.qkv[k]", "head[*]"]
    kernels = ComponentClipper(
        torch.nn.Conv2d(2, 3, 3), 1.0, components=ComponentSpec().unitwise("weight", (0, 1))
    ).names
    assert list(suggest(run_of(lognormal(200, kernels), kernels), 0.1).max_norm) == ["weight[*,*]", "bias"]
    caps = ComponentClipper(named, suggestion.max_norm, components=spec).clip_().caps
    assert caps.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# What the run doesn't show
# ------------------------------------------------------------------------------------------------------------


def notes_of(*arguments, **options):
    return " ".join(suggest(*arguments, **options).notes)


def test_nothing_is_said_of_a_run_that_shows_all():
    assert notes_of(run_of(torch.randn(200, 3).exp()), 0.05) == ""


def test_caps_that_rounding_moves_far():
    norms = 1.0 + torch.arange(100.0).reshape(100, 1) / 10_000
    found = suggest(run_of(norms), 0.1)
    assert found.caps[0].rate == 0.0
    assert "rounding the cap moves its rate by more than half: 'h.*.w'." in " ".join(found.notes)


def test_sampled_steps_and_gaps():
    norms = torch.rand(100, 2) + 1
    assert "about one step in 20;" in notes_of(run_of(norms, steps=list(range(0, 2000, 20))))
    assert "has 7 steps fewer than ran" in notes_of(run_of(norms, steps=[*range(50), *range(57, 107)]))


def test_too_few_steps():
    text = notes_of(run_of(torch.rand(50, 40) + 1), 0.001)
    assert "50 steps are too few for a rate of 0.001, which is one clip of a component in 1,000 steps" in text
    norms = torch.rand(200, 2) + 1
    norms[20:, 1] = 0
    assert "Too few norms for a rate of 0.01, so that the cap is uncertain: 'rare'." in notes_of(
        run_of(norms, ("h", "rare"))
    )


def test_a_warm_up_is_found_and_skipped():
    norms = torch.rand(200, 2) + 1
    norms[:20] *= 100
    steps = list(range(1000, 2000, 5))
    found = suggest(run_of(norms, steps=steps), 0.05)
    assert "100% of the norms above these caps are in the first 100 steps" in " ".join(found.notes)
    rest = suggest(run_of(norms, steps=steps), 0.05, skip=100)
    assert (rest.steps, rest.skipped) == (180, 20)
    assert "warm-up" not in " ".join(rest.notes)
    assert rest.caps[0].cap <= 2.0 < found.caps[0].cap


def test_norms_that_are_not_finite_and_types_without_any():
    norms = torch.randn(100, 4).exp()
    norms[3, 0], norms[3, 1], norms[9, 1] = math.nan, math.inf, math.inf
    norms[:, 2], norms[:, 3] = 0.0, math.inf
    run = run_of(norms, ("h.0.w", "h.1.w", "h.0.a.w", "bad"))  # the first pattern matches the third
    found = suggest(run, 0.05)
    caps = {cap.name: cap for cap in found.caps}
    assert [(cap.counted, cap.nonfinite) for cap in found.caps] == [(197, 2), (0, 0), (0, 100)]
    assert caps["h.*.w"].rate == pytest.approx(0.05, abs=0.02)
    limits = match_patterns(run.names, found.max_norm)
    assert (limits["h.0.a.w"], limits["bad"]) == (math.inf, math.inf)
    text = " ".join(found.notes)
    assert "Only zero or non-finite norms, so the cap is inf, which doesn't clip: 'h.*.a.w', 'bad'." in text
    assert "103 norms in 100 steps were inf or NaN" in text
    assert found.as_dict()["max_norm"]["bad"] is None
    json.dumps(found.as_dict(), allow_nan=False)


def test_caps_in_force():
    norms, coefs = torch.rand(100, 2).double() + 1, torch.ones(100, 2).double()
    coefs[:10, 0] = 0.5
    assert "Caps were in force (5.0% of the norms were clipped)" in notes_of(run_of(norms, coefs=coefs), 0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": 0}, ValueError, "rate: expected a finite number > 0"),
        ({"rate": 1}, ValueError, "rate: expected a number below 1"),
        ({"rate": "1 %"}, TypeError, "rate: expected a number, not str"),
        ({"by": "layer"}, ValueError, "by: expected 'type' or 'component', not 'layer'"),
        ({"skip": -1}, ValueError, "skip: expected a whole number >= 0"),
        ({"skip": 10}, ValueError, "skip: the run ends at step 9, so skipping 10 leaves none"),
        ({"run": 3}, TypeError, "run: expected a path or a Run, not int"),
        ({"run": run_of(torch.zeros(0, 2))}, ValueError, "run: has no steps yet"),
        (
            {"run": run_of(torch.tensor([[0.0, math.inf]]))},
            ValueError,
            r"run: all norms are zero or not finite, of 'h",
        ),
        ({"run": run_of(torch.ones(1, 2), ("*?", "?*")), "by": "component"}, ValueError, "no order of patterns"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        suggest(**{"run": run_of(torch.rand(10, 2) + 1), **options})


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded_run(tmp_path):
    norms = lognormal(60)
    norms[:, NAMES.index("head.bias")] = 0.0
    with ClipRecorder(tmp_path / "run") as recorder:
        replay(norms, math.inf, recorder=recorder)
    return tmp_path / "run.jsonl"


def test_table_and_mapping(recorded_run, capsys):
    pytest.importorskip("rich")
    assert main(["suggest", str(recorded_run), "--rate", "0.05", "--skip", "10"]) == 0
    text = capsys.readouterr().out
    suggestion = suggest(recorded_run, 0.05, skip=10)
    assert "Norms before clipping in 50 steps, without the first 10" in text
    for cap in suggestion.caps[:-1]:
        labels = cap.name, cap.name.removeprefix("h.*.")  # the whole name, where two types end alike
        row = next(line for line in text.splitlines() if line.strip().startswith(labels))
        assert row.split()[1] == str(len(cap.components))
        assert f" {cap.cap:g} " in row
        assert f" {100 * cap.rate:.2f} %" in row
    assert "Note: Only zero or non-finite norms" in text.replace("\n", " ")
    pasted = {}
    exec(text[text.index("max_norm={") :], {}, pasted)
    assert pasted["max_norm"] == suggestion.max_norm
    assert list(pasted["max_norm"]) == list(suggestion.max_norm)


def test_json_and_picture(recorded_run, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    file = tmp_path / "caps.png"
    assert main(["suggest", str(recorded_run), "--by", "component", "--json", "--plot", str(file)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out, parse_constant=pytest.fail)
    assert found == suggest(recorded_run, by="component").as_dict()
    assert captured.err == f"{file}\n"
    picture = image.imread(file)[..., :3]
    assert picture.mean() > 0.85  # light
    assert picture.std() > 0.01


def test_a_picture_of_many_types(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    names = tuple(f"stage.block_{'x' * (i % 70)}{i}.{kind}" for i in range(100) for kind in ("0.w", "1.w"))
    suggestion = suggest(run_of(torch.rand(20, len(names)) + 1, names))
    file = plot_suggestion(suggestion, tmp_path / "caps.png")
    height, width = image.imread(file).shape[:2]
    assert 2500 < height < 3500  # 80 of them, 0.27 inches each
    assert width == 1300


def test_errors_of_the_command(recorded_run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    (tmp_path / "text.jsonl").write_text("some text\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "board").mkdir()
    (tmp_path / "board" / "events.out.tfevents.1").touch()
    for arguments, message in (
        ([str(tmp_path / "none.jsonl")], "none.jsonl: no such file or folder"),
        ([str(tmp_path / "text.jsonl")], "text.jsonl, line 1: not the header of a run"),
        ([str(tmp_path / "binary")], "binary: not a recorded run"),
        ([str(tmp_path / "board")], "TensorBoard's files have no norms of components"),
        ([str(recorded_run), "--rate", "2"], "rate: expected a finite number > 0 and <= 1"),
        ([str(recorded_run), "--plot", "caps.xyz"], "plot: expected a .png, .svg or .pdf, not caps.xyz"),
    ):
        assert main(["suggest", *arguments]) == 2
        captured = capsys.readouterr()
        assert re.match(f"suggest: .*{re.escape(message)}", captured.err)
        assert captured.out == ""
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["suggest", str(recorded_run)]) == 2
    assert "the table needs rich" in capsys.readouterr().err
    assert main(["suggest", str(recorded_run), "--plot", "caps.png"]) == 2
    assert "plots need matplotlib" in capsys.readouterr().err
