"""Every piece of Python in the README and in docs/ runs."""

import re
import types

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch import nn

from cwclip_kernels import ComponentClipper
from helpers import DEVICE
from libraries import LIBRARIES, stand_in
from pages import DOCS, PAGES, README, blocks_of

# Trainers' have models of their own: test_pages_of_trainers.py.
THEIRS = "Trainer", "LightningModule", "accelerator.prepare", "deepspeed", "integrations.fabric"
# Pages repeat each other here and there: each block once.
FOUND = dict.fromkeys(block for page in PAGES for block in blocks_of(page))
BLOCKS = [block for block in FOUND if not any(word in block for word in THEIRS)]
D = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.c_attn = nn.Module()
        self.attn.c_attn.weight = nn.Parameter(torch.randn(D, 3 * D) / 4)
        self.attn.c_attn.bias = nn.Parameter(torch.zeros(3 * D))
        self.attention = nn.Linear(D, D)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(2, D, D) / 4)

    def forward(self, x):
        q, k, v = (x @ self.attn.c_attn.weight + self.attn.c_attn.bias).split(D, -1)
        x = self.attention(torch.tanh(q * k + v))
        return x @ self.experts.up[0] + x @ self.experts.up[1]


class Model(nn.Module):
    """Names as in the examples; a call returns an object with a loss, as in transformers."""

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(D, 2)

    def forward(self, x):
        for block in self.h:
            x = x + block(x)
        return types.SimpleNamespace(loss=self.head(x).square().sum())


@pytest.fixture
def only_rank():
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_there_are_blocks():
    assert len(BLOCKS) >= 10


def anchors_of(page):
    """Of its headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [README, README.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or target.name == "api.md" or anchor in anchors_of(target), link


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of inductor
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, tmp_path, monkeypatch, request):
    if "plot_run" in BLOCKS[number]:
        pytest.importorskip("matplotlib")
    if "fully_shard" in BLOCKS[number]:
        request.getfixturevalue("only_rank")
    for library in LIBRARIES:
        if library in BLOCKS[number]:
            stand_in(library, monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = Model().to(DEVICE)
    x = torch.randn(3, D, device=DEVICE)
    model(x).loss.backward()
    names = {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loader": [{"x": torch.randn(3, D, device=DEVICE)} for _ in range(2)],
        "caps": torch.tensor(0.05, device=DEVICE),
        "clipper": ComponentClipper(model, 0.05),
        "ComponentClipper": ComponentClipper,
        "device": DEVICE,
        "x": x,
        "d": D,
        "accelerator": types.SimpleNamespace(
            sync_gradients=True, unscale_gradients=lambda: None, distributed_type=types.SimpleNamespace(value="NO")
        ),
    }
    before = [p.detach().clone() for p in model.parameters()]
    with torch._inductor.config.patch(compile_threads=1):  # leaves no processes behind
        exec(compile(BLOCKS[number], f"README.md or docs, block {number}", "exec"), names)
    if re.search(r"optimizer\.step|optimizer=optimizer|scaler\.step", BLOCKS[number]):
        after = [getattr(p, "_local_tensor", p) for p in model.parameters()]  # one rank holds all
        assert any(not torch.equal(p, b) for p, b in zip(after, before, strict=True)), "nothing learnt"
