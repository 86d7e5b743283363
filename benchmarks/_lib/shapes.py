"""Shapes of real models' parameters, written as code from their hyperparameters: no weights, no downloads.

Names and order are those of ``named_parameters()`` in Hugging Face transformers 5 (peft for the adapters),
tied weights once, so that grouping by name behaves as it does in a training script.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class ShapeSet:
    """The parameters of one model, by shape.

    Attributes:
        name: what ``--sets`` takes.
        description: what the model is, and which head it has.
        shapes: (parameter name, shape) in the model's own order.
        dtype: the dtype its gradients usually have.
        misaligned: its gradients are views into one buffer, none at a multiple of 16 bytes.
        opt_in: too large for "all": measured when asked for by name.
    """

    name: str
    description: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: torch.dtype = torch.float32
    misaligned: bool = False
    opt_in: bool = False

    @property
    def elements(self) -> int:
        """Parameters of the model."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of one set of gradients, in ``dtype`` or the set's own."""
        return self.elements * (dtype or self.dtype).itemsize


def _affine(name: str, out_features: int, in_features: int) -> Shapes:
    yield f"{name}.weight", (out_features, in_features)
    yield f"{name}.bias", (out_features,)


def _layer_norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _encoder(prefix: str, layers: int, width: int) -> Shapes:
    """The layers that BERT and RoBERTa have in common."""
    for index in range(layers):
        layer = f"{prefix}encoder.layer.{index}"
        for projection in ("query", "key", "value"):
            yield from _affine(f"{layer}.attention.self.{projection}", width, width)
        yield from _affine(f"{layer}.attention.output.dense", width, width)
        yield from _layer_norm(f"{layer}.attention.output.LayerNorm", width)
        yield from _affine(f"{layer}.intermediate.dense", 4 * width, width)
        yield from _affine(f"{layer}.output.dense", width, 4 * width)
        yield from _layer_norm(f"{layer}.output.LayerNorm", width)


def _bert(layers: int, width: int) -> Shapes:
    """BertForSequenceClassification with two labels: what the paper fine-tunes."""
    yield "bert.embeddings.word_embeddings.weight", (30522, width)
    yield "bert.embeddings.position_embeddings.weight", (512, width)
    yield "bert.embeddings.token_type_embeddings.weight", (2, width)
    yield from _layer_norm("bert.embeddings.LayerNorm", width)
    yield from _encoder("bert.", layers, width)
    yield from _affine("bert.pooler.dense", width, width)
    yield from _affine("classifier", 2, width)


def _roberta_large(layers: int = 24, width: int = 1024) -> Shapes:
    """RobertaModel(add_pooling_layer=False)."""
    yield "embeddings.word_embeddings.weight", (50265, width)
    yield "embeddings.token_type_embeddings.weight", (1, width)
    yield from _layer_norm("embeddings.LayerNorm", width)
    yield "embeddings.position_embeddings.weight", (514, width)
    yield from _encoder("", layers, width)


def _gpt2(layers: int = 12, width: int = 768) -> Shapes:
    """GPT2LMHeadModel. Its Conv1D keeps weights as [in, out], the transpose of a Linear."""
    yield "transformer.wte.weight", (50257, width)
    yield "transformer.wpe.weight", (1024, width)
    for index in range(layers):
        block = f"transformer.h.{index}"
        yield from _layer_norm(f"{block}.ln_1", width)
        yield f"{block}.attn.c_attn.weight", (width, 3 * width)
        yield f"{block}.attn.c_attn.bias", (3 * width,)
        yield f"{block}.attn.c_proj.weight", (width, width)
        yield f"{block}.attn.c_proj.bias", (width,)
        yield from _layer_norm(f"{block}.ln_2", width)
        yield f"{block}.mlp.c_fc.weight", (width, 4 * width)
        yield f"{block}.mlp.c_fc.bias", (4 * width,)
        yield f"{block}.mlp.c_proj.weight", (4 * width, width)
        yield f"{block}.mlp.c_proj.bias", (width,)
    yield from _layer_norm("transformer.ln_f", width)


def _vit_base(layers: int = 12, width: int = 768, patch: int = 16, image: int = 224) -> Shapes:
    """ViTForImageClassification; one position more than there are patches, for the class token."""
    yield "vit.embeddings.cls_token", (1, 1, width)
    yield "vit.embeddings.position_embeddings", (1, (image // patch) ** 2 + 1, width)
    yield "vit.embeddings.patch_embeddings.projection.weight", (width, 3, patch, patch)
    yield "vit.embeddings.patch_embeddings.projection.bias", (width,)
    for index in range(layers):
        layer = f"vit.layers.{index}"
        for projection in "qkvo":
            yield from _affine(f"{layer}.attention.{projection}_proj", width, width)
        yield from _layer_norm(f"{layer}.layernorm_before", width)
        yield from _layer_norm(f"{layer}.layernorm_after", width)
        yield from _affine(f"{layer}.mlp.fc1", 4 * width, width)
        yield from _affine(f"{layer}.mlp.fc2", width, 4 * width)
    yield from _layer_norm("vit.layernorm", width)
    yield from _affine("classifier", 1000, width)


def _t5_base(layers: int = 12, width: int = 768, hidden: int = 3072, heads: int = 12) -> Shapes:
    """T5ForConditionalGeneration: input embeddings and output head are one tensor, nothing has a bias."""
    yield "shared.weight", (32128, width)
    for stack in ("encoder", "decoder"):
        for index in range(layers):
            attentions = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
            for sublayer, attention in enumerate(attentions):
                layer = f"{stack}.block.{index}.layer.{sublayer}"
                for projection in "qkvo":
                    yield f"{layer}.{attention}.{projection}.weight", (width, width)
                # The other layers share the first one's table of relative positions.
                if index == 0 and attention == "SelfAttention":
                    yield f"{layer}.{attention}.relative_attention_bias.weight", (32, heads)
                yield f"{layer}.layer_norm.weight", (width,)
            layer = f"{stack}.block.{index}.layer.{len(attentions)}"
            yield f"{layer}.DenseReluDense.wi.weight", (hidden, width)
            yield f"{layer}.DenseReluDense.wo.weight", (width, hidden)
            yield f"{layer}.layer_norm.weight", (width,)
        yield f"{stack}.final_layer_norm.weight", (width,)


def _llama3_8b(layers: int = 32, by: int = 1) -> Shapes:
    """LlamaForCausalLM; eight key-value heads of 128 serve 32 query heads. ``by`` divides all widths."""
    vocabulary, width, hidden, key_values = (size // by for size in (128256, 4096, 14336, 1024))
    yield "model.embed_tokens.weight", (vocabulary, width)
    for index in range(layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.self_attn.q_proj.weight", (width, width)
        yield f"{layer}.self_attn.k_proj.weight", (key_values, width)
        yield f"{layer}.self_attn.v_proj.weight", (key_values, width)
        yield f"{layer}.self_attn.o_proj.weight", (width, width)
        yield f"{layer}.mlp.gate_proj.weight", (hidden, width)
        yield f"{layer}.mlp.up_proj.weight", (hidden, width)
        yield f"{layer}.mlp.down_proj.weight", (width, hidden)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def _qwen3_30b_a3b(layers: int = 48, by: int = 1, experts: int = 128, head: int = 128) -> Shapes:
    """Qwen3MoeForCausalLM, whose experts are stacked. ``by`` divides all widths but that of a head's norms."""
    width, hidden = 2048 // by, 768 // by
    vocabulary = 151936 // by // 16 * 16  # so that a few ranks can share it
    queries, key_values = 32 * head // by, 4 * head // by
    yield "model.embed_tokens.weight", (vocabulary, width)
    for index in range(layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.self_attn.q_proj.weight", (queries, width)
        yield f"{layer}.self_attn.k_proj.weight", (key_values, width)
        yield f"{layer}.self_attn.v_proj.weight", (key_values, width)
        yield f"{layer}.self_attn.o_proj.weight", (width, queries)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield f"{layer}.mlp.experts.gate_up_proj", (experts, 2 * hidden, width)
        yield f"{layer}.mlp.experts.down_proj", (experts, width, hidden)
        yield f"{layer}.mlp.gate.weight", (experts, width)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def _lora_pegasus_large(layers: int = 16, width: int = 1024, rank: int = 8) -> Shapes:
    """Every attention projection adapted: 16 encoder layers x 4, 16 decoder layers x 8, two factors each."""
    for stack in ("encoder", "decoder"):
        attentions = ("self_attn",) if stack == "encoder" else ("self_attn", "encoder_attn")
        for index in range(layers):
            for attention in attentions:
                for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
                    adapted = f"base_model.model.model.{stack}.layers.{index}.{attention}.{projection}"
                    yield f"{adapted}.lora_A.default.weight", (rank, width)
                    yield f"{adapted}.lora_B.default.weight", (width, rank)


def _tiny(count: int, size: int) -> Shapes:
    for index in range(count):
        yield f"blocks.{index}.scale", (size,)


def _uneven(count: int, largest: int = 4099) -> Shapes:
    """Sizes that are spread evenly over 1..largest and follow no pattern: steps of another prime."""
    for index in range(count):
        yield f"blocks.{index}.weight", (1 + 1009 * index % largest,)


_ALL = (
    ShapeSet("bert-base", "BERT-base, pooler and 2-label head", tuple(_bert(12, 768))),
    ShapeSet("bert-large", "BERT-large, pooler and 2-label head: the paper's model", tuple(_bert(24, 1024))),
    ShapeSet("roberta-large", "RoBERTa-large, encoder without pooler or head", tuple(_roberta_large())),
    ShapeSet("gpt2", "GPT-2 124M, output head tied to the embeddings", tuple(_gpt2())),
    ShapeSet("vit-b16", "ViT-B/16 at 224 x 224, 1000 classes", tuple(_vit_base())),
    ShapeSet("t5-base", "T5-base, output head tied to the embeddings", tuple(_t5_base())),
    ShapeSet("minilm-l6", "MiniLM-L6-H384, pooler and 2-label head", tuple(_bert(6, 384))),
    ShapeSet("llama3-8b", "Llama-3-8B, output head of its own", tuple(_llama3_8b()), torch.bfloat16),
    ShapeSet("lora-384", "rank-8 LoRA on all attention of PEGASUS-large", tuple(_lora_pegasus_large())),
    ShapeSet("tiny-20000", "20,000 tensors of 64 elements: overhead alone", tuple(_tiny(20_000, 64))),
    ShapeSet("views-2000", "2,000 misaligned views of 1 to 4,099 elements", tuple(_uneven(2000)), misaligned=True),
    # Past what 32-bit indices reach, and no multiple of anything that a kernel may step by.
    ShapeSet("huge", "one tensor past 2^31 elements", (("weight", (2**31 + 4099,)),), torch.bfloat16, opt_in=True),
)

SETS: dict[str, ShapeSet] = {shape_set.name: shape_set for shape_set in _ALL}


def narrow_bert_base(layers: int, by: int) -> ShapeSet:
    """BERT-base with its names and another width."""
    return ShapeSet("bert-base", f"BERT-base, widths / {by}", tuple(_bert(layers, 768 // by)))


def narrow_llama3_8b(layers: int, by: int) -> ShapeSet:
    """Llama-3-8B with its names and another width: what ranks ask of each other doesn't depend on that."""
    return ShapeSet("llama3-8b", f"Llama-3-8B, widths / {by}", tuple(_llama3_8b(layers, by)))


def narrow_qwen3_30b_a3b(layers: int, by: int) -> ShapeSet:
    """Qwen3-30B-A3B, 128 experts a layer, likewise."""
    return ShapeSet("qwen3-30b-a3b", f"Qwen3-30B-A3B, widths / {by}", tuple(_qwen3_30b_a3b(layers, by)))
