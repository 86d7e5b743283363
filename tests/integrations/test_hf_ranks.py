"""transformers' Trainer on two ranks: DistributedDataParallel, FSDP 2, and started by ``accelerate launch``."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from cwclip_kernels import fused_component_clip_, thresholds
from helpers import same_bits
from ranks import on_ranks

pytest.importorskip("transformers")

from transformers import Trainer

from accelerate_models import launched
from cwclip_kernels.integrations.transformers import ComponentClipCallback
from hf import ClippingTrainer, arguments, encoder, examples, logged, plain_loop, total_norm, weights_of
from sharded_tensors import full

CAP = 0.05


def whole(accumulate=1):
    """What one process comes to with the batches of both ranks, and the norms on the way."""
    totals = []

    def clip(model):
        totals.append(total_norm(model).item())
        fused_component_clip_(model, CAP)

    return plain_loop(encoder().double(), clip, accumulate=accumulate, size=8), totals


def assert_is_the_whole(trainer, accumulate=1):
    expected, totals = whole(accumulate)
    assert trainer.state.global_step == len(totals)
    assert logged(trainer, "grad_norm") == pytest.approx(totals, rel=1e-9)
    ours = {name.removeprefix("module."): full(p.detach()) for name, p in trainer.model_wrapped.named_parameters()}
    for name, p in expected.named_parameters():
        torch.testing.assert_close(ours[name], p.detach(), rtol=1e-8, atol=1e-12)


def trainer_of(kind, folder, model, **changed):
    args = arguments(folder, **changed)
    if kind == "callback":
        args.max_grad_norm = 0.0
        return Trainer(model, args, train_dataset=examples(), callbacks=[ComponentClipCallback(CAP)])
    return ClippingTrainer(model, args, train_dataset=examples(), component_clipping={"max_norm": CAP})


@on_ranks(2)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_distributed_data_parallel(tmp_path, kind, accumulate):
    with launched():
        trainer = trainer_of(kind, tmp_path, encoder().double(), gradient_accumulation_steps=accumulate)
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        clipping = [trainer, *trainer.callback_handler.callbacks]
        (clip,) = [c.last_clip for c in clipping if hasattr(c, "last_clip")]
        assert "classifier.bias" in clip.names
        assert_is_the_whole(trainer, accumulate)


# Older Trainers wrap such a model in DistributedDataParallel, which refuses it, whoever clips.
NEEDS_LOADING = pytest.mark.skipif(
    importlib.util.find_spec("transformers.distributed.mixin") is None,
    reason="this version of transformers doesn't shard models when it loads them",
)


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Trainer has Accelerate shard on accelerators alone; a model that transformers has sharded it takes as it is.
    model.config.distributed_config = SimpleNamespace(dp_replicate_size=1)
    model._is_distributed_loading_by_transformers = True
    return model


@NEEDS_LOADING
@on_ranks(2)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_fully_shard(tmp_path, kind, accumulate):
    with launched():
        model = sharded(encoder().double())
        trainer = trainer_of(kind, tmp_path, model, gradient_accumulation_steps=accumulate)
        trainer.train()
        assert type(trainer.model_wrapped).__name__.startswith("FSDP")
        assert_is_the_whole(trainer, accumulate)


def tensor_parallel(model):
    """As a ``tp_plan`` leaves it: DTensors on one mesh, and plain tensors that all ranks have alike."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.bert.encoder.layer:
        plan = {"intermediate.dense": ColwiseParallel(), "output.dense": RowwiseParallel()}
        parallelize_module(layer, mesh, plan)
    model.config.distributed_config = SimpleNamespace(dp_replicate_size=1)
    model._is_distributed_loading_by_transformers = True
    return model


@NEEDS_LOADING
@on_ranks(2)
def test_tensor_parallelism(tmp_path):
    """Accelerate has it on accelerators alone, so each batch comes twice: both ranks see the same ones."""
    data = examples()
    twice = [one for start in range(0, len(data), 4) for one in 2 * data[start : start + 4]]
    with launched():
        trainer = ClippingTrainer(
            tensor_parallel(encoder().double()),
            arguments(tmp_path),
            train_dataset=twice,
            component_clipping={"max_norm": CAP},
        )
        trainer.train()
    totals = []

    def clip(model):
        totals.append(total_norm(model).item())
        fused_component_clip_(model, CAP)

    expected = plain_loop(encoder().double(), clip)
    assert logged(trainer, "grad_norm") == pytest.approx(totals, rel=1e-9)
    ours = {name: full(p.detach()) for name, p in trainer.model.named_parameters()}
    for name, p in expected.named_parameters():
        torch.testing.assert_close(ours[name], p.detach(), rtol=1e-8, atol=1e-12)


@on_ranks(2)
def test_a_resumed_run_is_the_whole_one_to_the_bit(tmp_path):
    def run(folder, resume=None, **changed):
        args = arguments(folder, save_strategy="steps", save_steps=2, **changed)
        given = {"max_norm": thresholds.EMA(warmup_steps=1)}
        trainer = ClippingTrainer(encoder(), args, train_dataset=examples(), component_clipping=given)
        trainer.train(resume_from_checkpoint=resume)
        return [*weights_of(trainer.model), given["max_norm"].state_dict()["tensors"]["gamma"]]

    with launched():
        expected = run(tmp_path / "a")
        run(tmp_path / "b", max_steps=2)
        assert all(map(same_bits, run(tmp_path / "b", resume=True), expected))


def free_port():
    """Older versions of Accelerate wait for ever at port 0."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_accelerate_launch(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # pytest's: with _support, and the package
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
    ]
    # Of several processes on CPUs it knows with MPI alone; what it starts goes by the Trainer's use_cpu.
    launch += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    script = tmp_path / "train.py"
    script.write_text(
        "import json, os, sys\n"
        "from hf import ClippingTrainer, arguments, encoder, examples\n"
        "args = arguments(sys.argv[1], max_grad_norm=0.05)\n"
        "trainer = ClippingTrainer(encoder().double(), args, train_dataset=examples())\n"
        "trainer.train()\n"
        "told = [args.world_size, trainer.state.log_history]\n"
        "if args.process_index == 0:\n"
        "    with open(sys.argv[1] + '/told.json', 'w') as file:\n"
        "        file.write(json.dumps(told))\n"
        # gloo's threads may outlive their group, and a process that ends with them aborts (torch 2.13).
        "os._exit(0)\n"
    )
    command = [*launch, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    size, log = json.loads((tmp_path / "told.json").read_text())
    assert size == 2
    assert [entry["grad_norm"] for entry in log if "loss" in entry] == pytest.approx(whole()[1], rel=1e-9)
