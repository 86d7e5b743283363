"""What the tests of the paper's experiment share: its modules, a model of a few thousand weights, made-up runs."""

import functools
import sys
from pathlib import Path

import pytest
import torch

for needed in ("numpy", "rich", "matplotlib", "tokenizers", "transformers"):
    pytest.importorskip(needed)

from tiny_bert import save_tiny_bert  # noqa: E402

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
for folder in (BENCHMARKS, BENCHMARKS.parent / "examples"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from stability import names, options  # noqa: E402

CPU = torch.device("cpu")


@functools.cache
def items():
    """Those of the names task, read once."""
    return names.collect()


@functools.cache
def tiny_model(folder):
    """An untrained BERT of two layers in this folder, and a tokenizer of the data's commonest words."""
    torch.manual_seed(0)
    texts = [f"{item.name} {item.summary}" for item in items()]
    # By default losses would be the logarithm of 2, whatever is done.
    return save_tiny_bert(folder, texts, words=300, width=16, initializer_range=0.2)


def on_one_thread():
    """A fixture: for so small a model a second one only waits, which takes a CPU as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings_for(model, *more):
    given = ["--model", str(model), "--limit", "64", "--epochs", "1", "--evaluations", "2", *more]
    return options.settle(options.parser("").parse_args(given))


def made(score, seed, **more):
    base = {"arm": "x", "seed": seed, "score": score, "failed": score <= 0.55, "one_answer": False, "lr": 1e-3}
    usual = {"cap": None, "seconds": 1.0, "steps_to_target": 15 if score > 0.6 else None}
    return {**base, **usual, "kept": [1.0], "clip_rate": [0.0], "total_norm": [2.0], **more}
