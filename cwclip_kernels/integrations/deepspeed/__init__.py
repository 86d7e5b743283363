"""Clipping by component in DeepSpeed: ZeRO stages 1 to 3, its bf16 and fp16 optimizers, and none of them.

engine      which engines are served, and why others are not
optimizers  what is known of DeepSpeed's optimizers: where gradients lie, and when they are measured and scaled
clipping    what ``attach`` returns
"""

from .clipping import EngineClipping, attach

__all__ = ["EngineClipping", "attach"]
