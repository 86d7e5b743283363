"""Trains a small transformer, sharded by FSDP2, with each component's gradient clipped to its own norm.

    torchrun --nproc-per-node 2 examples/fsdp2_train.py    # on GPUs if there are any, otherwise on the CPU

It learns to write docstrings of the Python standard library, character by character. The loop is plain PyTorch;
`clipper.clip_()` replaces `clip_grad_norm_`, and its norms are those of whole parameters.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import docstrings
from cwclip_kernels import ComponentClipper

CHARACTERS = "".join(map(chr, range(32, 127)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, length: int, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(CHARACTERS), width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS))

    def forward(self, text: Tensor, following: Tensor) -> Tensor:
        x = self.characters(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), following.flatten())


def load_text() -> Tensor:
    """All docstrings in a row, as indices of characters."""
    text = " ".join(example.text for example in docstrings.collect())
    return torch.tensor([CHARACTERS.index(c) for c in text if c in CHARACTERS])


def train(args: Namespace, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    torch.manual_seed(0)  # the same weights on every rank
    model = Transformer(args.length).to(device)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if args.bf16 else None, reduce_dtype=torch.float32)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    clipper = ComponentClipper(model, args.max_norm)  # after fully_shard and on every rank, like the optimizer
    text = load_text()
    draw = torch.Generator().manual_seed(dist.get_rank())  # other text on every rank
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(text) - args.length, (args.batch_size, 1), generator=draw)
        batch = text[starts + torch.arange(args.length + 1)].to(device)
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        result = clipper.clip_()  # one all-reduce, with one number per component
        optimizer.step()
        optimizer.zero_grad()

        if step == 1 or step % args.every == 0:
            dist.all_reduce(loss := loss.detach())  # only for the printed loss
            total, share = clipper.total_norm(result.norms), result.clipped.float().mean()
            if dist.get_rank() == 0:
                print(
                    f"step {step:4}  loss {loss / dist.get_world_size():.3f}  "
                    f"total norm {total:.3f}  {share:.0%} of {len(clipper.names)} components clipped",
                    flush=True,
                )
    if args.checkpoint:
        dcp.save({"model": model.state_dict()}, checkpoint_id=args.checkpoint)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between two lines (10)")
    parser.add_argument("--batch-size", type=int, default=16, help="of each process (16)")
    parser.add_argument("--length", type=int, default=64, help="of a text, in characters (64)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-norm", type=float, default=0.05, help="cap of each component's norm (0.05)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--checkpoint", help="folder for a torch.distributed.checkpoint at the end")
    args = parser.parse_args()

    device = torch.device("cpu")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        device = torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
    dist.init_process_group(device_id=None if device.type == "cpu" else device)  # gloo, nccl or what the device has
    train(args, device)
    dist.barrier()
    dist.destroy_process_group()
    if (
        device.type == "cpu"
    ):  # gloo's threads may outlive their group; a process that ends with them aborts (torch 2.13)
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
