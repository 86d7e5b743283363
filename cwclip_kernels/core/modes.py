"""The modes of autograd that a call runs in, whatever mode its caller is in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_autograd(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Records nothing for a backward pass, and leaves inference mode.

    What is made in inference mode can't be written to outside of it, but a call keeps tables and what thresholds have
    learnt for later calls.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return call
