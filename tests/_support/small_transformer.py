"""A small transformer and its input."""

import torch
from torch import nn


class Block(nn.Module):
    """Widths that no number of ranks divides, a fused projection, a scalar, a buffer-like frozen parameter."""

    def __init__(self, width=10, hidden=24):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return 2.0 * self.norm(x + self.down(torch.relu(self.up(q * k + v))))


class Model(nn.Module):
    def __init__(self, width=10, hidden=24):
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.layers = nn.ModuleList([Block(width, hidden) for _ in range(2)])
        self.head = nn.Linear(width, 3)
        self.double()  # so that a forward pass in another order of additions is no difference

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return torch.tanh(self.head(x))


def batches(number=4):
    return torch.randint(7, (number, 2, 4))
