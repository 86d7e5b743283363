"""Made-up results, recorded and compared with what is read again."""

import math

import torch

from cwclip_kernels import ClipResult
from cwclip_kernels.telemetry import ClipRecorder
from helpers import DEVICE

NAMES = ("encoder.layer.0.w", "encoder.layer.1.w", "head.bias")


def result(k=3, names=NAMES, bad=False, dtype=torch.float32, one_cap=False):
    norms = torch.rand(k, dtype=dtype, device=DEVICE) + 0.1
    if bad:
        norms[0], norms[1] = math.nan, math.inf
    caps = torch.rand((() if one_cap else (k,)), dtype=torch.float64, device=DEVICE)
    coefs = torch.where(norms > caps, (caps / norms).to(dtype), 1.0)
    return ClipResult(names, norms, coefs, caps)


def recorded(path, results, **options):
    with ClipRecorder(path, **options) as recorder:
        for r in results:
            recorder.record(r)


def check_run(run, results, steps=None):
    assert run.names == results[0].names
    assert run.steps == (list(range(len(results))) if steps is None else steps)
    for i, r in enumerate(results):
        caps = r.caps.double().expand(len(r.names))
        for found, wanted in ((run.norms, r.norms), (run.caps, caps), (run.coefs, r.coefs)):
            torch.testing.assert_close(found[i], wanted.double().cpu(), rtol=1e-6, atol=0, equal_nan=True)
        assert torch.equal(run.nonfinite[i], ~r.norms.isfinite().cpu())


KILLED = """
import sys, os, torch
from cwclip_kernels import ComponentClipper
from cwclip_kernels.telemetry import ClipRecorder
p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.ones(2)
clipper, recorder = ComponentClipper([p], 1.0), ClipRecorder(sys.argv[1], every=3)
for _ in range(8):
    recorder.record(clipper.clip_())
if sys.argv[2] == "kill":
    os._exit(1)
"""
