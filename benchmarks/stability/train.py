"""One run: fine-tunes a fresh copy of the model, and keeps what the report is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .arms import Arm
from .settings import Settings
from .stepping import stepping_of
from .tasks import Row, Task

MOST_STEPS = 100  # whose norms, component by component, are kept; what is one number a step is kept of every step

Batch = dict[str, Tensor]


class Trainer:
    """A task, tokenized once, for any number of runs.

    Args:
        device: where runs are made.
    """

    def __init__(self, settings: Settings, task: Task, device: torch.device) -> None:
        self._settings, self._task, self._device = settings, task, device
        self._tokenizer = models.load_tokenizer(settings.model)
        self._train = self._tokens(task.train)
        dev = self._tokens(task.dev)
        # Batches of similar lengths spare most of the padding; guesses go back into the data's order.
        self._order = sorted(range(len(dev)), key=lambda i: len(dev[i]["input_ids"]))
        size = 4 * settings.batch_size
        self._dev = [self._batch([dev[i] for i in self._order[at : at + size]]) for at in range(0, len(dev), size)]

    def run(self, arm: Arm, seed: int, tell: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Trains and judges; all that depends on chance depends on the seed, and is the same in each arm.

        Args:
            tell: called after every step.
        """
        started = time.perf_counter()
        settings, device = self._settings, self._device
        steps, judged_after = schedule(settings, len(self._train))
        model = models.load(settings.model, self._task.classes, seed, self._tokenizer.pad_token_id).to(device)
        lr = settings.lr if arm.lr is None else arm.lr
        stepping = stepping_of(arm, model, settings, lr)
        optimizer, names = stepping.optimizer, stepping.names
        batches = self._batches(seed)
        norms: list[Tensor] = []
        coefs: list[Tensor] = []
        losses: list[Tensor] = []
        scores: list[dict[str, float]] = []
        guesses: list[int] = []

        torch.manual_seed(seed)  # dropout; also CUDA's
        model.train()
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step - 1, steps, settings.warmup)
            with self._precision():
                loss = model(**{field: values.to(device) for field, values in next(batches).items()}).loss
            loss.backward()
            before, coef = stepping.step()
            optimizer.zero_grad()
            for kept, value in ((norms, before), (coefs, coef), (losses, loss.detach())):
                kept.append(value)  # on the device: nothing waits for it
            if step in judged_after:
                guesses = self._guesses(model)
                scores.append({"step": step, "score": self._task.score(guesses)})
            tell()

        score = scores[-1]["score"]
        reached = [at["step"] for at in scores if at["score"] >= settings.target]
        return {
            "arm": arm.label,
            "kind": arm.kind,
            "cap": None if math.isinf(arm.cap) else arm.cap,
            "lr": lr,
            "seed": seed,
            "score": score,
            "failed": not score > self._task.cutoff,
            "one_answer": len(set(guesses)) == 1,
            "steps_to_target": reached[0] if reached else None,
            "scores": scores,
            "loss": _rounded(torch.stack(losses)),
            **_telemetry(names, torch.stack(norms).double(), torch.stack(coefs).double()),
            "seconds": round(time.perf_counter() - started, 1),
            "made_by": {
                "torch": torch.__version__,
                "optimizer": type(optimizer).__name__,
                "device": str(device),
                "threads": torch.get_num_threads(),
                "date": time.strftime("%Y-%m-%d %H:%M"),
            },
        }

    def _precision(self) -> torch.autocast:
        lower = self._settings.precision == "bfloat16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=lower)

    def _tokens(self, rows: list[Row]) -> list[dict[str, list[int]]]:
        texts = [list(column) for column in zip(*(texts for texts, _ in rows), strict=True)]
        longest = min(self._settings.max_length, self._tokenizer.model_max_length)
        fields = self._tokenizer(*texts, truncation=True, max_length=longest)
        return [
            {**{field: values[i] for field, values in fields.items()}, "labels": [label]}
            for i, (_, label) in enumerate(rows)
        ]

    def _batch(self, rows: list[dict[str, list[int]]]) -> Batch:
        labels = torch.tensor([row["labels"][0] for row in rows])
        plain = {field: [row[field] for row in rows] for field in rows[0] if field != "labels"}
        return {**self._tokenizer.pad(plain, return_tensors="pt"), "labels": labels}

    def _batches(self, seed: int) -> Any:
        """Training batches without end, every epoch in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self._train), generator=generator).tolist()
            for at in range(0, len(order), self._settings.batch_size):
                yield self._batch([self._train[i] for i in order[at : at + self._settings.batch_size]])

    @torch.no_grad()
    def _guesses(self, model: nn.Module) -> list[int]:
        model.eval()
        with self._precision():
            logits = [
                model(**{f: v.to(self._device) for f, v in batch.items() if f != "labels"}).logits
                for batch in self._dev
            ]
        model.train()
        guesses = [0] * len(self._order)
        for at, guess in zip(self._order, torch.cat(logits).argmax(-1).tolist(), strict=True):
            guesses[at] = guess
        return guesses


def schedule(settings: Settings, examples: int) -> tuple[int, set[int]]:
    """The number of steps, and those after which the dev set is looked at."""
    steps = settings.epochs * math.ceil(examples / settings.batch_size)
    looks = min(settings.evaluations, steps)
    return steps, {round(steps * (i + 1) / looks) for i in range(looks)}


def rate(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate: up over the warm-up, then down in a line that ends at 0."""
    rising = round(steps * warmup)
    return (step + 1) / rising if step < rising else (steps - step) / max(1, steps - rising)


def _telemetry(names: tuple[str, ...], norms: Tensor, coefs: Tensor) -> dict[str, Any]:
    """Numbers of every step, and every component's norms of some; [S, K] each.

    `kept` is the norm of all gradients after clipping over that before: how tight an arm is.
    """
    before, after = norms.norm(dim=1), (norms * coefs).norm(dim=1)
    every = math.ceil(len(norms) / MOST_STEPS)
    return {
        "total_norm": _rounded(before),
        "kept": _rounded(after / before),
        "clip_rate": _rounded((coefs != 1).double().mean(1)),
        "components": list(names),
        "norm_steps": list(range(1, len(norms) + 1, every)),
        "norms": [_rounded(row) for row in norms[::every]],
    }


def _rounded(values: Tensor) -> list[float | None]:
    """Four digits; None for inf and NaN, which JSON lacks."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
