"""Components whose elements lie on several ranks.

Read in this order:

    shards          which part of a parameter this rank holds
    groups          sets of ranks and their collectives
    elsewhere       models that other libraries have cut, and that are refused
    units           what FullyShardedDataParallel (FSDP1) says about its parameters
    reduction       power sums added up over ranks, exactly and with NaN
    local           what this rank holds of gradients
    partitions      gradients that an optimizer keeps in flat partitions
    reduction_plan  which sums are added up over which ranks
    set_up          ranks check that they agree, and make the plan
    run             one call: sums measured here and added up over ranks, gradients scaled here
"""
