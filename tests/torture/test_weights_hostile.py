"""Weight files by the thousand that someone has bent, through every reader of weights."""

import faulthandler
import hashlib
import io
import json
import resource
import shutil
import sys
import time
import traceback
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from ijepa_fast.errors import CheckpointError, UsageError
from ijepa_fast.weights import Shape, export, load_encoder, network_of, start_weights
from tests.trainer import tiny
from tests.trainer.damage import bend, mutate
from tests.weights.test_weights import _pretrained, _released

# of tiny.RECIPE
SHAPE = Shape(image_size=(32, 32), patch_size=8, width=32, depth=1, heads=2, mlp_hidden=128)
pytestmark = pytest.mark.filterwarnings("ignore")


def _bent_tensors(tensors, rng):
    """One tensor of another dtype, shape, name or with other values."""
    tensors = dict(tensors)
    # a file is read in any order
    keys = sorted(tensors)
    key, other = (keys[int(n)] for n in rng.integers(0, len(keys), 2))
    value = tensors.pop(key)
    dtypes = [torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64]
    dtypes += [torch.complex64, torch.float8_e4m3fn, torch.uint8]
    changed = (
        lambda: {key: value.to(dtypes[int(rng.integers(len(dtypes)))])},
        lambda: {key: value[None]},
        lambda: {key: value.flatten()},
        lambda: {key: value[:0]},
        lambda: {key: value.mT.contiguous() if value.ndim > 1 else value[1:].clone()},
        lambda: {key: torch.full_like(value, float(rng.choice([np.nan, np.inf, 3e38, 0])))},
        lambda: {other: value.clone()},
        dict,
        lambda: {f"module.{key}": value},
        lambda: {
            key: value,
            key.replace("blocks.0", f"blocks.{10 ** int(rng.integers(1, 9))}"): value.clone(),
        },
        lambda: {key + "\n\x1b": value},
    )
    return tensors | changed[int(rng.integers(len(changed)))]()


def _bent_file(name, data, rng):
    if rng.integers(4) == 0:
        return mutate(data, rng)
    if name.endswith(".json"):
        return json.dumps(bend(json.loads(data), rng)).encode()
    if name.endswith(".safetensors"):
        if rng.integers(2):
            return save(_bent_tensors(load(data), rng))
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(bend(json.loads(data[8 : 8 + length]), rng)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    tree = torch.load(io.BytesIO(data), weights_only=True)
    name = ("encoder", "target_encoder", "predictor")[int(rng.integers(3))]
    if rng.integers(3):
        tree[name] = _bent_tensors(tree[name], rng)
    else:
        tree = bend(tree, rng)
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=bool(rng.integers(2)))
    return buffer.getvalue()


def _made(tmp_path):
    """A data set, and weights of every kind: path -> its files."""
    data, root = tiny.write_images(tmp_path / "data"), tmp_path / "weights"
    for layout in ("hf", "timm", "torch"):
        export.export(_pretrained(SHAPE), root / layout, format=layout)
        (root / layout / "README.md").unlink()
    shutil.copytree(root / "hf", root / "pieces")
    (root / "pieces" / "model.safetensors").rename(root / "pieces" / "piece.safetensors")
    (root / "pieces" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"embeddings.position_embeddings": "piece.safetensors"}})
    )
    _released(root / "released.pth", SHAPE)
    assert tiny.run(data, tmp_path / "run", max_steps=1) == 0
    shutil.copytree(next((tmp_path / "run" / "checkpoints").glob("step-*")), root / "checkpoint")
    return data, {
        path: {f.name: f.read_bytes() for f in (path.iterdir() if path.is_dir() else [path])}
        for path in sorted(root.iterdir())
    }


def test_mutated_weights(tmp_path, pytestconfig, capsys):
    """Refused in one line by every reader, or a whole encoder of finite numbers from each."""
    mutations = pytestconfig.getoption("--mutations")
    data, kinds = _made(tmp_path)
    config = tiny.config(data, tmp_path / "new")
    state = network_of(SHAPE).state_dict()
    shapes = {f"{n}.{k}": v.shape for n in ("encoder", "target_encoder") for k, v in state.items()}
    predictor = load((kinds[tmp_path / "weights" / "checkpoint"])["state.safetensors"])
    shapes |= {k: v.shape for k, v in predictor.items() if k.startswith("predictor.")}
    counts: Counter[tuple[str, str]] = Counter()
    faults, slowest = [], 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(mutations):
        rng = np.random.default_rng(seed)
        path = list(kinds)[seed % len(kinds)]
        names = sorted(kinds[path].keys() - {"manifest.json"})
        name = names[int(rng.integers(len(names)))]
        target = path / name if path.is_dir() else path
        target.write_bytes(_bent_file(name, kinds[path][name], rng))
        if manifest := kinds[path].get("manifest.json"):
            digest, size = hashlib.sha256(target.read_bytes()).hexdigest(), target.stat().st_size
            told = {**json.loads(manifest), name: {"bytes": size, "sha256": digest}}
            (path / "manifest.json").write_text(json.dumps(told))
        out = tmp_path / "exported"
        layout = ("hf", "timm", "torch")[seed % 3]
        readers: dict[str, tuple[Any, ...]] = {
            "export": (export.main, [str(path), str(out), "--format", layout]),
            "evaluate": (load_encoder, path),
            "init": (start_weights, str(path), config, shapes),
        }
        faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
        refusals: dict[str, str] = {}
        read: dict[str, dict[str, torch.Tensor]] = {}
        for reader, (call, *arguments) in readers.items():
            started, refusal = time.monotonic(), ""
            try:
                got = call(*arguments)
                printed = capsys.readouterr().err
                if reader == "export" and got:
                    refusal = printed
                elif reader == "init":
                    read[reader] = got
                else:
                    encoder = load_encoder(out) if reader == "export" else got
                    read[reader] = encoder.network.state_dict()
                assert all(value.isfinite().all() for value in read.get(reader, {}).values())
            except (UsageError, CheckpointError) as error:
                refusal = f"error: {error}\n"
            except BaseException:
                faults.append((seed, path.name, name, reader, traceback.format_exc()[-700:]))
                continue
            slowest = max(slowest, time.monotonic() - started)
            refusals[reader] = refusal[:300]
            counts[reader, "refused" if refusal else "read"] += 1
            if refusal and (
                refusal.count("\n") != 1 or len(refusal) > 20_000 or not refusal[:-1].isprintable()
            ):
                faults.append((seed, path.name, name, reader, refusal[:700]))
        one, two = read.get("export", {}), read.get("evaluate", {})
        if one.keys() != two.keys() or any(not torch.equal(one[k], two[k]) for k in one):
            faults.append((seed, path.name, name, "export and evaluate differ", refusals))
        shutil.rmtree(out, ignore_errors=True)
        for each, whole in kinds[path].items():
            (path / each if path.is_dir() else path).write_bytes(whole)
    faulthandler.cancel_dump_traceback_later()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with capsys.disabled():
        print(
            f"TORTURE weights: {mutations} mutations, {dict(counts)}, slowest {slowest:.2f} s, "
            f"memory grew by {grown:.0f} MiB, {len(faults)} faults"
        )
        for fault in faults:
            print(*fault)
    assert not faults
