"""Clipping by component in DeepSpeed: ZeRO stages 1 to 3, its bf16 and fp16 optimizers, and none of them.

clipping    ``attach``, and what it returns
internals   all that is known of DeepSpeed's private parts
"""

from .clipping import EngineClipping, attach

__all__ = ["EngineClipping", "attach"]
