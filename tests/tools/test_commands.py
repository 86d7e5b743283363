"""``python -m cwclip_kernels``: doctor and bench, here and where something is missing."""

import subprocess
import sys

import pytest

from cwclip_kernels.__main__ import COMMANDS, main
from cwclip_kernels.commands import bench, doctor


def test_the_doctor_finds_nothing_to_mend_here(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines if line[:2] == "!!"] == []
    found = {line[4:22].strip(): line[23:] for line in lines if line[:2] in ("ok", "--")}
    assert {"python", "torch", "extension", "triton", "a call"} <= set(found)
    assert lines[-1] == "nothing to mend"
    assert main(["doctor", "now"]) == 2


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        (["cwclip_kernels._C"], ["!!  extension          not there", "CWCLIP_BUILD=cpu pip install"]),
        (["triton"], ["nothing to mend"]),
        (["packaging"], ["--  extras             not looked at", "nothing to mend"]),
    ],
)
def test_the_doctor_where_something_is_missing(hidden, words):
    code = f"import sys\nfor name in {hidden}: sys.modules[name] = None\n"
    code += "from cwclip_kernels.__main__ import main\nsys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert not done.stderr
    for word in words:
        assert word in done.stdout
    assert done.returncode == (0 if "nothing to mend" in words else 1)


def test_the_doctor_sees_a_wrong_result(monkeypatch, capsys):
    monkeypatch.setattr(doctor.ComponentClipper, "clip_", lambda self: None)
    assert main(["doctor"]) == 1
    assert "wrong result: report this" in capsys.readouterr().out


def test_bench(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    monkeypatch.setattr(bench, "SETS", {"two": [(3, 4), (5,)]})
    assert main(["bench", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "two: 2 tensors, 0 MB of float32" in text
    for name in ("ComponentClipper.clip_", "clip_grad_norm_ for each parameter", "reading every gradient once"):
        assert name in text
    assert "ours reads" in text


def test_an_unknown_command(capsys):
    assert main(["frobnicate"]) == 2
    assert "unknown command 'frobnicate'" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["abacus", "meta:x"])
def test_bench_on_a_device_that_is_not_there(device, capsys):
    assert main(["bench", "--device", device]) == 2
    assert capsys.readouterr().err.startswith(f"bench: --device {device}: ")


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_help(asked, capsys):
    assert main([asked]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("usage: python -m cwclip_kernels", *COMMANDS))
