"""What becomes of a test on ranks that skips itself there."""

import pytest
import torch.distributed as dist

from ranks import on_ranks


@on_ranks(2)
def skips_itself(first):
    if dist.get_rank() >= first:
        pytest.skip("for want of something")


@pytest.mark.parametrize("ranks", [2])
def test_on_all_ranks_it_is_skipped(ranks, request):
    with pytest.raises(pytest.skip.Exception, match="for want of something"):
        skips_itself(ranks=ranks, request=request, first=0)


@pytest.mark.parametrize("ranks", [2])
def test_on_some_alone_it_fails(ranks, request):
    with pytest.raises(pytest.fail.Exception, match="rank 1: for want of something"):
        skips_itself(ranks=ranks, request=request, first=1)


@pytest.mark.parametrize("ranks", [2])
def test_on_none_it_passes(ranks, request):
    skips_itself(ranks=ranks, request=request, first=2)
