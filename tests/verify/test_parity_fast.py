"""Parity of the fast path: recordings pass in both precisions, and known mistakes in it fail."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.fast import FastStep
from ijepa_fast.fast import block as packed_block
from ijepa_fast.fast import networks as packed
from ijepa_fast.fast import step as fast
from ijepa_fast.fast.attention import Pair, Sequences
from ijepa_fast.fast.block import PackedBlock
from ijepa_fast.fast.layout import Key, Layout, views
from ijepa_fast.fast.networks import ContextEncoder, PackedPredictor
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.verify.comparison import Report
from ijepa_fast.verify.parity import compare, main
from ijepa_kernels import latent_loss, patchify
from ijepa_kernels.add_layer_norm import add_layer_norm_backward, add_layer_norm_forward
from ijepa_kernels.gather_tokens import Gather
from ijepa_kernels.gelu import gelu_backward
from ijepa_kernels.join_heads import join_heads
from ijepa_kernels.optim import AdamWEMA
from tests.trainer.recordings import (
    FINAL,
    FORWARD,
    GOLDEN,
    GRADIENT,
    LOSS,
    MOVED,
    ODD,
    failures,
    must_fail,
    record,
)

RATIO, EACH = "against reference bf16", "against reference bf16, each"
MEMORY = ["none", "full"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # the networks are so small that threads only get in each other's way
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """Two contexts of different length, three target blocks, three heads, an odd grid."""
    folder = tmp_path_factory.mktemp("parity")
    return record(folder / "uneven.safetensors", context=9, target=6, drop=3, **ODD)


# --- what passes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORY)
def test_contexts_of_different_length_pass(memory, uneven, capsys):
    assert main([str(uneven), "--path", "fast", "--memory", memory]) == 0, capsys.readouterr().out


def test_another_recording_passes_in_bfloat16(tmp_path, capsys):
    # Adam's first steps move a weight by the learning rate, whatever the size of its gradient: of
    # one near zero the sign is chance. Enough weights and steps, and such chances even out.
    changes = {**ODD, "dim": 48, "pdim": 24, "B": 4, "epochs": 4, "ipe": 2, "steps": 8}
    path = record(tmp_path / "large.safetensors", context=18, target=8, drop=5, **changes)
    arguments = [str(path), "--path", "fast", "--dtype", "bfloat16"]
    assert main(arguments) == 0, capsys.readouterr().out


def test_in_bfloat16_errors_are_held_to_the_reference_paths():
    report = compare(GOLDEN, dtype="bfloat16", path="fast")
    assert report.ok
    compared = {row.name for row in report.rows if row.kind in (GRADIENT, FINAL)}
    assert {r.name.removesuffix(" (of reference)") for r in report.rows if r.kind == EACH} == (
        compared
    )
    ratios = {row.name: row for row in report.rows if row.kind == RATIO}
    names = {"losses (RMS of 8)", "gradients (RMS of 59)", "final weights (RMS of 87)"}
    assert ratios.keys() == {f"all {name}" for name in names}
    assert all(0.5 < row.error <= row.limit == 1.5 for row in ratios.values())


def test_weights_are_compared_before_they_are_rounded(monkeypatch):
    """In bfloat16 the target encoder's module holds rounded weights."""
    masters = FastStep.masters

    def modules(self: FastStep) -> dict[str, Tensor]:
        target = {f"target_encoder.{k}": v for k, v in self.target_encoder.state_dict().items()}
        return masters(self) | target

    monkeypatch.setattr(FastStep, "masters", modules)
    failed = failures(GOLDEN, path="fast", dtype="bfloat16")
    assert {"target movement", EACH} <= failed.keys()


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attention", "varlen"], "attention must be sdpa or auto here, got 'varlen': "),
        (
            ["--attention", "xformers", "--dtype", "bfloat16"],
            "attention must be sdpa or auto here, got 'xformers': ",
        ),
    ],
)
def test_an_unusable_back_end_is_one_line(options, message, capsys):
    assert main([str(GOLDEN), "--path", "fast", "--device", "cpu", *options]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_options_reach_the_step(monkeypatch):
    seen = []
    init = FastStep.__init__

    def look(self: FastStep, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        seen.append((kwargs["attention"], self.settings.memory, self.settings.dtype, self.device))

    monkeypatch.setattr(FastStep, "__init__", look)
    options = ["--attention", "sdpa", "--memory", "full", "--dtype", "bfloat16", "--device", "cpu"]
    assert main([str(GOLDEN), "--path", "fast", *options]) == 0
    assert seen == [("sdpa", "full", torch.bfloat16, torch.device("cpu"))]


# --- ratios --------------------------------------------------------------------------------------


def _report(loss: float = 0.0, gradient: float = 0.0, weights: float = 0.0) -> Report:
    report = Report(path="any", dtype="bfloat16")
    for kind, name, error in (
        ("loss", "step0.loss", loss),
        ("gradient", "step0.grad.a", gradient),
        ("gradient", "step0.grad.b", gradient),
        ("final weights", "final.a", weights),
    ):
        report.add(kind, name, error, 1.0)
    report.add("key gradient", "step0.grad.a (key third, absolute)", 1.0, 1.0)
    report.add("final key bias", "final.a (key third, absolute)", 1.0, 1.0)
    return report


def _ratios(report: Report, reference: Report) -> dict[str, float]:
    before = len(report.rows)
    report.add_ratios(reference)
    return {row.name: row.error for row in report.rows[before:]}


def test_ratios_are_those_of_the_errors():
    mine = _report(loss=3e-3, gradient=2e-2, weights=1e-3)
    mine.rows[1] = replace(mine.rows[1], error=1e-2)
    ratios = _ratios(mine, _report(loss=2e-3, gradient=1e-2, weights=5e-3))
    assert ratios == pytest.approx(
        {
            "all losses (RMS of 1)": 1.5,
            "all gradients (RMS of 2)": (2.5e-4) ** 0.5 / 1e-2,
            "step0.grad.a (of reference)": 1.0,
            "step0.grad.b (of reference)": 2.0,
            "all final weights (RMS of 1)": 0.2,
            "final.a (of reference)": 0.2,
        }
    )
    assert [row.name for row in mine.rows if not row.ok] == ["all gradients (RMS of 2)"]
    assert next(r for r in mine.rows if r.name.startswith("all g")).limit == 1.5
    assert {r.limit for r in mine.rows if r.kind == EACH} == {3.0}


def test_errors_of_float32_are_no_ratio():
    """A reference that errs by nothing, or less than it may in float32, forbids nothing else."""
    for theirs in (0.0, 1e-9):
        reference = _report(theirs, theirs, theirs)
        mine = _report(loss=1e-6, gradient=5e-6, weights=1e-5)
        assert list(_ratios(mine, reference).values()) == pytest.approx([1.0] * 6)
        # what is more than float32 is held to float32's limit
        mine = _report(loss=1e-5, gradient=5e-5, weights=1e-4)
        assert list(_ratios(mine, reference).values()) == pytest.approx([10.0] * 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_fail(value):
    for mine, theirs in ((value, value), (value, 1e-3)):
        report = _report(mine, mine, mine)
        report.add_ratios(_report(theirs, theirs, theirs))
        assert not any(row.ok for row in report.rows if row.kind in (RATIO, EACH))
    report = _report(1e-3, 1e-3, 1e-3)
    report.add_ratios(_report(float("nan"), float("nan"), float("nan")))
    assert not any(row.ok for row in report.rows if row.kind in (RATIO, EACH))


def test_the_reference_is_replayed_in_the_same_call(monkeypatch, capsys):
    """A reference path that errs a third as much makes the fast path fail."""
    seen = []
    accumulate = ReferenceStep.accumulate

    def exact(self: ReferenceStep, *args: Any) -> tuple[Tensor, Tensor]:
        seen.append(self.config.precision)
        self.config = replace(self.config, precision="float32")
        return accumulate(self, *args)

    monkeypatch.setattr(ReferenceStep, "accumulate", exact)
    assert main([str(GOLDEN), "--path", "fast", "--dtype", "bfloat16", "--json"]) == 1
    assert seen[0] == "bfloat16"
    assert len(seen) == 8
    rows = json.loads(capsys.readouterr().out)["rows"]
    failed = [row for row in rows if not row["ok"]]
    assert {row["kind"] for row in failed} == {RATIO, EACH}
    assert [row["name"].split(" (")[0] for row in failed if row["kind"] == RATIO] == [
        "all losses",
        "all gradients",
        "all final weights",
    ]


# --- known mistakes ------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def _layout(patch: Patch, change: Callable[[Layout], dict[str, Any]]) -> None:
    """Changes entries of every layout."""

    def changed(flat: Tensor, key: Key) -> Layout:
        layout = views(flat, key)
        return replace(layout, **change(layout))

    patch.setattr(fast, "views", changed)


def _other_functional(patch: Patch, **functions: Any) -> None:
    """Other functions for the packed networks, under the name F."""
    patch.setattr(packed_block, "F", SimpleNamespace(**{**vars(F), **functions}))


def _no_table(patch: Patch) -> None:
    """The predictor without its position table."""
    forward = PackedPredictor.forward

    def without(self: PackedPredictor, z: Tensor, layout: Layout) -> Tensor:
        table = self.predictor_pos_embed
        self.predictor_pos_embed = torch.zeros_like(table)
        try:
            return forward(self, z, layout)
        finally:
            self.predictor_pos_embed = table

    patch.setattr(PackedPredictor, "forward", without)


def _loss(patch: Patch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    patch.setattr(fast, "latent_loss", lambda *a, **k: latent_loss(*a, **change(k)))


def _last_block_sees_wanted_rows(patch: Patch) -> None:
    """The last block of the target encoder: keys and values of the wanted rows only."""
    forward = PackedBlock.forward

    def less(self: Any, x: Tensor, f: Any, pair: Pair, take: Any = None, source: Any = None) -> Any:
        if take is None or torch.is_grad_enabled():
            return forward(self, x, f, pair, take, source)
        x, rows = (t.index_select(0, take.picked.long()) for t in (x, f.rows))
        return forward(self, x, f._replace(rows=rows), Pair(pair.queries, pair.queries))

    patch.setattr(PackedBlock, "forward", less)


def _copies_counted_once(patch: Patch) -> None:
    """Rows that are taken several times get the gradient of one of them."""

    def once(grad: Tensor, gather: Gather, rows: int) -> Tensor:
        return grad.new_zeros(rows, grad.shape[1]).index_copy_(0, gather.picked.long(), grad)

    patch.setattr(packed_block, "sum_rows", once)


def _contexts_mixed_up(layout: Layout) -> dict[str, Any]:
    """Target rows in the order [target, image, context]."""
    key = layout.key
    index = layout.loss_index.view(key.blocks, -1, key.images, key.length)
    return {"loss_index": index.transpose(1, 2).flatten().contiguous()}


def _rolled(name: str, layout: Layout) -> dict[str, Any]:
    value = getattr(layout, name)
    if isinstance(value, Gather):
        return {name: value._replace(picked=value.picked.roll(1))}
    return {name: value.roll(1)}


def _padding_seen(patch: Patch) -> None:
    patch.setattr(
        Sequences, "valid", property(lambda self: torch.ones(self.count, self.longest) > 0)
    )


def _no_final_norm(patch: Patch) -> None:
    forward = ContextEncoder.forward

    def without(self: ContextEncoder, *args: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as inner:
            # what has a weight gets a gradient, of zero
            inner.setattr(
                packed,
                "close",
                lambda n, x, f, dtype: x + f.rows + 0 * n.weight + 0 * n.bias + 0 * f.layer.bias,
            )
            return forward(self, *args)

    patch.setattr(ContextEncoder, "forward", without)


def _colours_reversed(patch: Patch) -> None:
    patch.setattr(
        packed,
        "patchify",
        lambda images, size, index, mean, std, *a, **k: patchify(
            images, size, index, mean.flip(0), std.flip(0), *a, **k
        ),
    )


EARLY = {FORWARD, GRADIENT, LOSS}

# mistake; how it is made; kinds of rows that must fail
MISTAKES: dict[str, tuple[Callable[[Patch], None], set[str]]] = {
    "target rows shifted": (
        lambda p: _layout(p, partial(_rolled, "loss_index")),
        {FORWARD, GRADIENT, LOSS, FINAL},
    ),
    "target rows of other contexts": (lambda p: _layout(p, _contexts_mixed_up), EARLY),
    "needed rows shifted": (lambda p: _layout(p, partial(_rolled, "needed")), EARLY),
    "context positions shifted": (lambda p: _layout(p, partial(_rolled, "context_patch")), EARLY),
    "first keys of other rows": (lambda p: _layout(p, partial(_rolled, "source")), EARLY),
    "no table in the predictor": (_no_table, EARLY),
    "tanh gelu": (
        lambda p: _other_functional(p, gelu=partial(F.gelu, approximate="tanh")),
        {FORWARD},
    ),
    "second norm with eps 1e-6": (lambda p: p.setattr(fast, "TARGET_NORM_EPS", 1e-6), {FORWARD}),
    "second norm with eps 1e-6, in the loss alone": (
        lambda p: _loss(p, lambda k: k | {"eps": 1e-6}),
        {LOSS},
    ),
    "another loss": (lambda p: _loss(p, lambda k: k | {"kind": "l2"}), {GRADIENT, LOSS}),
    "mean over other elements": (
        lambda p: _loss(p, lambda k: k | {"count": k["count"] / 3}),
        {GRADIENT, LOSS},
    ),
    "target encoder sees wanted rows": (_last_block_sees_wanted_rows, EARLY),
    "repeated rows counted once": (_copies_counted_once, {GRADIENT}),
    "padding seen": (_padding_seen, EARLY),
    "no final norm": (_no_final_norm, EARLY),
    "colours reversed": (_colours_reversed, EARLY),
}


@pytest.mark.parametrize(("make", "fails"), MISTAKES.values(), ids=MISTAKES)
def test_a_known_mistake_fails(make, fails, uneven, monkeypatch):
    make(monkeypatch)
    must_fail(uneven, fails, path="fast")


def test_the_stand_ins_pass_without_a_mistake(uneven, monkeypatch):
    _layout(monkeypatch, lambda layout: {})
    _other_functional(monkeypatch)
    _loss(monkeypatch, lambda options: options)
    assert not failures(uneven, path="fast")


def _no_residual_gradient(dy: Tensor, dsum: Tensor | None, *rest: Any, **options: Any) -> Any:
    return add_layer_norm_backward(dy, None, *rest, **options)


def _half_of_the_sums(*args: Any, **options: Any) -> Any:
    dx, low, sums, *rest = add_layer_norm_backward(*args, **options)
    assert sums is not None
    return dx, low, sums / 2, *rest


def _rows_a_little_off(*args: Any, **options: Any) -> Any:
    *first, rows, dgain, dshift = add_layer_norm_backward(*args, **options)
    return *first, None if rows is None else rows * 1.001, dgain, dshift


def _gelu_a_little_off(dg: Tensor, h: Tensor) -> Any:
    dh, sums, g = gelu_backward(dg, h)
    assert g is not None
    return dh, sums, g * 1.001


def _backwards(parts: tuple[Tensor, ...]) -> Any:
    return join_heads(parts[::-1])


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add_layer_norm_backward", _no_residual_gradient),
        ("add_layer_norm_backward", _half_of_the_sums),
        ("add_layer_norm_backward", _rows_a_little_off),
        ("gelu_backward", _gelu_a_little_off),
        ("join_heads", _backwards),
    ],
)
def test_a_wrong_backward_pass_fails(name, function, uneven, monkeypatch):
    monkeypatch.setattr(packed_block, name, function)
    must_fail(uneven, {GRADIENT}, path="fast")


def _rows_in_float8(patch: Patch) -> None:
    def forward(*args: Any) -> Any:
        summed, normed, *statistics = add_layer_norm_forward(*args)
        return summed, normed.to(torch.float8_e4m3fn).to(normed.dtype), *statistics

    patch.setattr(packed_block, "add_layer_norm_forward", forward)


def test_less_precision_than_the_reference_path_fails(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(AdamWEMA, "mirror", lambda *_: None)
        assert {RATIO, EACH} <= failures(GOLDEN, path="fast", dtype="bfloat16").keys()
    # found by the ratios alone
    _rows_in_float8(monkeypatch)
    assert failures(GOLDEN, path="fast", dtype="bfloat16").keys() == {RATIO, EACH}


def test_another_rounding_of_the_averages_fails(monkeypatch):
    """The recording's averages are float32, and their rounding a part of how far they move."""
    init = AdamWEMA.__init__

    def lerp(self: AdamWEMA, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "ema_form": "lerp"})

    monkeypatch.setattr(AdamWEMA, "__init__", lerp)
    assert failures(GOLDEN, path="fast").keys() == {MOVED}
