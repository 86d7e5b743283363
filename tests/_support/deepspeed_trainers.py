"""Trainers with DeepSpeed on the ranks of ``on_ranks``."""

import contextlib
import tempfile
import warnings

import torch
import torch.distributed as dist

from deepspeed_engines import ADDRESS, started
from ranks import told_by_launcher

# What DeepSpeed calls, or has others call, that torch and Lightning have something to say about.
THEIRS = (
    "`torch.distributed.*` is deprecated",
    "`torch.jit.script_method` is deprecated",
    "You are using `torch.load` with `weights_only=False`",
)


@contextlib.contextmanager
def launched():
    """A rank as DeepSpeed's launcher starts it."""
    started()
    with told_by_launcher(OMP_NUM_THREADS="1", LOCAL_SIZE="1", **ADDRESS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"deepspeed\.")
        for text in THEIRS:
            warnings.filterwarnings("ignore", text)
        yield


def one_folder():
    """A folder that all ranks know."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


def whole(model):
    """The parameters of a model that ZeRO may have partitioned, by name."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(ours, theirs, rtol=1e-6):
    """Parameters by name, beside the largest of each."""
    assert list(ours) == list(theirs)
    for name, p in theirs.items():
        atol = max(rtol * p.abs().max().item(), 1e-9)
        torch.testing.assert_close(ours[name], p, rtol=0.0, atol=atol, msg=name)
