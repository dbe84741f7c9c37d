"""Parity: recordings pass, each wrong entry fails, and so does each known mistake in a step."""

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
from ijepa_fast.fast import FastStep
from ijepa_fast.fast import step as fast
from ijepa_fast.masks import Masks
from ijepa_fast.model import Attention, Mlp, Predictor, VisionTransformer
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import Schedules, StepValues
from ijepa_fast.verify.comparison import key_bias_bounds
from ijepa_fast.verify.parity import main
from tests.trainer.recordings import (
    CASE,
    FINAL,
    FORWARD,
    GOLDEN,
    GRADIENT,
    LOSS,
    MOVED,
    OTHERS,
    SCHEDULE,
    failures,
    must_fail,
    record,
)

Patch = pytest.MonkeyPatch
Change = Callable[[dict[str, Tensor]], Any]


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


def _changed(path: Path, folder: Path, change: Change, case: dict[str, Any] | None = None) -> str:
    tensors, metadata = _read(path)
    change(tensors)
    if case is not None:
        metadata = {"case": json.dumps(case)}
    save_file(tensors, folder / "changed.safetensors", metadata=metadata)
    return str(folder / "changed.safetensors")


# --- the recording -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_recording_passes(path, dtype, capsys):
    """Every tensor of it has its row, on both paths the same; the table shows the worst of each."""
    options = ["--path", path, "--dtype", dtype, "--device", "cpu"]
    assert main([str(GOLDEN), *options]) == 0
    out, err = capsys.readouterr()
    assert not err
    lines = out.splitlines()
    assert "FAIL" not in out
    assert lines[-1].startswith(f"PASS: {path} path, {dtype}, ")
    assert lines[-1].endswith("comparisons, 0 failed, 0 tensors unused")
    names = {f"step{j}.{value}" for j in range(8) for value in ("loss", "lr", "wd", "momentum")}
    names |= {"step0.prediction", "step0.latent_target"}
    assert names <= {line.split()[0] for line in lines if line.endswith("ok")}
    # 28 + 31 tensors, and the key third of each of the 4 qkv biases; the target encoder's 28 + 2
    assert "gradient: 59 tensors, worst:" in lines
    assert "key gradient: 4 tensors, worst:" in lines
    assert "final weights: 87 tensors, worst:" in lines
    assert "final key bias: 6 tensors, worst:" in lines
    assert "target movement: 28 tensors, worst:" in lines
    assert main([str(GOLDEN), *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["path"], result["dtype"]) == (True, path, dtype)
    assert result["unused"] == []
    rows = {row["name"]: row for row in result["rows"]}
    recorded = {n for n in _read(GOLDEN)[0] if n.startswith(("step0.grad.", "final."))}
    assert recorded | names <= rows.keys()
    assert all(row["ok"] and row["error"] <= row["limit"] for row in rows.values())
    assert (rows["step0.prediction"]["error"] > 1e-4) == (dtype == "bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--attention", "varlen"],
            "attention must be auto or sdpa with path reference, got 'varlen'",
        ),
        (["--memory", "full"], "memory must be none with path reference, got 'full'"),
        (["--device", "cuda"], "device must be auto or cpu here, got cuda: no CUDA device"),
    ],
)
def test_options_that_cannot_be_had_are_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(GOLDEN), *options]) == 2
    assert tuple(capsys.readouterr()) == ("", f"error: {message}\n")


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize(("changes", "lengths"), OTHERS.values(), ids=OTHERS)
def test_recordings_of_a_per_sequence_float64_loop_pass(changes, lengths, path, tmp_path, capsys):
    context, target = lengths
    file = record(tmp_path / "other.safetensors", context=context, target=target, **changes)
    assert main([str(file), "--path", path]) == 0, capsys.readouterr().out


# --- each kind of entry --------------------------------------------------------------------------


def _scale(name: str, share: float) -> Change:
    """Changes a tensor by a share of its norm."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = (tensors[name].double() * (1 + share)).to(tensors[name].dtype)

    return change


def _add(name: str, index: int, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[index] += value

    return change


def _scale_one(name: str, index: int, share: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[index] *= 1 + share

    return change


QKV = "encoder.blocks.0.attn.qkv.bias"
KEY = "(key third, absolute)"
MASK_TOKEN, PATCHES = "predictor.mask_token", "encoder.patch_embed.proj.weight"
# how a change of so much is made, its limit, and the row that fails, of which kind
ENTRIES: list[tuple[Callable[[float], Change], float, str, str]] = [
    (partial(_scale, "loss"), 1e-6, LOSS, "step1.loss"),
    (partial(_scale_one, "lr", 1), 1e-9, SCHEDULE, "step1.lr"),
    (partial(_scale_one, "wd", 0), 1e-9, SCHEDULE, "step0.wd"),
    (partial(_scale_one, "momentum", 1), -1e-9, SCHEDULE, "step1.momentum"),
    *((partial(_scale, n), 1e-6, FORWARD, n) for n in ("step0.prediction", "step0.latent_target")),
    *(
        (partial(_scale, name), 5e-6, GRADIENT, name)
        for name in (f"step0.grad.{n}" for n in (PATCHES, MASK_TOKEN, QKV))
    ),
    (partial(_add, f"step0.grad.{QKV}", 24), 1e-6, "key gradient", f"step0.grad.{QKV} {KEY}"),
    *(
        (partial(_scale, name), 1e-5, FINAL, name)
        for name in ("final.encoder.blocks.0.mlp.fc1.weight", "final.predictor.mask_token")
    ),
    # twice the learning rates, 4.7e-4 and 7.3e-4; of the average momentum 0.2 and 0.27 are left
    *(
        (partial(_add, f"final.{name}", 24), bound, "final key bias", f"final.{name} {KEY}")
        for name, bound in ((QKV, 2.40e-3), (f"target_{QKV}", 1.95e-3))
    ),
]


@pytest.mark.parametrize(
    ("change", "limit", "kind", "row"), ENTRIES, ids=[entry[-1] for entry in ENTRIES]
)
def test_an_entry_just_beyond_its_limit_fails_alone(
    change, limit, kind, row, small, tmp_path, capsys
):
    path = _changed(small, tmp_path, change(1.5 * limit))
    assert main([path]) == 1
    out = capsys.readouterr().out
    assert "FAIL: reference path" in out
    assert any(line.startswith(f"{row} ") and line.endswith("FAIL") for line in out.splitlines())
    failed = failures(path)
    assert failed.keys() == {kind}
    assert row in failed[kind]
    assert len(failed[kind]) == (2 if kind == LOSS else 1)
    # a third of the limit passes, float32 noise included: the limit is where it should be
    assert main([_changed(small, tmp_path, change(limit / 3))]) == 0


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
    assert failures(path) == {MOVED: {f"{name} (of its movement)"}}
    path = _changed(small, tmp_path, _scale(name, 1.5e-5))
    assert failures(path)[FINAL] == {name}


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


def _key_thirds(step: ReferenceStep) -> list[Tensor]:
    modules = [*step.encoder.modules(), *step.predictor.modules()]
    return [m.qkv.bias.detach().chunk(3)[1] for m in modules if isinstance(m, Attention)]


def _key_bias_from_zero(patch: Patch) -> None:
    start = ReferenceStep.__init__

    def forgetful(self: ReferenceStep, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        for third in _key_thirds(self):
            third.zero_()

    patch.setattr(ReferenceStep, "__init__", forgetful)


def _key_bias_moves(rates: float, patch: Patch) -> None:
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
        assert f"final.{name} {KEY}" in failed["final key bias"]


# --- other inputs --------------------------------------------------------------------------------


def _shorter(name: str) -> Change:
    return lambda tensors: tensors.update({name: tensors[name][..., :-1].contiguous()})


def _would_broadcast(name: str) -> Change:
    return lambda tensors: tensors.update({name: tensors[name][None].clone()})


def _another_pixel(step: int, tensors: dict[str, Tensor]) -> None:
    # inside the first target block, so that it matters for sure
    patch = int(tensors[f"step{step}.target0"][0, 0])
    tensors[f"step{step}.images_uint8"][0, 1, 4 * (patch // 4), 4 * (patch % 4)] ^= 128


def _another_patch(name: str, tensors: dict[str, Tensor]) -> None:
    mask = tensors[name]
    mask[1, 0] = next(p for p in range(16) if p not in mask[1].tolist())


OUTPUTS = ("step0.prediction", f"step0.grad.{MASK_TOKEN}", "final.encoder.norm.weight")
WRONG: dict[str, Change] = {
    **{
        f"{name} {value}": _add(name, 0, value)
        for value in (math.nan, math.inf)
        for name in ("loss", "wd", *OUTPUTS, f"step0.grad.{QKV}", f"final.target_{QKV}")
    },
    **{f"{name} shorter": _shorter(name) for name in OUTPUTS},
    **{f"{name} of one dimension more": _would_broadcast(name) for name in OUTPUTS},
    **{
        name: _add(name, 3, 1e-3)
        for name in (
            "init.encoder.blocks.0.mlp.fc1.weight",
            "init.encoder.norm.bias",
            "init.predictor.mask_token",
            "init.encoder.pos_embed",
            "init.predictor.predictor_pos_embed",
        )
    },
    **{f"image of step {step}": partial(_another_pixel, step) for step in (0, 1)},
    **{
        name: partial(_another_patch, name)
        for name in ("step0.context0", "step1.context0", "step0.target0", "step1.target1")
    },
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_tensor_fails(change, small, tmp_path):
    assert main([_changed(small, tmp_path, change)]) == 1


def test_a_tensor_that_nobody_takes_fails_and_is_named(small, tmp_path, capsys):
    path = _changed(small, tmp_path, lambda t: t.update({"step0.surprise": torch.zeros(1)}))
    assert main([path]) == 1
    out = capsys.readouterr().out
    assert "never used: step0.surprise" in out
    assert out.splitlines()[-1].endswith(" 0 failed, 1 tensors unused")
    assert main([path, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["unused"]) == (False, ["step0.surprise"])

    def shorten(tensors: dict[str, Tensor]) -> None:
        for name in ("loss", "lr", "wd", "momentum"):
            tensors[name] = tensors[name][:1].clone()

    assert main([_changed(small, tmp_path, shorten, {**CASE, "steps": 1})]) == 1
    assert "never used: step1.images_uint8" in capsys.readouterr().out


# --- unusable files: exit code 2 and one line ----------------------------------------------------


def _unusable(path: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "name",
    [
        "momentum",
        "step0.prediction",
        "step0.images_uint8",
        "step1.context0",
        "step0.target1",
        "step0.grad.encoder.norm.bias",
        "final.target_encoder.norm.bias",
        "init.encoder.norm.bias",
        "init.encoder.pos_embed",
    ],
)
def test_a_missing_tensor_is_named(name, small, tmp_path, capsys):
    path = _changed(small, tmp_path, lambda tensors: tensors.pop(name))
    assert name in _unusable(path, capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.update({"init.encoder.norm.bias": torch.zeros(25)}),
            "init.encoder.norm.bias",
        ),
        (
            lambda t: t.update({"init.predictor.cls_token": torch.zeros(1, 1, 8)}),
            "init.predictor.cls_token",
        ),
        (_shorter("wd"), "'wd' of every step (2), got 1"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words, small, tmp_path, capsys):
    assert words in _unusable(_changed(small, tmp_path, change), capsys)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        *(
            ({k: v for k, v in CASE.items() if k != key}, f"'{key}'")
            for key in ("img", "nenc", "ema", "warmup", "loss", "steps")
        ),
        ({**CASE, "norm_eps": 1e-5}, "norm_eps must be 1e-06, got 1e-05"),
    ],
)
def test_a_wrong_case_is_named(case, words, small, tmp_path, capsys):
    assert words in _unusable(_changed(small, tmp_path, lambda _: None, case), capsys)


def test_unreadable_files_are_named(tmp_path, capsys):
    path = tmp_path / "file.safetensors"
    for content in (None, b"", b"not a safetensors file at all"):
        if content is not None:
            path.write_bytes(content)
        message = _unusable(path, capsys)
        assert "FILE must be a readable safetensors file" in message
        assert str(path) in message
    assert str(tmp_path) in _unusable(tmp_path, capsys)
    save_file({"w": torch.zeros(1)}, path)
    assert "'case'" in _unusable(path, capsys)


# --- known mistakes, of the reference path -------------------------------------------------------


def _tanh_gelu(patch: Patch) -> None:
    def forward(self: Mlp, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    patch.setattr(Mlp, "forward", forward)


def _attend(patch: Patch, change: Callable[..., tuple[Tensor, ...]]) -> None:
    """Attention over other queries, keys and values."""
    right = model.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        q, k, v = change(q, k, v)
        return right(q, k, v, valid)

    patch.setattr(model, "attend", attend)


def _optimizer(patch: Patch, kind: str, **options: Any) -> None:
    patch.setattr(torch.optim, "AdamW", partial(getattr(torch.optim, kind), **options))


def _schedule_off_by_one(patch: Patch) -> None:
    at = Schedules.at
    patch.setattr(Schedules, "at", lambda self, step: at(self, step + 1))


def _targets(
    patch: Patch, change: Callable[[Tensor], Tensor], width: Callable[[Tensor], Any]
) -> None:
    """Another norm of the targets, and another order."""

    def latent_targets(features: Tensor, masks: Masks) -> Tensor:
        image = torch.arange(len(features))[None, :, None]
        rows = features.float()[image, masks.target_index.long().transpose(0, 1)]
        shape = width(rows)
        return change(F.layer_norm(rows, shape, eps=1e-5) if shape else rows)

    patch.setattr(reference, "latent_targets", latent_targets)


def _joint_sequence(patch: Patch) -> None:
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


def _other_mean(patch: Patch) -> None:
    accumulate = ReferenceStep.accumulate
    patch.setattr(
        ReferenceStep,
        "accumulate",
        lambda self, images, masks, elements: accumulate(
            self, images, masks, elements // masks.target_index.shape[1]
        ),
    )


def _loss_kind(patch: Patch) -> None:
    right = reference.latent_loss_sum
    patch.setattr(reference, "latent_loss_sum", lambda p, t, _: right(p, t, "l2") / 2)


def _swapped_table(patch: Patch) -> None:
    right = model.sincos_position_embedding

    def table(width: int, grid: tuple[int, int]) -> Tensor:
        columns, rows = right(width, grid).chunk(2, dim=-1)
        return torch.cat([rows, columns], dim=-1)

    patch.setattr(model, "sincos_position_embedding", table)


def _clipped(patch: Patch) -> None:
    update = ReferenceStep.update

    def clipping(self: ReferenceStep, values: StepValues) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 0.05)
        update(self, values)

    patch.setattr(ReferenceStep, "update", clipping)


def _padding_seen(patch: Patch) -> None:
    right = reference.pad_contexts

    def padded(masks: Masks, num_patches: int) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, patches, _ = right(masks, num_patches)
        return torch.cat([rows, rows[:, :1]], 1), torch.cat([patches, patches[:, :1]], 1), None

    patch.setattr(reference, "pad_contexts", padded)


ATTENTION, EARLY = {FORWARD, GRADIENT, LOSS}, {FORWARD, GRADIENT, LOSS, FINAL, MOVED}

# mistake; how it is made; kinds of rows that must fail
MISTAKES: dict[str, tuple[Callable[[Patch], None], set[str]]] = {
    "tanh gelu": (_tanh_gelu, {FORWARD, GRADIENT}),
    "no second norm": (lambda p: _targets(p, lambda t: t, lambda r: ()), EARLY),
    "second norm over the block": (
        lambda p: _targets(p, lambda t: t, lambda r: r.shape[-2:]),
        EARLY - {MOVED},
    ),
    # as many images as target blocks: the shape stays right
    "targets in image order": (
        lambda p: _targets(p, lambda t: t.transpose(0, 1), lambda r: r.shape[-1:]),
        EARLY,
    ),
    "second norm with eps 1e-6": (
        lambda p: p.setattr(reference, "TARGET_NORM_EPS", 1e-6),
        {FORWARD},
    ),
    "first norms with eps 1e-5": (lambda p: p.setattr(model, "NORM_EPS", 1e-5), ATTENTION - {LOSS}),
    "coupled weight decay": (lambda p: _optimizer(p, "Adam"), {FINAL}),
    "amsgrad": (lambda p: _optimizer(p, "AdamW", amsgrad=True), {FINAL}),
    "gradients clipped": (_clipped, {FINAL}),
    "joint predictor sequence": (_joint_sequence, EARLY),
    "mean over other elements": (_other_mean, {GRADIENT, LOSS}),
    "half squared error": (_loss_kind, {GRADIENT, LOSS}),
    "table with rows first": (_swapped_table, {FORWARD}),
    "padding seen": (_padding_seen, ATTENTION),
    "keys and queries swapped": (lambda p: _attend(p, lambda q, k, v: (k, q, v)), ATTENTION),
    "order v, k, q": (lambda p: _attend(p, lambda q, k, v: (v, k, q)), ATTENTION),
    "scale of the whole width": (
        lambda p: _attend(p, lambda q, k, v: (q * q.shape[1] ** -0.5, k, v)),
        ATTENTION,
    ),
    "schedules off by one": (_schedule_off_by_one, {SCHEDULE, FINAL, MOVED}),
}


@pytest.mark.parametrize(("make", "fails"), MISTAKES.values(), ids=MISTAKES)
def test_a_known_mistake_fails(make, fails, monkeypatch):
    make(monkeypatch)
    must_fail(GOLDEN, fails)


# --- known mistakes, of either path --------------------------------------------------------------

PATHS: dict[str, tuple[Any, Any]] = {
    "reference": (reference, ReferenceStep),
    "fast": (fast, FastStep),
}


def _decays(wrong: Callable[[str, nn.Parameter], bool], path: str, patch: Patch) -> None:
    """Other parameters decay."""

    def parameter_groups(modules: list[nn.Module]) -> list[dict[str, object]]:
        named = [(n, p) for module in modules for n, p in module.named_parameters()]
        return [
            {"params": [p for n, p in named if wrong(n, p)], "decays": True},
            {"params": [p for n, p in named if not wrong(n, p)], "decays": False},
        ]

    patch.setattr(PATHS[path][0], "parameter_groups", parameter_groups)


def _values(change: Callable[[StepValues], StepValues], path: str, patch: Patch) -> None:
    """Uses other values than the schedules say; the schedules themselves stay right."""
    step = PATHS[path][1]
    update = step.update
    patch.setattr(step, "update", lambda self, values: update(self, change(values)))


def _ema_first(path: str, patch: Patch) -> None:
    step = PATHS[path][1]
    update = step.update

    @torch.no_grad()
    def early(self: Any, values: StepValues) -> None:
        masters = self.masters()
        for name, source in self.encoder.named_parameters():
            average = masters[f"target_encoder.{name}"]
            average.mul_(values.momentum).add_((1 - values.momentum) * source)
        update(self, replace(values, momentum=1.0))

    patch.setattr(step, "update", early)


OF_EITHER: dict[str, tuple[Callable[[str, Patch], None], set[str]]] = {
    "mask token not decayed": (
        partial(_decays, lambda n, w: w.ndim >= 2 and n != "mask_token"),
        {FINAL},
    ),
    "biases and norms decayed": (partial(_decays, lambda n, w: True), {FINAL}),
    "nothing decayed": (partial(_decays, lambda n, w: False), {FINAL}),
    "ema before the update": (_ema_first, {MOVED}),
    "no ema": (partial(_values, lambda v: replace(v, momentum=1.0)), {MOVED}),
    "ema momentum one step late": (
        partial(_values, lambda v: replace(v, momentum=v.momentum + (1 - 0.996) / 12)),
        {MOVED},
    ),
    "learning rate off by one": (partial(_values, lambda v: replace(v, lr=v.lr * 1.01)), {FINAL}),
    "weight decay off": (
        partial(_values, lambda v: replace(v, weight_decay=v.weight_decay + 0.03)),
        {FINAL},
    ),
    "weight decay without lr": (
        partial(_values, lambda v: replace(v, weight_decay=v.weight_decay / v.lr)),
        {FINAL, LOSS, MOVED},
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("make", "fails"), OF_EITHER.values(), ids=OF_EITHER)
def test_a_known_mistake_of_either_path_fails(make, fails, path, monkeypatch):
    make(path, monkeypatch)
    must_fail(GOLDEN, fails, path=path)


# --- TF32 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(True, True), (False, True), (False, False)])
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
