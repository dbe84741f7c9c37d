"""Parity: the recording passes, each wrong entry fails, and so does each known mistake."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ijepa_fast import model, reference
from ijepa_fast.config import OptimConfig
from ijepa_fast.masks import Masks
from ijepa_fast.model import Attention, Mlp, Predictor, VisionTransformer
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import Schedules, StepValues
from ijepa_fast.verify import parity
from ijepa_fast.verify.comparison import key_bias_bounds
from ijepa_fast.verify.parity import LIMITS, main, replay
from tests.trainer.recordings import CASE, GOLDEN, OTHERS, failures, record


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # the networks are so small that threads only get in each other's way
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Two steps of a tiny network: cheap enough to replay for every entry that can be wrong."""
    return record(tmp_path_factory.mktemp("parity") / "small.safetensors")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _changed(path: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    tensors, metadata = _read(path)
    change(tensors)
    save_file(tensors, folder / "changed.safetensors", metadata=metadata)
    return str(folder / "changed.safetensors")


# --- the recording -------------------------------------------------------------------------------


def test_the_recording_passes_and_prints_a_table(capsys):
    assert main([str(GOLDEN)]) == 0
    out, err = capsys.readouterr()
    assert not err
    lines = out.splitlines()
    assert "FAIL" not in out
    assert lines[-1].startswith("PASS: reference path, float32, ")
    assert lines[-1].endswith("comparisons, 0 failed, 0 tensors unused")
    for name in ("step0.prediction", "step0.latent_target"):
        assert any(line.startswith(name) and line.endswith("ok") for line in lines)
    for step in range(8):
        for value in ("loss", "lr", "wd", "momentum"):
            assert any(line.startswith(f"step{step}.{value} ") for line in lines)
    # 28 + 31 tensors, and the key third of each of the 4 qkv biases; the target encoder's 28 + 2
    assert "gradient: 59 tensors, worst:" in lines
    assert "key gradient: 4 tensors, worst:" in lines
    assert "final weights: 87 tensors, worst:" in lines
    assert "final key bias: 6 tensors, worst:" in lines
    assert "target movement: 28 tensors, worst:" in lines


def test_every_tensor_of_the_recording_has_its_row():
    tensors, _ = _read(GOLDEN)
    report = replay(GOLDEN)
    assert report.ok
    names = {row.name for row in report.rows}
    compared = {n for n in tensors if n.startswith(("step0.grad.", "final."))}
    assert compared | {"step0.prediction", "step0.latent_target"} <= names
    assert {f"step{j}.{v}" for j in range(8) for v in ("loss", "lr", "wd", "momentum")} <= names


def test_json_holds_every_comparison(capsys):
    assert main([str(GOLDEN), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["path"], result["dtype"]) == (True, "reference", "float32")
    assert result["unused"] == []
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["step7.loss"]["kind"] == "loss"
    assert rows["step7.loss"]["limit"] == 1e-6
    assert rows["step0.grad.predictor.mask_token"]["limit"] == 5e-6
    assert rows["final.encoder.norm.weight"]["limit"] == 1e-5
    assert all(row["ok"] and row["error"] <= row["limit"] for row in rows.values())


def test_float32_limits_are_the_agreed_ones():
    limits = LIMITS["float32"]
    assert (limits.loss, limits.schedule, limits.forward) == (1e-6, 1e-9, 1e-6)
    assert (limits.gradient, limits.weights) == (5e-6, 1e-5)
    assert (limits.key_gradient, limits.target_movement) == (1e-6, 1e-3)


def test_bfloat16_passes_its_own_limits_and_not_those_of_float32(capsys):
    assert main([str(GOLDEN), "--dtype", "bfloat16", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    prediction = next(row for row in rows if row["name"] == "step0.prediction")
    assert prediction["error"] > 1e-4


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--attention", "varlen"], "attention must be auto or sdpa with path reference"),
        (["--memory", "full"], "memory must be none with path reference"),
    ],
)
def test_options_of_the_fast_path_are_refused(option, message, capsys):
    assert main([str(GOLDEN), *option]) == 2
    out, err = capsys.readouterr()
    assert not out
    value = option[1]
    assert err == f"error: {message}, got {value!r}\n"


def test_a_device_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(GOLDEN), "--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err == "error: device must be auto or cpu here, got cuda: no CUDA device\n"


# --- recordings of another implementation --------------------------------------------------------


@pytest.mark.parametrize(("changes", "lengths"), OTHERS.values(), ids=OTHERS)
def test_recordings_of_a_per_sequence_float64_loop_pass(changes, lengths, tmp_path, capsys):
    context, target = lengths
    path = record(tmp_path / "other.safetensors", context=context, target=target, **changes)
    assert main([str(path)]) == 0, capsys.readouterr().out


# --- each kind of entry --------------------------------------------------------------------------


def _scale(name: str, share: float) -> Callable[[dict[str, Tensor]], None]:
    """Changes a tensor by a share of its norm."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = (tensors[name].double() * (1 + share)).to(tensors[name].dtype)

    return change


def _add(name: str, index: int, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[index] += value

    return change


def _scale_one(name: str, index: int, share: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[index] *= 1 + share

    return change


QKV = "encoder.blocks.0.attn.qkv.bias"
# tensor, which row fails; the change is given as a share of the limit
ENTRIES: list[tuple[str, Callable[[float], Callable[[dict[str, Tensor]], None]], str, str]] = [
    ("loss", lambda x: _scale("loss", 1e-6 * x), "loss", "step1.loss"),
    ("lr", lambda x: _scale_one("lr", 1, 1e-9 * x), "schedule", "step1.lr"),
    ("wd", lambda x: _scale_one("wd", 0, 1e-9 * x), "schedule", "step0.wd"),
    ("momentum", lambda x: _scale_one("momentum", 1, -1e-9 * x), "schedule", "step1.momentum"),
    (
        "prediction",
        lambda x: _scale("step0.prediction", 1e-6 * x),
        "forward",
        "step0.prediction",
    ),
    (
        "latent target",
        lambda x: _scale("step0.latent_target", 1e-6 * x),
        "forward",
        "step0.latent_target",
    ),
    *(
        (
            f"gradient of {name}",
            partial(lambda n, x: _scale(n, 5e-6 * x), f"step0.grad.{name}"),
            "gradient",
            f"step0.grad.{name}",
        )
        for name in ("encoder.patch_embed.proj.weight", "predictor.mask_token")
    ),
    (
        "gradient of a query bias",
        lambda x: _scale(f"step0.grad.{QKV}", 5e-6 * x),
        "gradient",
        f"step0.grad.{QKV}",
    ),
    (
        "gradient of a key bias",
        lambda x: _add(f"step0.grad.{QKV}", 24, 1e-6 * x),
        "key gradient",
        f"step0.grad.{QKV} (key third, absolute)",
    ),
    *(
        (
            f"final {name}",
            partial(lambda n, x: _scale(n, 1e-5 * x), f"final.{name}"),
            "final weights",
            f"final.{name}",
        )
        for name in ("encoder.blocks.0.mlp.fc1.weight", "predictor.predictor_proj.weight")
    ),
    *(
        (
            f"final key bias of the {name}",
            partial(lambda n, bound, x: _add(n, 24, bound * x), f"final.{name}", bound),
            "final key bias",
            f"final.{name} (key third, absolute)",
        )
        # twice the learning rates, 4.7e-4 and 7.3e-4; of the average momentum 0.2 and 0.27 are left
        for name, bound in ((QKV, 2.40e-3), (f"target_{QKV}", 1.95e-3))
    ),
]


@pytest.mark.parametrize(
    ("change", "kind", "row"), [e[1:] for e in ENTRIES], ids=[e[0] for e in ENTRIES]
)
def test_an_entry_just_beyond_its_limit_fails_alone(change, kind, row, small, tmp_path, capsys):
    path = _changed(small, tmp_path, change(1.5))
    assert main([path]) == 1
    out = capsys.readouterr().out
    assert "FAIL: reference path" in out
    assert any(line.startswith(f"{row} ") and line.endswith("FAIL") for line in out.splitlines())
    failed = failures(path)
    assert failed.keys() == {kind}
    assert row in failed[kind]
    assert len(failed[kind]) == (2 if kind == "loss" else 1)
    # a third of the limit passes, float32 noise included: the limit is where it should be
    assert main([_changed(small, tmp_path, change(1 / 3))]) == 0


def test_target_weights_are_held_to_their_own_movement(small, tmp_path):
    # a limit on the weights alone would not notice how far an EMA that moves little has come
    name = "final.target_encoder.norm.weight"
    tensors, _ = _read(small)
    initial = tensors["init.encoder.norm.weight"]
    moved = tensors[name] - initial
    assert 2e-3 * moved.norm() / initial.norm() < 1e-5

    def lag(values: dict[str, Tensor]) -> None:
        values[name] = initial + moved * 0.998

    path = _changed(small, tmp_path, lag)
    assert failures(path) == {"target movement": {f"{name} (of its movement)"}}
    assert main([path]) == 1
    path = _changed(small, tmp_path, _scale(name, 1.5e-5))
    assert failures(path)["final weights"] == {name}


# --- key biases ----------------------------------------------------------------------------------

STEPS = [StepValues(lr=1e-3 * (1 + t), weight_decay=0.1, momentum=0.5 + t / 40) for t in range(20)]


def _adamw(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """A bias from 0 and its average after AdamW's steps, in float64."""
    bias = nn.Parameter(torch.zeros(gradients.shape[1:], dtype=torch.float64))
    average = torch.zeros_like(bias)
    optimizer = torch.optim.AdamW([bias], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for values, gradient in zip(STEPS, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = values.lr
        bias.grad = gradient.clone()
        optimizer.step()
        average = values.momentum * average + (1 - values.momentum) * bias.detach()
    return bias.detach(), average


def test_noise_stays_within_the_bound_of_key_biases_and_reaches_it():
    bounds = key_bias_bounds(STEPS, OptimConfig())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((2, 20, 10_000), generator=generator, dtype=torch.float64)
    # of any size, also far below and above Adam's eps
    noise *= 10 ** torch.linspace(-14, 2, 10_000, dtype=torch.float64)
    # all one way, and growing so that a step is the longest; the other run goes the other way
    growing = (0.999 / 0.9) ** torch.arange(20.0, dtype=torch.float64)
    noise[:, :, 0] = torch.stack([growing, -growing])
    noise[:, :, 1] = torch.stack([growing, -growing]).sign()
    for bound, first, second in zip(bounds, *map(_adamw, noise), strict=True):
        apart = (first - second).abs()
        assert apart.max() <= bound
        assert apart[0] > 0.9 * bound
        assert apart[1] > 0.9 * bound


def test_the_longest_step_is_exactly_the_bound():
    """In the last of 20 steps, all learning rates before it 0."""
    last = [replace(values, lr=0.0) for values in STEPS[:-1]] + STEPS[-1:]
    bound, averaged = key_bias_bounds(last, OptimConfig())
    assert averaged == pytest.approx((1 - STEPS[-1].momentum) * bound)
    bias = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.AdamW([bias], betas=(0.9, 0.999), eps=0.0, weight_decay=0.0)
    for t, values in enumerate(last):
        optimizer.param_groups[0]["lr"] = values.lr
        bias.grad = torch.tensor((0.999 / 0.9) ** -(19 - t), dtype=torch.float64)
        optimizer.step()
    assert 2 * abs(float(bias.detach())) == pytest.approx(bound, rel=1e-9)


def _key_thirds(step: ReferenceStep) -> list[Tensor]:
    modules = [*step.encoder.modules(), *step.predictor.modules()]
    return [m.qkv.bias.detach().chunk(3)[1] for m in modules if isinstance(m, Attention)]


def _key_bias_from_zero(patch: pytest.MonkeyPatch) -> None:
    start = ReferenceStep.__init__

    def forgetful(self: ReferenceStep, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        for third in _key_thirds(self):
            third.zero_()

    patch.setattr(ReferenceStep, "__init__", forgetful)


def _key_bias_moves(rates: float, patch: pytest.MonkeyPatch) -> None:
    update = ReferenceStep.update

    def longer(self: ReferenceStep, values: StepValues) -> None:
        update(self, values)
        for third in _key_thirds(self):
            third.add_(rates * values.lr)

    patch.setattr(ReferenceStep, "update", longer)


@pytest.mark.parametrize(
    ("make", "fails"),
    [
        (_key_bias_from_zero, True),
        (partial(_key_bias_moves, 2.2), True),
        # as far as noise may go, each run its way
        (partial(_key_bias_moves, 1.9), False),
    ],
    ids=["from zero", "longer steps", "noise"],
)
def test_a_wrong_key_bias_fails_and_noise_does_not(make, fails, monkeypatch):
    make(monkeypatch)
    failed = failures(GOLDEN)
    assert failed.keys() == ({"final key bias"} if fails else set())
    trained = [f"{n}.attn.qkv.bias" for n in ("encoder.blocks.1", "predictor.predictor_blocks.1")]
    for name in trained if fails else ():
        assert f"final.{name} (key third, absolute)" in failed["final key bias"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "wd",
        "step0.prediction",
        "step0.grad.encoder.norm.bias",
        f"step0.grad.{QKV}",
        "final.predictor.mask_token",
        "final.target_encoder.norm.weight",
    ],
)
def test_a_recorded_nan_or_infinity_fails(value, name, small, tmp_path):
    assert main([_changed(small, tmp_path, _add(name, 0, value))]) == 1


@pytest.mark.parametrize(
    "name",
    ["step0.prediction", "step0.grad.predictor.mask_token", "final.encoder.norm.weight"],
)
def test_another_shape_fails(name, small, tmp_path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][..., :-1].contiguous()

    def repeat(tensors: dict[str, Tensor]) -> None:
        # would broadcast
        tensors[name] = tensors[name][None].clone()

    assert main([_changed(small, tmp_path, change)]) == 1
    assert main([_changed(small, tmp_path, repeat)]) == 1


@pytest.mark.parametrize(
    "name",
    [
        "init.encoder.blocks.0.mlp.fc1.weight",
        "init.encoder.norm.bias",
        "init.predictor.mask_token",
        "init.encoder.pos_embed",
        "init.predictor.predictor_pos_embed",
    ],
)
def test_other_initial_weights_fail(name, small, tmp_path):
    assert main([_changed(small, tmp_path, _add(name, 3, 1e-3))]) == 1


@pytest.mark.parametrize("step", [0, 1])
def test_another_image_fails(step, small, tmp_path):
    def change(tensors: dict[str, Tensor]) -> None:
        # inside the first target block, so that it matters for sure
        patch = int(tensors[f"step{step}.target0"][0, 0])
        tensors[f"step{step}.images_uint8"][0, 1, 4 * (patch // 4), 4 * (patch % 4)] ^= 128

    assert main([_changed(small, tmp_path, change)]) == 1


@pytest.mark.parametrize("kind", ["context0", "target0", "target1"])
@pytest.mark.parametrize("step", [0, 1])
def test_another_mask_fails(step, kind, small, tmp_path):
    def change(tensors: dict[str, Tensor]) -> None:
        mask = tensors[f"step{step}.{kind}"]
        mask[1, 0] = next(p for p in range(16) if p not in mask[1].tolist())

    assert main([_changed(small, tmp_path, change)]) == 1


def test_an_unknown_tensor_fails_and_is_named(small, tmp_path, capsys):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["step0.surprise"] = torch.zeros(1)

    path = _changed(small, tmp_path, change)
    assert main([path]) == 1
    out = capsys.readouterr().out
    assert "never used: step0.surprise" in out
    assert out.splitlines()[-1].endswith(" 0 failed, 1 tensors unused")
    assert main([path, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["unused"]) == (False, ["step0.surprise"])


def test_steps_that_are_not_replayed_fail(small, tmp_path, capsys):
    tensors, _ = _read(small)
    for name in ("loss", "lr", "wd", "momentum"):
        tensors[name] = tensors[name][:1].clone()
    path = tmp_path / "short.safetensors"
    save_file(tensors, path, metadata={"case": json.dumps({**CASE, "steps": 1})})
    assert main([str(path)]) == 1
    assert "never used: step1.images_uint8" in capsys.readouterr().out


# --- unusable files: exit code 2 and one line ----------------------------------------------------


def _unusable(path: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([path]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "momentum",
        "step0.prediction",
        "step1.images_uint8",
        "step0.images_uint8",
        "step1.context0",
        "step0.target1",
        "step0.grad.encoder.norm.bias",
        "final.target_encoder.norm.bias",
        "init.encoder.norm.bias",
        "init.encoder.pos_embed",
        "init.predictor.mask_token",
    ],
)
def test_a_missing_tensor_is_named(name, small, tmp_path, capsys):
    path = _changed(small, tmp_path, lambda tensors: tensors.pop(name))
    assert name in _unusable(path, capsys)


def test_initial_weights_that_do_not_fit_are_named(small, tmp_path, capsys):
    def wider(tensors: dict[str, Tensor]) -> None:
        tensors["init.encoder.norm.bias"] = torch.zeros(25)

    def more(tensors: dict[str, Tensor]) -> None:
        tensors["init.predictor.cls_token"] = torch.zeros(1, 1, 8)

    assert "init.encoder.norm.bias" in _unusable(_changed(small, tmp_path, wider), capsys)
    assert "init.predictor.cls_token" in _unusable(_changed(small, tmp_path, more), capsys)


def test_values_of_every_step_are_needed(small, tmp_path, capsys):
    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors["wd"] = tensors["wd"][:1].clone()

    assert "'wd' of every step (2), got 1" in _unusable(_changed(small, tmp_path, shorten), capsys)


@pytest.mark.parametrize("key", ["img", "nenc", "ema", "warmup", "loss", "steps"])
def test_an_incomplete_case_is_named(key, small, tmp_path, capsys):
    tensors, _ = _read(small)
    case = {k: v for k, v in CASE.items() if k != key}
    path = tmp_path / "incomplete.safetensors"
    save_file(tensors, path, metadata={"case": json.dumps(case)})
    assert f"'{key}'" in _unusable(str(path), capsys)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "FILE must be a readable safetensors file"),
        (b"", "FILE must be a readable safetensors file"),
        (b"not a safetensors file at all", "FILE must be a readable safetensors file"),
    ],
)
def test_an_unreadable_file_is_named(content, part, tmp_path, capsys):
    path = tmp_path / "file.safetensors"
    if content is not None:
        path.write_bytes(content)
    message = _unusable(str(path), capsys)
    assert part in message
    assert str(path) in message


def test_a_folder_is_not_a_file(tmp_path, capsys):
    assert str(tmp_path) in _unusable(str(tmp_path), capsys)


def test_a_file_without_case_is_named(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(1)}, path)
    assert "'case'" in _unusable(str(path), capsys)


def test_another_norm_epsilon_is_refused(small, tmp_path, capsys):
    tensors, _ = _read(small)
    path = tmp_path / "eps.safetensors"
    save_file(tensors, path, metadata={"case": json.dumps({**CASE, "norm_eps": 1e-5})})
    assert "norm_eps must be 1e-06, got 1e-05" in _unusable(str(path), capsys)


# --- known mistakes ------------------------------------------------------------------------------


class MistakenAdamW(torch.optim.Optimizer):
    """AdamW with one mistake, or none."""

    def __init__(
        self, groups: Any, *, mistake: str, lr: float, betas: Any, eps: float, fused: bool
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.mistake, self.betas, self.eps, self.count = mistake, betas, eps, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        beta1, beta2 = self.betas
        corrections = 1 - beta1**self.count, 1 - beta2**self.count
        if self.mistake == "no bias correction":
            corrections = 1.0, 1.0
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for p in group["params"]:
                g = p.grad
                if self.mistake == "coupled decay":
                    g, shrink = g + decay * p, 1.0
                else:
                    shrink = 1 - decay if self.mistake == "decay without lr" else 1 - lr * decay
                state = self.state[p]
                m = beta1 * state.get("m", torch.zeros_like(p)) + (1 - beta1) * g
                v = beta2 * state.get("v", torch.zeros_like(p)) + (1 - beta2) * g * g
                state["m"], state["v"] = m, v
                if self.mistake == "amsgrad":
                    v = state["largest"] = torch.maximum(v, state.get("largest", v))
                m, v = m / corrections[0], v / corrections[1]
                inside = self.mistake == "eps inside the root"
                root = (v + self.eps).sqrt() if inside else v.sqrt() + self.eps
                p.mul_(shrink).sub_(lr * m / root)


def _optimizer(mistake: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.optim, "AdamW", partial(MistakenAdamW, mistake=mistake))


def _tanh_gelu(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Mlp, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    patch.setattr(Mlp, "forward", forward)


def _attention(
    patch: pytest.MonkeyPatch,
    *,
    order: tuple[int, int, int] = (0, 1, 2),
    heads_first: bool = False,
    scale: Callable[[int, int], float] = lambda width, heads: (width // heads) ** -0.5,
) -> None:
    def forward(self: Attention, x: Tensor, valid: Tensor | None = None) -> Tensor:
        n, length, width = x.shape
        rows = self.qkv(x)
        if heads_first:
            rows = rows.view(n, length, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        else:
            rows = rows.view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = (rows[i] for i in order)
        weights = (q @ k.transpose(-2, -1) * scale(width, self.heads)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, width))

    patch.setattr(Attention, "forward", forward)


def _groups(patch: pytest.MonkeyPatch, decays: Callable[[str, nn.Parameter], bool]) -> None:
    def parameter_groups(modules: list[nn.Module]) -> list[dict[str, object]]:
        named = [(n, p) for module in modules for n, p in module.named_parameters()]
        return [
            {"params": [p for n, p in named if decays(n, p)], "decays": True},
            {"params": [p for n, p in named if not decays(n, p)], "decays": False},
        ]

    patch.setattr(reference, "parameter_groups", parameter_groups)


def _no_ema(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "ema_update_", lambda *_, **__: None)


def _ema_first(patch: pytest.MonkeyPatch) -> None:
    ema, update = reference.ema_update_, ReferenceStep.update
    patch.setattr(reference, "ema_update_", lambda *_, **__: None)

    def early(self: ReferenceStep, values: StepValues) -> None:
        keep = torch.tensor(values.momentum)
        targets, sources = (list(m.parameters()) for m in (self.target_encoder, self.encoder))
        with torch.no_grad():
            ema(targets, sources, keep, 1 - keep)
        update(self, values)

    patch.setattr(ReferenceStep, "update", early)


def _values(patch: pytest.MonkeyPatch, change: Callable[[StepValues], StepValues]) -> None:
    """Uses other values than the schedules say; the schedules themselves stay right."""
    update = ReferenceStep.update
    patch.setattr(ReferenceStep, "update", lambda self, values: update(self, change(values)))


def _ema_one_step_late(patch: pytest.MonkeyPatch) -> None:
    increment = (1.0 - 0.996) / 12
    _values(patch, lambda values: replace(values, momentum=values.momentum + increment))


def _schedule_off_by_one(patch: pytest.MonkeyPatch) -> None:
    at = Schedules.at
    patch.setattr(Schedules, "at", lambda self, step: at(self, step + 1))


def _no_second_norm(patch: pytest.MonkeyPatch) -> None:
    def latent_targets(features: Tensor, masks: Masks) -> Tensor:
        image = torch.arange(len(features))[None, :, None]
        return features.float()[image, masks.target_index.long().transpose(0, 1)]

    patch.setattr(reference, "latent_targets", latent_targets)


def _second_norm_over_the_block(patch: pytest.MonkeyPatch) -> None:
    def latent_targets(features: Tensor, masks: Masks) -> Tensor:
        image = torch.arange(len(features))[None, :, None]
        rows = features.float()[image, masks.target_index.long().transpose(0, 1)]
        return F.layer_norm(rows, rows.shape[-2:], eps=1e-5)

    patch.setattr(reference, "latent_targets", latent_targets)


def _targets_in_image_order(patch: pytest.MonkeyPatch) -> None:
    right = reference.latent_targets
    # as many images as target blocks: the shape stays right
    patch.setattr(reference, "latent_targets", lambda *a: right(*a).transpose(0, 1))


def _joint_sequence(patch: pytest.MonkeyPatch) -> None:
    def predict(
        encoder: VisionTransformer, predictor: Predictor, images: Tensor, masks: Masks
    ) -> Tensor:
        tokens = encoder.embed(images)
        rows, patches, valid = reference.pad_contexts(masks, tokens.shape[1])
        z = encoder.encode(tokens.flatten(0, 1)[rows], valid)
        out = predictor(z, patches, masks.target_index.long().flatten(1), valid)
        batch, blocks, length = masks.target_index.shape
        return out.view(batch, blocks, length, -1).transpose(0, 1).unsqueeze(1)

    patch.setattr(reference, "predict", predict)


def _other_mean(patch: pytest.MonkeyPatch) -> None:
    accumulate = ReferenceStep.accumulate
    patch.setattr(
        ReferenceStep,
        "accumulate",
        lambda self, images, masks, elements: accumulate(
            self, images, masks, elements // masks.target_index.shape[1]
        ),
    )


def _loss_kind(patch: pytest.MonkeyPatch) -> None:
    right = reference.latent_loss_sum
    patch.setattr(reference, "latent_loss_sum", lambda p, t, _: right(p, t, "l2") / 2)


def _swapped_table(patch: pytest.MonkeyPatch) -> None:
    right = model.sincos_position_embedding

    def table(width: int, grid: tuple[int, int]) -> Tensor:
        columns, rows = right(width, grid).chunk(2, dim=-1)
        return torch.cat([rows, columns], dim=-1)

    patch.setattr(model, "sincos_position_embedding", table)


def _clipped(patch: pytest.MonkeyPatch) -> None:
    update = ReferenceStep.update

    def clipping(self: ReferenceStep, values: StepValues) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 0.05)
        update(self, values)

    patch.setattr(ReferenceStep, "update", clipping)


def _padding_seen(patch: pytest.MonkeyPatch) -> None:
    right = reference.pad_contexts

    def padded(masks: Masks, num_patches: int) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, patches, _ = right(masks, num_patches)
        return torch.cat([rows, rows[:, :1]], 1), torch.cat([patches, patches[:, :1]], 1), None

    patch.setattr(reference, "pad_contexts", padded)


FORWARD, GRADIENT, LOSS, FINAL = "forward", "gradient", "loss", "final weights"
MOVED, SCHEDULE = "target movement", "schedule"
EARLY = {FORWARD, GRADIENT, LOSS, FINAL, MOVED}

# mistake; how it is made; kinds of rows that must fail; kinds that cannot
MISTAKES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str], set[str]]] = {
    "tanh gelu": (_tanh_gelu, {FORWARD, GRADIENT}, {SCHEDULE}),
    "mask token not decayed": (
        lambda p: _groups(p, lambda n, w: w.ndim >= 2 and n != "mask_token"),
        {FINAL},
        {SCHEDULE, FORWARD, GRADIENT},
    ),
    "biases and norms decayed": (
        lambda p: _groups(p, lambda n, w: True),
        {FINAL},
        {SCHEDULE, FORWARD, GRADIENT},
    ),
    "nothing decayed": (
        lambda p: _groups(p, lambda n, w: False),
        {FINAL},
        {SCHEDULE, FORWARD, GRADIENT},
    ),
    "no ema": (_no_ema, {MOVED}, {SCHEDULE, FORWARD, GRADIENT}),
    "ema before the update": (_ema_first, {MOVED}, {SCHEDULE, FORWARD, GRADIENT}),
    "ema momentum one step late": (_ema_one_step_late, {MOVED}, {SCHEDULE, FORWARD, GRADIENT}),
    "no second norm": (_no_second_norm, EARLY, {SCHEDULE}),
    "second norm over the block": (_second_norm_over_the_block, EARLY - {MOVED}, {SCHEDULE}),
    "second norm with eps 1e-6": (
        lambda p: p.setattr(reference, "TARGET_NORM_EPS", 1e-6),
        {FORWARD},
        {SCHEDULE},
    ),
    "first norms with eps 1e-5": (
        lambda p: p.setattr(model, "NORM_EPS", 1e-5),
        {FORWARD, GRADIENT},
        {SCHEDULE},
    ),
    "coupled weight decay": (
        partial(_optimizer, "coupled decay"),
        {FINAL},
        {SCHEDULE, FORWARD, GRADIENT},
    ),
    "weight decay without lr": (
        partial(_optimizer, "decay without lr"),
        {FINAL, LOSS, MOVED},
        {SCHEDULE, FORWARD, GRADIENT},
    ),
    "no bias correction": (
        partial(_optimizer, "no bias correction"),
        {FINAL, LOSS, MOVED},
        {SCHEDULE, FORWARD, GRADIENT},
    ),
    "amsgrad": (partial(_optimizer, "amsgrad"), {FINAL}, {SCHEDULE, FORWARD, GRADIENT}),
    "eps inside the root": (
        partial(_optimizer, "eps inside the root"),
        {FINAL},
        {SCHEDULE, FORWARD, GRADIENT},
    ),
    "gradients clipped": (_clipped, {FINAL}, {SCHEDULE, FORWARD, GRADIENT}),
    "joint predictor sequence": (_joint_sequence, EARLY, {SCHEDULE}),
    "targets in image order": (_targets_in_image_order, EARLY, {SCHEDULE}),
    "mean over other elements": (_other_mean, {GRADIENT, LOSS}, {SCHEDULE, FORWARD}),
    "half squared error": (_loss_kind, {GRADIENT, LOSS}, {SCHEDULE, FORWARD}),
    "table with rows first": (_swapped_table, {FORWARD}, {SCHEDULE}),
    "padding seen": (_padding_seen, {FORWARD, GRADIENT, LOSS}, {SCHEDULE}),
    "keys and queries swapped": (
        partial(_attention, order=(1, 0, 2)),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "order v, k, q": (
        partial(_attention, order=(2, 1, 0)),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "qkv laid out heads first": (
        partial(_attention, heads_first=True),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "scale of the whole width": (
        partial(_attention, scale=lambda width, heads: width**-0.5),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "schedules off by one": (
        _schedule_off_by_one,
        {SCHEDULE, FINAL, MOVED},
        {FORWARD, GRADIENT},
    ),
    "learning rate off by one": (
        lambda p: _values(p, lambda v: replace(v, lr=v.lr * 1.01)),
        {FINAL},
        {SCHEDULE, FORWARD, GRADIENT},
    ),
    "weight decay off": (
        lambda p: _values(p, lambda v: replace(v, weight_decay=v.weight_decay + 0.03)),
        {FINAL},
        {SCHEDULE, FORWARD, GRADIENT},
    ),
}


@pytest.mark.parametrize(("make", "fails", "holds"), MISTAKES.values(), ids=MISTAKES)
def test_a_known_mistake_fails(make, fails, holds, monkeypatch):
    make(monkeypatch)
    failed = failures(GOLDEN)
    assert fails <= failed.keys()
    assert not holds & failed.keys()


@pytest.mark.parametrize("make", [partial(_optimizer, "none"), _attention])
def test_the_stand_ins_pass_without_a_mistake(make, monkeypatch):
    make(monkeypatch)
    assert main([str(GOLDEN)]) == 0


def test_a_mistake_ends_with_exit_code_1(monkeypatch, capsys):
    _no_ema(monkeypatch)
    assert main([str(GOLDEN)]) == 1
    assert "FAIL: reference path" in capsys.readouterr().out


def test_an_undecayed_mask_token_is_found_where_it_is(monkeypatch):
    MISTAKES["mask token not decayed"][0](monkeypatch)
    assert failures(GOLDEN) == {"final weights": {"final.predictor.mask_token"}}


# --- TF32 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("ends_well", [True, False])
def test_tf32_is_off_for_the_replay_and_restored(before, ends_well, small, monkeypatch):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found = (matmul.allow_tf32, cudnn.allow_tf32)
    seen = []
    update = ReferenceStep.update

    def look(self: ReferenceStep, values: StepValues) -> None:
        seen.append((matmul.allow_tf32, cudnn.allow_tf32))
        if not ends_well:
            raise ValueError("stop")
        update(self, values)

    monkeypatch.setattr(ReferenceStep, "update", look)
    try:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        assert main([str(small)]) == (0 if ends_well else 2)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = found
    assert seen == [(False, False)] * (2 if ends_well else 1)


def test_nan_is_never_within_a_limit():
    assert not parity.Row(kind="loss", name="x", error=math.nan, limit=1.0).ok
    assert parity.Row(kind="loss", name="x", error=1.0, limit=1.0).ok
