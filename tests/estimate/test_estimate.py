"""The arithmetic of `estimate` against what steps really keep and compute."""

import json
import os
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ijepa_fast import model
from ijepa_fast.config import BatchConfig, Config, DataConfig, MaskConfig, ModelConfig, OptimConfig
from ijepa_fast.config.presets import preset
from ijepa_fast.estimate import Costs, Rows, device_batch, estimate, report
from ijepa_fast.fast import FastStep, attention, make_mesh
from ijepa_fast.fast import step as fast_step
from ijepa_fast.masks import sample_masks
from ijepa_fast.model import attend, build_models
from ijepa_fast.ranks import distributed
from ijepa_fast.ranks.distributed import BUCKET_ELEMENTS
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import StepValues
from ijepa_fast.state.checkpoint import Snapshot
from tests.trainer import tiny
from tests.trainer.flash_on_cpu import flash_on_cpu

BATCH = 8
VALUES = StepValues(lr=1e-3, weight_decay=0.1, momentum=0.9)


def _config(
    path="fast",
    memory="none",
    precision="float32",
    residual="float32",
    group=8,
    contexts=1,
    crop=224,
    **dims,
):
    dims = {"width": 384, "depth": 4, "predictor_width": 192, "predictor_depth": 2, **dims}
    return Config(
        path=path,
        memory=memory,
        model=ModelConfig(name="vit_small", **dims),
        masks=MaskConfig(truncation_group=group, num_contexts=contexts, min_keep=4),
        optim=OptimConfig(precision=precision, residual=residual),
        batch=BatchConfig(global_=64),
        data=DataConfig(crop=crop),
    )


def _small(**settings):
    """For what does not depend on sizes: CPUs are slow in bfloat16."""
    dims = {"width": 96, "depth": 3, "predictor_width": 48, "predictor_depth": 3}
    return _config(**dims, crop=112, **settings)


def _step(config, mesh=None):
    generator = torch.Generator().manual_seed(0)
    networks = build_models(config.model, config.data.crop_size, generator)
    options = {"mean": config.data.mean, "std": config.data.std}
    if config.path == "reference":
        return ReferenceStep(*networks, config.optim, **options)
    return FastStep(*networks, config.optim, memory=config.memory, mesh=mesh, **options)


def _masks(config, step=0, begin=0):
    positions = np.arange(begin, begin + BATCH)
    return sample_masks(config.masks, grid=config.grid, seed=0, step=step, positions=positions)


def _batch(config, step=0, begin=0):
    height, width = config.data.crop_size
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(
        0, 256, (BATCH, height, width, 3), dtype=torch.uint8, generator=generator
    )
    return images, _masks(config, step, begin)


def _rows(config, masks):
    (rows,) = Rows.of(masks, config.grid[0] * config.grid[1], BATCH)
    return rows


def _size(tensors):
    """Bytes of the memory behind tensors, shared memory once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# --- activations ---------------------------------------------------------------------------------


class _Flash(torch.autograd.Function):
    """Attention that keeps what flash attention keeps on CUDA. On CPUs, attention in bfloat16 runs
    in float32 and keeps copies.
    """

    @staticmethod
    def forward(ctx, q, k, v, attend):
        out = attend(q.float(), k.float(), v.float()).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1]))
        return out


def _flash_padded(q, k, v, valid):
    out = _Flash.apply(q, k, v, lambda q, k, v: attend(q, k, v, valid))
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@contextmanager
def _flash():
    """Both paths attend as on CUDA."""
    varlen = attention.BACKENDS["varlen"]
    chosen = attention.Attention(varlen, varlen, "here")
    with (
        flash_on_cpu(),
        mock.patch.object(fast_step, "choose_attention", return_value=chosen),
        mock.patch.object(model, "attend", _flash_padded),
    ):
        yield


class _Forward(Exception):
    """The forward pass is over."""


@contextmanager
def _until_backward():
    def stop(*_):
        raise _Forward

    with mock.patch.object(torch.Tensor, "backward", stop), pytest.raises(_Forward):
        yield


def _kept(config, number=0, begin=0):
    """Bytes that autograd keeps for the backward pass, but for weights and inputs; and masks."""
    half = config.optim.precision == "bfloat16"
    with _flash() if half else nullcontext():
        training = _step(config)
        images, masks = _batch(config, number, begin)
        prepared = training.prepare(masks)
        inputs = [images, prepared.context_index] if config.path == "fast" else vars(prepared)
        known = [images, *(inputs.values() if isinstance(inputs, dict) else inputs)]
        for network in (training.encoder, training.predictor, training.target_encoder):
            known += [*network.parameters(), *network.buffers()]
        known += [rounded for _, rounded in getattr(training, "copies", [])]
        addresses = {t.untyped_storage().data_ptr() for t in known if isinstance(t, torch.Tensor)}
        found = []

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in addresses:
                found.append(tensor)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            _until_backward(),
        ):
            training.accumulate(images, prepared, 1000)
    kept = _size(found)
    if half and config.path == "reference":
        # the weights that autocast rounds are part of `fixed_bytes`
        matrices = [
            p
            for network in (training.encoder, training.predictor)
            for p in network.parameters()
            if p.ndim in (2, 4)
        ]
        kept -= 2 * sum(p.numel() for p in matrices)
    return kept, masks


KEPT = [
    *({"memory": memory, "precision": "bfloat16"} for memory in ("none", "full")),
    *({"memory": memory, "precision": "float32"} for memory in ("none", "full")),
    {"memory": "none", "precision": "bfloat16", "group": 1},
    {"memory": "none", "precision": "float32", "group": 1},
    {"memory": "none", "precision": "bfloat16", "residual": "bfloat16"},
    {"memory": "full", "precision": "bfloat16", "residual": "bfloat16"},
    *({"memory": memory, "predictor_depth": 1} for memory in ("none", "full")),
    {"memory": "none", "predictor_depth": 1, "group": 1},
    {"memory": "none", "depth": 2, "predictor_depth": 4},
    {"memory": "none", "width": 768, "heads": 12, "depth": 2, "predictor_width": 384},
    {"memory": "none", "contexts": 2, "group": 1},
    {"path": "reference", "precision": "float32"},
    {"path": "reference", "precision": "bfloat16", "group": 1},
    {"path": "reference", "contexts": 2, "group": 1},
]


def _name(settings):
    return "-".join(str(value) for value in settings.values())


@pytest.mark.parametrize("settings", KEPT, ids=_name)
def test_kept_for_the_backward_pass(settings):
    config = _config(**settings)
    kept, masks = _kept(config)
    got = BATCH * estimate(config, steps=[_rows(config, masks)]).activation_bytes
    assert got == pytest.approx(kept, rel=0.05)


# torch 2.11 says so of every profile
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.parametrize(("path", "group"), [("fast", 1), ("reference", 1)])
def test_the_largest_batch_is_what_counts(path, group):
    """Of 200 steps, of 128 images each."""
    config = _config(path=path, group=group)
    costs = Costs(config)
    largest = max(
        (costs.activations(_rows(config, masks)), step, begin)
        for step in range(200)
        for begin in range(0, 128, BATCH)
        for masks in [_masks(config, step, begin)]
    )
    kept, _ = _kept(config, *largest[1:])
    assert BATCH * estimate(config, batch=BATCH).activation_bytes == pytest.approx(kept, rel=0.05)
    # packed, a large batch is nearer to the mean
    if path == "fast":
        assert estimate(config, batch=128).activation_bytes < 0.97 * largest[0]


def _peak(config):
    """Bytes at the height of a step, in float32, above what was there before it; and masks."""
    training = _step(config)
    images, masks = _batch(config)
    prepared = training.prepare(masks)
    training.accumulate(images, prepared, 1000)
    training.optimizer.zero_grad(set_to_none=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        training.accumulate(images, prepared, 1000)
    return found, masks


@pytest.mark.parametrize(
    "settings", [{"memory": "none"}, {"memory": "full"}, {"path": "reference"}], ids=_name
)
def test_the_height_of_a_step(settings, tmp_path):
    config = _config(**settings)
    found, masks = _peak(config)
    found.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    peak = np.cumsum([e["args"]["Bytes"] for e in memory]).max()
    costs, rows = Costs(config), _rows(config, masks)
    # CPUs have no graph, and the pixels were there before
    got = costs.activations(rows) + costs.working(rows, copies=0, graph=False)
    assert BATCH * got == pytest.approx(peak, rel=0.1)


def test_what_the_graph_and_the_pixels_add():
    config = _config(precision="bfloat16")
    costs, rows = Costs(config), _rows(config, _batch(config)[1])
    without = costs.working(rows, copies=0, graph=False)
    assert costs.working(rows, copies=3, graph=False) - without == 3 * 224 * 224 * 3
    # two residual streams, queries, keys, values, attention's output, and the MLP twice
    graph = 196 * (2 * 4 * 384 + 4 * 2 * 384 + 2 * 2 * 1536)
    assert costs.working(rows, copies=0, graph=True) - without == graph
    # of which its outputs count as allocated: residual and normed rows, keys and values
    need = estimate(config)
    assert need.memory(64) - need.allocated(64) == 64 * (graph - 196 * 384 * (4 + 3 * 2))
    alone = estimate(replace(config, path="reference"))
    assert alone.memory(64) == alone.allocated(64)


# GiB that max_memory_allocated showed over 8 different steps: NVIDIA H200, torch 2.11.0+cu130,
# batch 128, bfloat16, published masks, one micro-step, 2026-11-27; of the reference path alone, the
# fast path's blocks were others then
ON_H200 = {"vith14_in1k": 37.874, "vitb16_in1k": 8.574}


@pytest.mark.parametrize("recipe", ON_H200)
def test_what_a_gpu_allocated(recipe):
    config = replace(preset(recipe), path="reference")
    rows = []
    for step in range(8):
        masks = sample_masks(
            config.masks, grid=config.grid, seed=0, step=step, positions=np.arange(128)
        )
        rows += Rows.of(masks, config.grid[0] * config.grid[1], 128)
    got = estimate(config, batch=128, steps=rows).allocated(128) / 2**30
    assert got == pytest.approx(ON_H200[recipe], rel=0.05)


# --- weights -------------------------------------------------------------------------------------


def _state_bytes(training):
    """Local bytes of weights, gradients, moments, averages, targets, copies and tables."""
    tensors = [p.grad for p in training.parameters]
    for network in (training.encoder, training.predictor, training.target_encoder):
        tensors += [*network.parameters(), *network.buffers()]
    for state in training.optimizer.state.values():
        tensors += [v for v in state.values() if isinstance(v, torch.Tensor) and v.ndim]
    tensors += [rounded for _, rounded in getattr(training, "copies", [])]
    return _size([t.to_local() if hasattr(t, "to_local") else t for t in tensors])


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_state_unsharded(path, precision):
    config = _small(path=path, precision=precision)
    training = _step(config)
    images, masks = _batch(config)
    prepared = training.prepare(masks)
    training.accumulate(images, prepared, 1000)
    training.update(VALUES)
    training.accumulate(images, prepared, 1000)
    need = estimate(config)
    assert need.gradient_bytes == 4 * sum(p.numel() for p in training.parameters)
    got = need.fixed_bytes + need.gradient_bytes
    if (path, precision) == ("reference", "bfloat16"):
        rounded = [
            *model.matrix_layers(training.encoder),
            *model.matrix_layers(training.predictor),
        ]
        got -= 2 * sum(p.numel() for layer in rounded for p in layer.parameters())
    assert got == pytest.approx(_state_bytes(training), rel=1e-3)
    # the first micro-step begins without gradients, the others with all of them
    assert need.accumulation_bytes == need.gradient_bytes
    assert need.memory(BATCH, 2) - need.memory(BATCH) == need.gradient_bytes
    # the average of the encoder is computed into a copy
    copy = 4 * need.encoder_parameters if path == "reference" else 0
    assert need.update_bytes == copy
    assert need.memory(0) == need.fixed_bytes + need.gradient_bytes + copy


def _fsdp_params(training):
    for network in (training.encoder, training.predictor):
        for module in network.modules():
            if isinstance(module, FSDPModule):
                group: Any = module._get_fsdp_state()._fsdp_param_group
                yield from group.fsdp_params if group else ()


def _in_rank(environment, folder, precision):
    os.environ.update(environment)
    torch.set_num_threads(1)
    ranks = distributed.start("cpu")
    try:
        config = _small(precision=precision)
        training = _step(config, make_mesh("full", ranks.device, 2))
        images, masks = _batch(config)
        prepared = training.prepare(masks)
        gathered, original = 0, torch.Tensor.backward

        def height(self, *rest):
            nonlocal gathered
            gathered = sum(
                p.unsharded_param.numel() * p.unsharded_param.element_size()
                for p in _fsdp_params(training)
                if p.sharded_state.name == "UNSHARDED"
            )
            original(self, *rest)

        with mock.patch.object(torch.Tensor, "backward", height):
            training.accumulate(images, prepared, 1000)
        sharded = _state_bytes(training)
        training.update(VALUES)
        training.accumulate(images, prepared, 1000, last=False)
        sizes = []
        for p in _fsdp_params(training):
            whole = p.unsharded_accumulated_grad
            whole = p.unsharded_param.grad if whole is None else whole
            sizes.append(whole.numel() * whole.element_size())
        (folder / f"{ranks.rank}.json").write_text(
            json.dumps({"gathered": gathered, "sharded": sharded, "whole": sum(sizes)})
        )
    finally:
        distributed.stop()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_state_sharded(tmp_path, precision):
    children = [
        tiny._FORKS.Process(target=_in_rank, args=(environment, tmp_path, precision))
        for environment in tiny.rank_environments(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        child.kill()
        child.join()
    config = _small(precision=precision)
    need = estimate(config, world=2)
    trained = need.encoder_parameters + need.predictor_parameters
    size = 2 if precision == "bfloat16" else 4
    block = 12 * 96**2 + 13 * 96
    passing = size * trained + (size + 4) * block
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        whole = need.fixed_bytes + need.gradient_bytes - passing
        assert whole == pytest.approx(found["sharded"], rel=2e-2)
        # there when the backward pass began (it needs neither biases nor the patch embedding, and
        # an activation may look like a weight): no block was resharded
        assert found["gathered"] == pytest.approx(size * trained, rel=0.1)
        # what several micro-steps add up
        assert need.accumulation_bytes == pytest.approx(found["whole"], rel=1e-2)
    assert need.memory(64, 2) - need.memory(64, 1) == need.accumulation_bytes


def test_over_how_many_ranks():
    def fixed(shard, world, local_world=None, path="fast"):
        config = replace(_config(precision="bfloat16", path=path), shard=shard)
        return estimate(config, world=world, local_world=local_world)

    alone = fixed("auto", 1)
    assert alone == fixed("none", 1)
    parts = [fixed("auto", n).fixed_bytes for n in (2, 4, 8)]
    # 20 bytes a weight are split, or a little less
    split = 2 * (parts[0] - parts[1]) * 2
    assert split == pytest.approx(
        12 * (alone.encoder_parameters + alone.predictor_parameters) + 6 * alone.encoder_parameters,
        rel=0.01,
    )
    assert parts[1] - parts[2] == pytest.approx(split / 8)
    assert fixed("full", 8).fixed_bytes == parts[2]
    assert fixed("hybrid", 8, 4).fixed_bytes == parts[1]
    for other in (fixed("none", 8), fixed("auto", 8, path="reference")):
        trained = other.encoder_parameters + other.predictor_parameters
        assert other.update_bytes == 4 * min(trained, BUCKET_ELEMENTS)
        assert other.accumulation_bytes == other.gradient_bytes == 4 * trained
    assert fixed("none", 8).fixed_bytes == alone.fixed_bytes
    # a run in CUDA graphs has memory of their own
    assert fixed("full", 8).working_bytes < alone.working_bytes


# --- the batch -----------------------------------------------------------------------------------


def test_auto_takes_the_largest_that_fits():
    config = _config(precision="bfloat16", group=1)
    for wanted in (1, 4, 32):
        exact = estimate(config, batch=wanted).memory(wanted, 64 // wanted) / 0.8
        assert device_batch(config, world=1, memory=int(exact) + 1) == wanted
        # one byte less
        if wanted > 1:
            assert device_batch(config, world=1, memory=int(exact) - 2) == wanted // 2
    with pytest.raises(ValueError, match="got one image that needs"):
        device_batch(config, world=1, memory=int(estimate(config, batch=1).memory(1) / 0.8) - 2)
    assert device_batch(config, world=1, memory=2**40) == 64
    # with less kept, more fits
    deep = _config(precision="bfloat16", depth=12, predictor_depth=6)
    memory = int(estimate(deep, batch=32).memory(32, 2) / 0.8) + 1
    sizes = [
        device_batch(replace(deep, memory=m), world=1, memory=memory) for m in ("none", "full")
    ]
    assert sizes == [32, 64]


def test_sharded_accumulation_needs_more():
    """The same device batch fits where it is the whole share, and not where it accumulates."""
    config = replace(_config(precision="bfloat16", group=1), batch=BatchConfig(global_=16))
    memory = int(estimate(config, batch=8, world=2).memory(8, 1) / 0.8) + 1
    assert device_batch(config, world=2, memory=memory) == 8
    more = replace(config, batch=BatchConfig(global_=32))
    assert device_batch(more, world=2, memory=memory) < 8


# --- FLOPs ---------------------------------------------------------------------------------------


def _explicit(q, k, v):
    """(..., L, E): two products, which FLOP counters see."""
    return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def _explicit_packed(q, k, v, pair, grad):
    leaves = tuple(t.detach().requires_grad_(grad) for t in (q, k, v))
    parts = []
    with torch.set_grad_enabled(grad):
        for s in range(pair.queries.count):
            own, seen = (slice(*side.cu[s : s + 2].tolist()) for side in (pair.queries, pair.keys))
            one = [t[rows].transpose(0, 1) for t, rows in zip(leaves, (own, seen, seen))]  # noqa: B905
            parts.append(_explicit(*one).transpose(0, 1))
        out = torch.cat(parts)
    return out.detach(), (leaves, out)


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "reference"},
        {},
        {"group": 1},
        {"predictor_depth": 1},
        {"depth": 1, "predictor_depth": 3},
    ],
    ids=_name,
)
def test_flops_are_those_of_a_step(settings):
    config = _config(**settings)
    explicit = attention.Backend("sdpa", _explicit_packed, attention._sdpa_backward)
    chosen = attention.Attention(explicit, explicit, "here")
    with mock.patch.object(fast_step, "choose_attention", return_value=chosen):
        training = _step(config)
    images, masks = _batch(config)
    need = estimate(config, steps=[_rows(config, masks)])
    prepared = training.prepare(masks)
    with (
        mock.patch.object(model, "attend", lambda q, k, v, valid: _explicit(q, k, v)),
        FlopCounterMode(display=False) as counter,
    ):
        training.accumulate(images, prepared, 1000)
    counted = counter.get_total_flops() / BATCH
    if config.path == "reference":
        assert need.flops == need.executed_flops == pytest.approx(counted, rel=0.02)
        return
    # mask tokens at every position of the grid, once a batch
    width = config.model.predictor_width
    once = 3 * 2 * 196 * 3 * width**2 / BATCH
    # sequences are not all as long as the mean, and attention grows with the square
    assert need.executed_flops + once == pytest.approx(counted, rel=0.005 if not settings else 0.02)
    assert need.flops > 1.03 * counted
    # utilisation is that of the recipe on both paths
    other = replace(config, path="reference")
    assert estimate(other, steps=[_rows(config, masks)]).flops == need.flops


# --- what is printed -----------------------------------------------------------------------------


def test_the_report():
    config = replace(preset("vits16"), memory="full")
    need = estimate(config, batch=256, world=8)
    text = " ".join(report(config, 8, torch.device("cpu"), 80 * 2**30, None).split())
    left_out = 100 * (1 - need.executed_flops / need.flops)
    assert 2 < left_out < 30
    state = 4 * (4 * need.encoder_parameters + 3 * need.predictor_parameters)
    for words in (
        "fast, memory full, bfloat16, shard over 8 ranks",
        f"of which the fast path leaves out {left_out:.0f} %",
        f"{need.memory(256) / 2**30:.2f} GiB a rank",
        f"{need.fixed_bytes / 2**30:.2f} weights and optimiser",
        f"256 images x {need.image_bytes / 2**20:.1f} MiB",
        f"({need.activation_bytes / 2**20:.1f} for the backward pass)",
        f"{state / 2**30:.2f} GiB each",
        f"3 + 1 of them {4 * state / 2**30:.2f} GiB",
    ):
        assert words in text
    plain = replace(config, memory="none", path="reference")
    text = report(plain, 8, torch.device("cpu"), 80 * 2**30, None)
    assert "reference, bfloat16, shard none" in text
    assert "leaves out" not in text


def test_the_size_of_a_checkpoint():
    """What --dry-run says is what the copy takes, position tables aside."""
    config = preset("demo")
    networks = build_models(config.model, config.data.crop_size)
    training = FastStep(*networks, config.optim, mean=(0.5,) * 3, std=(0.2,) * 3)
    need = estimate(config)
    said = 4 * (4 * need.encoder_parameters + 3 * need.predictor_parameters)
    assert Snapshot(training, keep=True).nbytes == pytest.approx(said, rel=0.02)
    assert Snapshot(training, keep=False).nbytes == 0
