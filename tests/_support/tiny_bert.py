"""An untrained BERT and its tokenizer, for examples that train one on text."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import tokenizers
import transformers


def save_tiny_bert(folder: Path, texts: Iterable[str], words: int, width: int, **config: object) -> Path:
    """Two layers of this width, and a tokenizer of so many of the texts' commonest words."""
    known = Counter(word for text in texts for word in text.lower().split() if word.isalpha())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for word, _ in known.most_common(words))]
    tokenizer = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(vocabulary)})
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    ).save_pretrained(folder)
    settings = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        **config,
    )
    transformers.BertForSequenceClassification(settings).save_pretrained(folder)
    return folder
