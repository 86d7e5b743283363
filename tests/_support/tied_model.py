"""A small model with everything that a training loop meets, for tests of what happens in one."""

import torch
from torch import nn

from helpers import DEVICE, same_bits

CAP = 0.05


class Tied(nn.Module):
    """A language model in small: the embedding is the output layer, too; one parameter is never used."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, tokens):
        return (self.body(self.embedding(tokens)) + self.frozen) @ self.embedding.weight.T


def tied():
    return Tied().to(DEVICE)


def batch():
    return torch.randint(0, 9, (4, 5), device=DEVICE)


def loss_of(model, tokens):
    return model(tokens).square().sum()


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}


def same_parameters(a, b):
    return all(same_bits(p.detach(), q.detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True))
