"""Modes of autograd and of the compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


is_traced = torch.compiler.is_dynamo_compiling
"""Whether ``torch.compile`` is tracing this call rather than running it; asked by this name alone."""


def is_recorded() -> bool:
    """Whether this call is traced or captured into a CUDA graph, so that the host can't count steps."""
    return is_traced() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def constant_when_traced(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``torch.compiler.assume_constant_result``, which imports the compiler already when it decorates."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host can read its values without a sync: it is on the CPU, and neither traced nor in a ``vmap``."""
    return tensor.device.type == "cpu" and not is_traced() and not torch._C._functorch.is_batchedtensor(tensor)


def check_not_recorded() -> None:
    """RuntimeError where torch.fx records operations, which don't include what our kernels do."""
    recorder = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if recorder is not None and recorder.get_proxy_mode() is not None:
        raise RuntimeError(
            "make_fx and torch.export.export(strict=False) can't record clipping, and the graph would do without it; "
            "use torch.compile, or torch.export.export(strict=True)"
        )


def outside_autograd(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Runs the function without autograd and outside of inference mode.

    Tensors made in inference mode can't be written to outside of it, but tables and thresholds outlive the call.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_inference_mode_enabled():
            with torch.no_grad():
                return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call
