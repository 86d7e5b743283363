"""What the CUDA kernels' order of work should cost in DRAM traffic: a prediction, made before any GPU is asked.

    python benchmarks/l2_model.py --sets bert-base,roberta-large --l2 20 30 45

Plays the queue of csrc/cuda/kernels.cuh: blocks that take tiles by ticket, hand a tile's sum in one turn later,
and scale what is listed before they measure more (form 2) or when all is measured (form 1). A block looks at
the list some time during the turn before: at its end, the best case, or at its beginning, the worst. The cache
is fully associative, drops what was used least recently, and works in whole tiles; every block has the same
share of the memory's rate. What lies in L2 for other reasons is left out by giving less than all of it.

Traffic is in N, the bytes of the gradients, for all clipped: 2 is the least (read once, written once), 3 what
two passes over more than the cache cost.
"""

import argparse
import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence

from options import names
from shapes import SETS

TILE_BYTES = 32 * 1024  # csrc/cuda/program.h
BLOCKS = 132 * 3  # an H100's or H200's, csrc/cuda/kernels.cuh
POLL = 2048  # how long a block that finds nothing to do waits, in bytes of its share of the memory's rate
NONE = -1  # no tile
MB = 1 << 20


class Cache:
    """Tiles that are in L2, the least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self.tiles: OrderedDict[int, int] = OrderedDict()

    def touch(self, tile: int, size: int) -> bool:
        """Whether it is there; it is afterwards."""
        hit = tile in self.tiles
        if hit:
            self.tiles.move_to_end(tile)
        else:
            self.tiles[tile] = size
            self.used += size
            while self.used > self.capacity:
                self.used -= self.tiles.popitem(last=False)[1]
        return hit


def tiles_of(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Component and bytes of every tile, each gradient a component."""
    return [
        (component, min(TILE_BYTES, size - start))
        for component, size in enumerate(sizes)
        for start in range(0, size, TILE_BYTES)
    ]


def traffic(sizes: Sequence[int], form: int, capacity: int, *, late: bool = True, blocks: int = BLOCKS) -> float:
    """DRAM bytes of one call with everything clipped, over the gradients' bytes.

    Args:
        sizes: bytes of each gradient.
        form: 1 or 2.
        capacity: bytes of L2.
        late: whether blocks look for their next job at the end of a turn, rather than at its beginning.
        blocks: that run.
    """
    tiles, moved = tiles_of(sizes), 0
    queue, cache = Queue(tiles, len(sizes), form), Cache(capacity)
    # A block's turns: when the next one begins, its job if that has been found, and a tile to hand in the sum of.
    turns = [(0, block, None if late else queue.next(), NONE) for block in range(blocks)]
    heapq.heapify(turns)
    while turns:
        now, block, job, measured = heapq.heappop(turns)
        if late:
            job = queue.next()
        cost, sum_of = POLL, NONE
        if job is not None:
            work, tile = job
            size = tiles[tile][1]
            hit = cache.touch(tile, size)
            cost = size * ((work == "scale") + (not hit))
            moved += cost
            sum_of = tile if work == "sum" else NONE
        if measured != NONE:
            queue.hand_in(measured)
        if sum_of != NONE or not queue.all_done:
            heapq.heappush(turns, (now + max(cost, POLL), block, None if late else queue.next(), sum_of))
    return moved / sum(sizes)


class Queue:
    """Who works on what: tickets for sums, and the list of what is to be scaled."""

    def __init__(self, tiles: Sequence[tuple[int, int]], components: int, form: int) -> None:
        self.tiles, self.form = tiles, form
        self.missing = [0] * components
        self.members: list[list[int]] = [[] for _ in range(components)]
        for index, (component, _) in enumerate(tiles):
            self.missing[component] += 1
            self.members[component].append(index)
        self.listed: list[int] = []
        self.measured = self.scaled = self.handed_in = 0

    def next(self) -> tuple[str, int] | None:
        """The next job, or None if there is nothing to do for now."""
        if self.scaled < len(self.listed) and (self.form == 2 or self.all_handed_in):
            self.scaled += 1
            # Mode::scale takes the list from its end.
            return "scale", self.listed[self.scaled - 1 if self.form == 2 else -self.scaled]
        if self.measured < len(self.tiles):
            self.measured += 1
            return "sum", self.measured - 1
        return None

    def hand_in(self, tile: int) -> None:
        """One sum more; the last of a component lists its tiles, what was read last to be scaled first."""
        component = self.tiles[tile][0]
        self.handed_in += 1
        self.missing[component] -= 1
        if self.missing[component] == 0:
            self.listed.extend(reversed(self.members[component]) if self.form == 2 else self.members[component])

    @property
    def all_handed_in(self) -> bool:
        return self.handed_in == len(self.tiles)

    @property
    def all_done(self) -> bool:
        return self.scaled == len(self.tiles)


def main() -> None:
    """Prints a row for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=names(SETS), default=("bert-base", "roberta-large", "llama3-8b"))
    parser.add_argument("--halves", action="store_true", help="bfloat16 gradients for all sets")
    parser.add_argument("--l2", type=int, nargs="+", default=[20, 30, 45], help="MB of L2 that hold gradients")
    options = parser.parse_args()
    print(f"{'DRAM bytes over N, all clipped':<32}", *(f"{f'{mb} MB of L2':^21}" for mb in options.l2), sep="")
    print(f"{'':<32}", *(f"{'form 1    form 2':^21}" for _ in options.l2), sep="")
    for name in options.sets:
        width = 2 if options.halves else SETS[name].dtype.itemsize
        sizes = [math.prod(shape) * width for _, shape in SETS[name].shapes]
        cells = []
        for mb in options.l2:
            best, worst = (traffic(sizes, 2, mb * MB, late=late) for late in (True, False))
            cells.append(f"{traffic(sizes, 1, mb * MB):.2f}   {best:.2f} - {worst:.2f}")
        print(f"{name + (', bfloat16' if width == 2 else ', float32'):<32}", *(f"{c:^21}" for c in cells), sep="")


if __name__ == "__main__":
    main()
