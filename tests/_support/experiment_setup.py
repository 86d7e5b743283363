"""What the tests of the paper's experiment share: its modules, a model of a few thousand weights, made-up runs."""

import functools
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

for needed in ("numpy", "rich", "matplotlib", "tokenizers", "transformers"):
    pytest.importorskip(needed)

import tokenizers  # noqa: E402
import transformers  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))

from stability import names, options  # noqa: E402

CPU = torch.device("cpu")


@functools.cache
def items():
    """Those of the names task, read once."""
    return names.collect()


@functools.cache
def tiny_model(folder):
    """An untrained BERT of two layers in this folder, and a tokenizer of the data's commonest words."""
    words = Counter(
        word for item in items() for word in f"{item.name} {item.summary}".lower().split() if word.isalpha()
    )
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for word, _ in words.most_common(300))]
    tokenizer = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(vocabulary)})
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,  # or losses would be the logarithm of 2, whatever is done
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def settings_for(model, *more):
    given = ["--model", str(model), "--limit", "64", "--epochs", "1", "--evaluations", "2", *more]
    return options.settle(options.parser("").parse_args(given))


def made(score, seed, **more):
    base = {"arm": "x", "seed": seed, "score": score, "failed": score <= 0.55, "one_answer": False, "lr": 1e-3}
    usual = {"cap": None, "seconds": 1.0, "steps_to_target": 15 if score > 0.6 else None}
    return {**base, **usual, "kept": [1.0], "clip_rate": [0.0], "total_norm": [2.0], **more}
