"""Arms: ways to clip, each read from one word of the command line.

none                   gradients as they are
global:1.0             one norm over all gradients
component:0.05         each parameter's gradient to a norm of its own
matched:0.05           one norm over all, as tight as component:0.05 is (calibrate.py finds the cap)
EMA(warmup_steps=20)   any of cwclip_kernels.thresholds
my.module.Caps(3)      any other class or function, by its full name, that makes such an object
stable                 no clip, a learning rate that calibration found stable
...@2e-5               each of these at another learning rate
"""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cwclip_kernels import ComponentClipper, thresholds

from .problem import Problem

PLAIN = ("none", "stable")
CAPPED = ("global", "component", "matched")


@dataclass(frozen=True)
class Arm:
    """One way to clip.

    Attributes:
        label: as the command line has it; the arm's name everywhere.
        kind: of `PLAIN`, `CAPPED`, or "threshold".
        cap: for those of `CAPPED`; of "matched", the component cap that it is to match.
        call: for "threshold": what makes the object.
        lr: where it isn't the experiment's.
    """

    label: str
    kind: str
    cap: float = math.inf
    call: str = ""
    lr: float | None = None

    @property
    def slug(self) -> str:
        """The label as a part of a file name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-")


def parse(word: str) -> Arm:
    """The arm that a word describes.

    Raises:
        Problem: none does.
    """
    head, at, rate = word.strip().rpartition("@")
    head, lr = (head, _number(word, rate)) if at else (word.strip(), None)
    kind, colon, cap = head.partition(":")
    if kind in PLAIN and not colon:
        return Arm(word, kind, lr=lr)
    if kind in CAPPED and colon:
        return Arm(word, kind, cap=_number(word, cap), lr=lr)
    if "(" in head:
        threshold(head)  # so that a mistake is found before any run
        return Arm(word, "threshold", call=head, lr=lr)
    raise Problem(
        f"--arms {word!r}: expected none, stable, global:X, component:X, matched:X, or EMA(...) and the like"
    )


def _number(word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise Problem(f"--arms {word!r}: {text!r} is not a number above 0")
    return value


def threshold(call: str) -> Any:
    """A new object from `EMA(decay=0.9)` or `package.module.Name(1)`; arguments are literals.

    Raises:
        Problem: it isn't such a call, or calling it fails.
    """
    try:
        node = ast.parse(call, mode="eval").body
        assert isinstance(node, ast.Call)
        path, _, name = ast.unparse(node.func).rpartition(".")
        maker = getattr(importlib.import_module(path) if path else thresholds, name)
        arguments = [ast.literal_eval(value) for value in node.args]
        options = {str(pair.arg): ast.literal_eval(pair.value) for pair in node.keywords}
        made = maker(*arguments, **options)
    except (SyntaxError, AssertionError, ImportError, AttributeError, TypeError, ValueError) as error:
        known = ", ".join(name for name in thresholds.__all__ if name not in ("Setting", "Threshold"))
        raise Problem(
            f"--arms {call!r}: {error or 'not a call'}; expected one of {known}, with its arguments, or "
            "package.module.Name(...)"
        ) from None
    if not isinstance(made, thresholds.Threshold):
        raise Problem(f"--arms {call!r}: made a {type(made).__name__}, not a cwclip_kernels.thresholds.Threshold")
    return made


Clip = Callable[[], tuple[Tensor, Tensor]]


def max_norm_of(arm: Arm) -> Any:
    """The cap of each component, `math.inf` where nothing is clipped; of an arm that clips by component, or not.

    Raises:
        ValueError: the arm has to be calibrated first.
    """
    if arm.kind not in ("none", "component", "threshold"):
        raise ValueError(f"arm {arm.label} has to be calibrated first")
    return threshold(arm.call) if arm.kind == "threshold" else arm.cap


def clip_of(arm: Arm, model: nn.Module) -> tuple[tuple[str, ...], Clip]:
    """The components' names, and what clips the model's gradients: norms before [K], and coefficients [K]."""
    if arm.kind != "global":
        clipper = ComponentClipper(model, max_norm_of(arm))

        def clip() -> tuple[Tensor, Tensor]:
            result = clipper.clip_()
            return result.norms, result.coefs

        return clipper.names, clip
    measure, whole = ComponentClipper(model, math.inf), ComponentClipper(model, arm.cap, components="all")

    def clip_all() -> tuple[Tensor, Tensor]:
        norms = measure.clip_().norms
        return norms, whole.clip_().coefs.expand_as(norms)

    return measure.names, clip_all
