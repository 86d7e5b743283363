"""What every run of an experiment has in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LATER = {
    "optimizer": "separate",
    "precision": "float32",
}  # settings that older experiments don't record, and what they were


@dataclass(frozen=True)
class Settings:
    """All that a run's numbers depend on, besides its arm, its seed and the machine.

    Attributes:
        task: a name of `tasks.TASKS`.
        model: a folder, a Hugging Face name, or the packaged default.
        data: a local folder with a hub task's data; None for the hub, or where the task makes its own.
        limit: use that many training examples at most.
        epochs, batch_size, max_length, lr, warmup, weight_decay, eps: as usual; `warmup` is a share of the steps.
        bias_correction: of Adam.
        optimizer: "separate" clips, then steps; "fused" does both in one pass, `optim.ComponentClipAdamW`, where an
            arm clips by component or not at all.
        precision: of matrix products, "float32" or "bfloat16" (autocast; weights, gradients and Adam's moments stay
            float32).
        evaluations: how many times the dev set is looked at, evenly spread; the last is the score.
        target: the score that "steps to a score" is about.
    """

    task: str
    model: str
    data: str | None
    limit: int | None
    epochs: int
    batch_size: int
    max_length: int
    lr: float
    warmup: float
    weight_decay: float
    eps: float
    bias_correction: bool
    optimizer: str
    precision: str
    evaluations: int
    target: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
