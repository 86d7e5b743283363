"""All that is known of DeepSpeed's private parts; nothing outside of this folder uses them.

Clipping looks at what it uses when it is attached: attributes, and which methods ``step`` calls with which arguments.
Where they aren't as in the versions that were tried (``base.TRIED``), that is an error.

    base          what an optimizer of DeepSpeed's is for us
    zero          ZeRO stages 1, 2 and 3
    whole         bfloat16 and float16 without ZeRO
    engine        which engines are served, and why others are not
    experts       components of experts, of which each rank has others
    own_clipping  DeepSpeed's own clipping by one norm, which ends
    checkpoints   what is saved with an engine's checkpoints
"""
