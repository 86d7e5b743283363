"""Components whose elements lie on several ranks.

Read in this order:

    groups       sets of ranks, and the few collectives that are asked of them
    agreement    set-up: whether ranks that share components mean the same by them
    reduction    power sums added up over a group, exactly, NaN included
    share        what this rank holds
    spread       which sums are added up over which ranks; made once
    set_up       the former made, once ranks agree
    call         one call: measured here, added up over ranks, scaled here

What part of a parameter is here is told by ``cwclip_kernels.sharding``, without asking anyone.
"""
