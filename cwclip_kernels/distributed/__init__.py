"""Components whose elements lie on several ranks.

Read in this order:

    shards          which part of a parameter this rank holds, told without asking anyone
    groups          sets of ranks, and the few collectives that are asked of them
    consistency     set-up: whether ranks that share components mean the same by them
    reduction       power sums added up over a group, exactly, NaN included
    local           this rank's part of components and gradients
    reduction_plan  which sums are added up over which ranks; made once
    set_up          the former made, once ranks agree
    run             one call: measured here, added up over ranks, scaled here
"""
