"""Recording, reading again, the paper's layout, figures."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, ComponentSpec
from cwclip_kernels.__main__ import main
from cwclip_kernels.optim import ComponentClipAdamW
from cwclip_kernels.telemetry import ClipRecorder, plot_run, read_run, write_status_json
from helpers import DEVICE, parameter, random_grad
from no_sync import NoSync
from recorded_runs import KILLED, NAMES, check_run, recorded, result


# Fewer steps than fit, just as many, several buffers full and a rest, none.
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 8, 9, 13])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_is_recorded_is_read_again(tmp_path, kind, steps):
    results = [result(bad=i % 3 == 1, one_cap=i % 2 == 0) for i in range(steps)]
    recorded(tmp_path / "run", results, every=4, formats=(kind,))
    if not steps:
        assert list(tmp_path.iterdir()) == []
        return
    check_run(read_run(tmp_path / f"run.{kind}"), results)


def test_float64_is_kept(tmp_path):
    results = [result(dtype=torch.float64)]
    recorded(tmp_path / "run", results)
    assert torch.equal(read_run(tmp_path / "run.jsonl").norms[0], results[0].norms.cpu())


def test_every_json_parser_reads_it(tmp_path):
    recorded(tmp_path / "run", [result(bad=True)])

    def refuse(constant):
        raise AssertionError(constant)

    header, line = (tmp_path / "run.jsonl").read_text().splitlines()
    assert json.loads(header)["components"] == list(NAMES)
    assert json.loads(line, parse_constant=refuse)["norms"][:2] == ["NaN", "Infinity"]


def test_csv_for_spreadsheets(tmp_path):
    r = result(bad=True)
    recorded(tmp_path / "run", [r], formats=("csv", "jsonl"))
    rows = list(csv.DictReader((tmp_path / "run.csv").read_text().splitlines()))
    assert [row["component"] for row in rows] == list(NAMES)
    assert [row["nonfinite"] for row in rows] == ["1", "1", "0"]
    assert [row["clipped"] for row in rows] == [str(int(c)) for c in r.clipped.tolist()]


def test_steps_by_number_and_restarts(tmp_path):
    results = [result() for _ in range(6)]
    with ClipRecorder(tmp_path / "run", every=2) as recorder:
        for i, r in enumerate(results[:4]):
            recorder.record(r, step=10 * i)
    with ClipRecorder(tmp_path / "run", every=2) as recorder:  # went back to step 20
        recorder.record(results[4], step=20)
        recorder.record(results[5])
    run = read_run(tmp_path / "run.jsonl")
    check_run(run, [results[0], results[1], results[4], results[5], results[3]], [0, 10, 20, 21, 30])


def test_recording_never_waits_for_the_device(tmp_path):
    recorder = ClipRecorder(tmp_path / "run", every=50)
    recorder.record(result())
    with NoSync():
        for _ in range(40):
            recorder.record(result())
    recorder.close()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_buffers_in_flight_on_a_gpu(tmp_path):
    results = [result() for _ in range(103)]
    recorded(tmp_path / "run", results, every=4)
    check_run(read_run(tmp_path / "run.jsonl"), results)


def test_as_a_callback_of_training(tmp_path):
    model = nn.Linear(3, 2).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ClipRecorder(tmp_path / "run", every=2) as recorder:
        ComponentClipper(model, 0.1).attach(optimizer, on_clip=recorder.record)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 3, device=DEVICE)).square().sum().backward()
            optimizer.step()
    run = read_run(tmp_path / "run.jsonl")
    assert run.norms.shape == (5, 2)
    torch.testing.assert_close(run.caps, torch.full_like(run.caps, 0.1), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("end", "steps"), [("kill", 6), ("exit", 8)])
def test_what_is_left_of_a_program_that_ends(tmp_path, end, steps):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "run", end], check=end == "exit", timeout=120)
    assert read_run(tmp_path / "run.jsonl").steps == list(range(steps))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_that_was_cut_off(tmp_path, kind):
    results = [result() for _ in range(3)]
    recorded(tmp_path / "run", results, formats=(kind,))
    file = tmp_path / f"run.{kind}"
    os.truncate(file, file.stat().st_size - 4)
    check_run(read_run(file), results[:2])
    with ClipRecorder(tmp_path / "run", formats=(kind,)) as recorder:
        recorder.record(results[2], step=2)
    check_run(read_run(file), results)


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch):
    from cwclip_kernels.telemetry import writers

    results = [result() for _ in range(7)]
    append, is_full = writers._append, [False]

    def full(path, text):
        if is_full[0]:
            raise OSError(28, "No space left on device")
        append(path, text)

    monkeypatch.setattr(writers, "_append", full)
    with ClipRecorder(tmp_path / "run", every=2) as recorder:
        recorder.record(results[0])
        is_full[0] = True
        for r in results[1:5]:  # more than a buffer holds
            with pytest.raises(OSError, match="No space left"):
                recorder.record(r)
        is_full[0] = False
        for r in results[5:]:
            recorder.record(r)
    check_run(read_run(tmp_path / "run.jsonl"), results)


def test_tensorboard(tmp_path, monkeypatch):
    from cwclip_kernels.telemetry import writers

    events = []

    class SummaryWriter:
        def __init__(self, path):
            events.append(("open", path))

        def add_scalar(self, name, value, step):
            events.append((name, step, value))

        def add_histogram(self, name, values, step):
            events.append((name, step, values.tolist()))

        def flush(self):
            pass

        def close(self):
            events.append(("close",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = SummaryWriter
    r = result(bad=True)
    recorded(tmp_path / "run", [r], formats=("tensorboard",))
    assert events[0] == ("open", str(tmp_path / "run"))
    assert ("clip/nonfinite", 0, 2) in events
    assert ("clip/rate", 0, r.clipped.double().mean().item()) in events
    assert events[-1] == ("close",)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match="pip install tensorboard"):
        writers.TensorBoard(tmp_path, NAMES)


class TestRecorderErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"every": 0}, ValueError, "every: expected a whole number >= 1"),
            ({"every": 1.5}, TypeError, "every: expected a whole number, not float"),
            ({"formats": ()}, ValueError, "formats: expected some of jsonl, csv, tensorboard"),
            ({"formats": "csv"}, ValueError, "formats"),
            ({"formats": ("xml",)}, ValueError, "formats"),
        ],
    )
    def test_arguments(self, tmp_path, options, error, message):
        with pytest.raises(error, match=message):
            ClipRecorder(tmp_path / "run", **options)

    @pytest.mark.parametrize("kind", ["jsonl", "csv"])
    def test_other_components(self, tmp_path, kind):
        others = tuple("xyz")
        with ClipRecorder(tmp_path / "run", formats=(kind,)) as recorder:
            recorder.record(result())
            with pytest.raises(ValueError, match="of other components than those recorded before"):
                recorder.record(result(names=others))
        with pytest.raises(ValueError, match="holds a run of other components; choose another name"):
            ClipRecorder(tmp_path / "run", formats=(kind,)).record(result(names=others))
        (tmp_path / f"text.{kind}").write_text("some text\n")
        with pytest.raises(ValueError, match="is no run of cwclip_kernels"):
            ClipRecorder(tmp_path / "text", formats=(kind,)).record(result())
        assert (tmp_path / f"text.{kind}").read_text() == "some text\n"

    def test_closed(self, tmp_path):
        recorder = ClipRecorder(tmp_path / "run")
        recorder.close()
        recorder.close()
        with pytest.raises(RuntimeError, match="is closed"):
            recorder.record(result())

    def test_files_that_are_no_runs(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_run(tmp_path / "none.jsonl")
        with pytest.raises(FileNotFoundError, match=r"holds no status_\*.json"):
            read_run(tmp_path)
        recorded(tmp_path / "run", [result()], formats=("jsonl", "csv"))
        for kind, line, message in (
            ("jsonl", "{}\n", "line 3: not a step of a run"),
            ("jsonl", "oops\n", "line 3: not a step of a run .*Expecting value"),
            ("csv", "a,b\n", "line 5: not a step of a run"),
        ):
            file = tmp_path / f"run.{kind}"
            whole = file.read_text()
            file.write_text(whole + line)
            with pytest.raises(ValueError, match=message):
                read_run(file)
            file.write_text(whole)
            (tmp_path / f"wrong.{kind}").write_text(line)
            with pytest.raises(ValueError, match="line 1"):
                read_run(tmp_path / f"wrong.{kind}")
        (tmp_path / "status_1.json").write_text("[]")
        with pytest.raises(ValueError, match=r"status_1.json: not a status file"):
            read_run(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# The paper's layout
# ------------------------------------------------------------------------------------------------------------


def test_status_json_says_what_torch_says(tmp_path):
    params = {"big": parameter(random_grad((40, 3), scale=100.0)), "small": parameter(random_grad((5,), scale=1e-5))}
    params["none"] = parameter(None)
    params["half"] = parameter(random_grad((7,), torch.bfloat16))
    for p in params.values():
        p.data.copy_(torch.randn(p.shape))
    before = {name: p.grad.double().norm().item() for name, p in params.items() if p.grad is not None}
    outcome = ComponentClipper(params.items(), 0.5).clip_()
    file = write_status_json(tmp_path / "seed1" / "gradClipMemoryJsons", 20, params.items(), outcome)
    assert file.name == "status_20.json"
    status = json.loads(file.read_text())
    assert status.pop("step") == 20
    assert list(status) == ["big", "small", "half"]
    for name, entry in status.items():
        p = params[name]
        grad, value = p.grad.double(), p.detach().double()
        wanted = {
            "shape": list(p.shape),
            "n_element": p.numel(),
            "clipped_num": p.numel() if before[name] > 0.5 else 0,
            "previous_grad_norm": pytest.approx(before[name], rel=1e-6),
            "current_grad_norm": pytest.approx(grad.norm().item(), rel=1e-12),
            "current_param_norm": pytest.approx(value.norm().item(), rel=1e-12),
        }
        for of, tensor in (("grad", grad), ("param", value)):
            for what in ("max", "min", "mean"):
                number = getattr(tensor, what)().item()
                wanted[f"{what}_{of}_value"] = pytest.approx(number, rel=1e-9, abs=1e-15)
        assert entry == wanted
    assert status["big"]["current_grad_norm"] == pytest.approx(0.5, rel=1e-5)
    assert status["small"]["current_grad_norm"] < 1e-3  # and not the cap


def test_status_of_the_figures_own_arithmetic(tmp_path):
    """Clip rate and norms as the paper's plotting script computes them from the files."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2).to(DEVICE)
    clipper = ComponentClipper(model, 0.3)
    rates = []
    for step in (20, 40):
        model.zero_grad()
        model(torch.randn(2, 3, 8, device=DEVICE)).square().sum().backward()
        outcome = clipper.clip_()
        write_status_json(tmp_path, step, model, outcome)
        sizes = torch.tensor([p.numel() for p in model.parameters()], device=DEVICE)
        rates.append(((outcome.clipped * sizes).sum() / sizes.sum()).item())
    for step, rate in zip((20, 40), rates, strict=True):
        status = json.loads((tmp_path / f"status_{step}.json").read_text())
        keys = [key for key in status if key != "step"]
        found = sum(status[k]["clipped_num"] for k in keys) / sum(status[k]["n_element"] for k in keys)
        assert found == pytest.approx(rate)
    run = read_run(tmp_path)
    assert run.steps == [20, 40]
    assert run.names == clipper.names
    torch.testing.assert_close(run.norms[1], outcome.norms.double().cpu())
    torch.testing.assert_close(run.coefs[1], outcome.coefs.double().cpu(), rtol=1e-5, atol=0)


def test_status_of_an_optimizer_that_clips_in_its_step(tmp_path):
    """It leaves gradients as they were; the file says what was applied."""
    params = [
        ("w", parameter(torch.tensor([3.0, 4.0], device=DEVICE))),
        ("b", parameter(torch.ones(1, device=DEVICE))),
    ]
    optimizer = ComponentClipAdamW(params, max_norm={"w": 1.0}, clip_eps=0.0)
    optimizer.step()
    status = json.loads(write_status_json(tmp_path, 1, params, optimizer.last).read_text())
    assert status["w"]["previous_grad_norm"] == 5.0
    assert status["w"]["current_grad_norm"] == pytest.approx(1.0)
    assert status["w"]["max_grad_value"] == pytest.approx(0.8)
    assert status["b"]["current_grad_norm"] == 1.0
    assert read_run(tmp_path).coefs[0].tolist() == pytest.approx([0.2, 1.0])


def test_status_of_sparse_and_empty_gradients(tmp_path):
    sparse = torch.sparse_coo_tensor([[0, 0]], torch.ones(2, 2), (3, 2), check_invariants=True).to(DEVICE)
    params = [("e", parameter(sparse)), ("0", parameter(torch.zeros(0, device=DEVICE)))]
    status = json.loads(write_status_json(tmp_path, 1, params, ComponentClipper(params, 9.0).clip_()).read_text())
    assert status["e"]["current_grad_norm"] == pytest.approx(math.sqrt(8))
    assert status["0"]["max_grad_value"] == 0


def test_status_needs_components_that_are_parameters(tmp_path):
    model = nn.Linear(2, 2).to(DEVICE)
    model(torch.ones(1, 2, device=DEVICE)).sum().backward()
    clipper = ComponentClipper(model, 1.0, components=ComponentSpec("all"))
    with pytest.raises(ValueError, match="no component has the name of a parameter"):
        write_status_json(tmp_path, 1, model, clipper.clip_())


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------

BERT_LIKE = tuple(
    f"bert.encoder.layer.{i}.{kind}"
    for i in range(3)
    for kind in ("attention.q.weight", "attention.q.bias", "out.weight")
) + ("bert.embeddings.weight", "classifier.bias")


@pytest.mark.parametrize(
    ("names", "steps"), [(BERT_LIKE, 30), (BERT_LIKE, 1), (("w", "b"), 3), (("all",), 2), (BERT_LIKE, 1200)]
)
def test_figures(tmp_path, names, steps):
    pyplot = pytest.importorskip("matplotlib.image")
    recorded(tmp_path / "run", [result(len(names), names, bad=len(names) > 1 and i == 0) for i in range(steps)])
    paths = plot_run(tmp_path / "run.jsonl")
    assert [p.name for p in paths] == ["norms.png", "clip_rate.png", "heat_map.png"]
    assert all(p.parent == tmp_path / "run" / "figures" for p in paths)
    for path in paths:
        image = pyplot.imread(path)
        assert min(image.shape[:2]) > 250
        assert image[..., :3].std() > 0.01  # something is drawn


def test_plot_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recorded(tmp_path / "run", [result()], formats=("csv",))
    assert main(["plot", str(tmp_path / "run.csv"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "out" / f"{name}.png") for name in ("norms", "clip_rate", "heat_map")
    ]
    assert main(["plot", str(tmp_path / "nothing.csv")]) == 2
    assert "nothing.csv: no such file" in capsys.readouterr().err
    assert main(["draw"]) == 2
    assert "unknown command 'draw'" in capsys.readouterr().err


def test_figures_without_matplotlib(tmp_path, monkeypatch, capsys):
    recorded(tmp_path / "run", [result()])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(tmp_path / "run.jsonl")]) == 2
    assert "plots need matplotlib" in capsys.readouterr().err


def test_a_step_that_was_recorded_twice_and_cut_off(tmp_path):
    """A run that went on from an older checkpoint, and was killed within a line: the whole recording counts."""
    header, file = "step,component,norm,cap,coef,clipped,nonfinite\n", tmp_path / "run.csv"
    first = [f"{step},{name},{step + 1},9,1,0,0\n" for step in range(3) for name in "ab"]
    again = "1,a,100,9,0.09,1,0\n"
    file.write_text(header + "".join(first) + again)
    run = read_run(file)
    assert run.steps == [0, 1, 2]
    assert run.norms.tolist() == [[1, 1], [2, 2], [3, 3]]
    file.write_text(header + "".join(first) + again + "1,b,50,9,0.18,1,0\n")
    assert read_run(file).norms.tolist() == [[1, 1], [100, 50], [3, 3]]
