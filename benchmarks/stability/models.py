"""A pretrained encoder with a head that depends on the seed alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

import packaged_models

from .problem import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD_STD = 0.02


def quiet() -> None:
    """A fresh head would be reported as missing from the checkpoint, at every run; likewise each try for the hub."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def check(name: str) -> None:
    """Fetches the model's configuration.

    Raises:
        Problem: there is no such model, the hub can't be reached, or it has no head for sequence classification.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    quiet()
    try:
        config = AutoConfig.from_pretrained(packaged_models.where(name))
    except (OSError, ValueError) as error:
        raise Problem(_not_found(name, error)) from None
    if config.model_type not in KNOWN:
        raise Problem(
            f"--model {name!r}: transformers has no sequence-classification head for a {config.model_type!r} model; "
            "take an encoder such as bert-large-uncased"
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(packaged_models.where(name))
    except (OSError, ValueError, ImportError) as error:
        raise Problem(_not_found(name, error)) from None
    if tokenizer.pad_token is None:  # decoders have none
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(name: str, classes: int, seed: int, pad_token_id: int | None = None) -> nn.Module:
    """The model; what the checkpoint lacks (the head) is N(0, 0.02) with zero biases, from `seed`.

    A pooler that is in the checkpoint is kept.
    """
    from transformers import AutoModelForSequenceClassification

    quiet()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            packaged_models.where(name),
            num_labels=classes,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,  # also where the checkpoint is in half precision
        )
    except (OSError, ValueError, ImportError) as error:
        raise Problem(_not_found(name, error)) from None
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    # The head is drawn anew also where the checkpoint has one of this size: seeds are to differ in it.
    fresh |= {key for key, _ in model.named_parameters() if key.split(".")[0] in ("classifier", "score")}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in fresh and parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * HEAD_STD)
            elif key in fresh and key.endswith("bias"):  # a normalisation's weight stays 1
                parameter.zero_()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    return model


def _not_found(name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
    return f"--model {name!r}: {reason}. It takes a folder, or a Hugging Face name and a connection to the hub"
