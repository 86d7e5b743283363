"""Models whose names are checked: plain ones and tied parameters."""

from torch import nn


def small():
    return nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.body = nn.Linear(3, 3)
        self.shared = self.body
        self.lm_head = nn.Linear(3, 4)
        self.lm_head.weight = self.embed.weight


TIED = "'lm_head.weight' is tied to 'embed.weight' and goes by that name"
