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
from torch import Tensor, nn

from ijepa_fast.comparison import FAST_LIMITS, LIMITS, RATIOS, Report
from ijepa_fast.fast import FastStep
from ijepa_fast.fast import block as packed_block
from ijepa_fast.fast import networks as packed
from ijepa_fast.fast import step as fast
from ijepa_fast.fast.attention import Pair, Sequences
from ijepa_fast.fast.block import PackedBlock
from ijepa_fast.fast.layout import Layout
from ijepa_fast.fast.networks import ContextEncoder, PackedPredictor
from ijepa_fast.parity import main, replay
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import StepValues
from ijepa_kernels import latent_loss, patchify, predictor_tokens
from ijepa_kernels.optim import AdamWEMA
from tests.trainer.recordings import GOLDEN, ODD, OTHERS, failures, record

RATIO, EACH = "against reference bf16", "against reference bf16, each"
MEMORY = ["none", "selective", "full"]


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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_recording_passes(dtype, memory, capsys):
    options = ["--path", "fast", "--dtype", dtype, "--memory", memory, "--device", "cpu"]
    assert main([str(GOLDEN), *options]) == 0
    out, err = capsys.readouterr()
    assert not err
    lines = out.splitlines()
    assert "FAIL" not in out
    assert lines[-1].startswith(f"PASS: fast path, {dtype}, ")
    assert lines[-1].endswith("comparisons, 0 failed, 0 tensors unused")
    # as many as of the reference path
    assert "gradient: 59 tensors, worst:" in lines
    assert "final weights: 87 tensors, worst:" in lines
    assert "target movement: 28 tensors, worst:" in lines
    ratios = [line for line in lines if line.startswith("all ")]
    if dtype == "float32":
        assert not ratios
        return
    names = ["losses (RMS of 8)", "gradients (RMS of 59)", "final weights (RMS of 87)"]
    for line, name in zip(ratios, names, strict=True):
        # name, ratio, limit, result
        assert line.startswith(f"all {name} ")
        ratio, limit, result = line.split()[-3:]
        assert 0.5 < float(ratio) <= 1.5
        assert (limit, result) == ("1.5", "ok")
    assert f"{EACH}: 146 tensors, worst:" in lines


@pytest.mark.parametrize(("changes", "lengths"), OTHERS.values(), ids=OTHERS)
def test_recordings_of_a_per_sequence_float64_loop_pass(changes, lengths, tmp_path, capsys):
    context, target = lengths
    path = record(tmp_path / "other.safetensors", context=context, target=target, **changes)
    assert main([str(path), "--path", "fast"]) == 0, capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks
def test_compiled_blocks_pass(uneven, monkeypatch):
    """Captured and differentiated as for Inductor, which itself takes a minute."""
    original, compiled = torch.compile, []

    def compile_(function, **options):
        compiled.append(function.__name__)
        return original(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    assert not failures(uneven, path="fast", compiled=True)
    torch._dynamo.reset()
    # of three networks
    assert sorted(compiled) == ["_after"] * 3 + ["_before"] * 3


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


def test_every_tensor_of_the_recording_has_its_row():
    """The same rows as of the reference path, and the ratios."""
    kinds = {}
    for path in ("reference", "fast"):
        report = replay(GOLDEN, dtype="bfloat16", path=path)
        assert report.ok
        kinds[path] = {(row.kind, row.name) for row in report.rows if row.kind not in (RATIO, EACH)}
    assert kinds["fast"] == kinds["reference"]
    tensors = {name for kind, name in kinds["fast"] if kind in ("gradient", "final weights")}
    assert {r.name.removesuffix(" (of reference)") for r in report.rows if r.kind == EACH} == (
        tensors
    )


def test_limits_are_the_agreed_ones():
    given, plain = FAST_LIMITS["float32"], LIMITS["float32"]
    assert (given.gradient, given.weights) == (5e-5, 5e-5)
    assert replace(given, gradient=plain.gradient, weights=plain.weights) == plain
    assert FAST_LIMITS["bfloat16"] == LIMITS["bfloat16"]
    assert (RATIOS.rms, RATIOS.tensor) == (1.5, 3.0)


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
    right = Layout.of

    def of(*args: Any, **kwargs: Any) -> Layout:
        layout = right(*args, **kwargs)
        return replace(layout, **change(layout))

    patch.setattr(Layout, "of", of)


def _other_functional(patch: Patch, **functions: Any) -> None:
    """Other functions for the packed networks, under the name F."""
    patch.setattr(packed_block, "F", SimpleNamespace(**{**vars(F), **functions}))


def _groups(patch: Patch, decays: Callable[[str, nn.Parameter], bool]) -> None:
    def parameter_groups(modules: list[nn.Module]) -> list[dict[str, object]]:
        named = [(n, p) for module in modules for n, p in module.named_parameters()]
        return [
            {"params": [p for n, p in named if decays(n, p)], "decays": True},
            {"params": [p for n, p in named if not decays(n, p)], "decays": False},
        ]

    patch.setattr(fast, "parameter_groups", parameter_groups)


def _values(patch: Patch, change: Callable[[StepValues], StepValues]) -> None:
    """Uses other values than the schedules say; the schedules themselves stay right."""
    update = FastStep.update
    patch.setattr(FastStep, "update", lambda self, values: update(self, change(values)))


def _ema_first(patch: Patch) -> None:
    update = FastStep.update

    @torch.no_grad()
    def early(self: FastStep, values: StepValues) -> None:
        for parameter in self.encoder.parameters():
            average = self.optimizer.state[parameter]["ema"]
            average.mul_(values.momentum).add_((1 - values.momentum) * parameter)
        update(self, replace(values, momentum=1.0))

    patch.setattr(FastStep, "update", early)


def _table_missing(patch: Patch, *, rows: bool, sequences: bool) -> None:
    """The predictor's position table, where `rows` and where `sequences` are made of it."""
    if sequences:
        patch.setattr(
            packed,
            "predictor_tokens",
            lambda c, m, t, *a, **k: predictor_tokens(c, m, 0 * t, *a, **k),
        )
    if rows:
        forward = PackedBlock.forward

        def without(
            self: PackedBlock, x: Tensor, pair: Pair, take: Any = None, distinct: Any = None
        ):
            if distinct is not None:
                table = self.settings.table  # type: ignore[attr-defined]
                distinct = (distinct[0] - table, distinct[1])
            return forward(self, x, pair, take, distinct)

        patch.setattr(PackedBlock, "forward", without)
        predict = PackedPredictor.forward

        def remember(self: PackedPredictor, z: Tensor, layout: Layout) -> Tensor:
            table = self.predictor_pos_embed[0]
            self.settings.table = torch.cat([table[layout.context_patch.long()], table])  # type: ignore[attr-defined]
            return predict(self, z, layout)

        patch.setattr(PackedPredictor, "forward", remember)


def _loss(patch: Patch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    patch.setattr(fast, "latent_loss", lambda *a, **k: latent_loss(*a, **change(k)))


def _last_block_sees_wanted_rows(patch: Patch, *, trained: bool) -> None:
    """The last block of the predictor (trained) or of the target encoder: keys and values of the
    wanted rows only.
    """
    finish = PackedBlock.finish

    def less(self: Any, x: Tensor, normed: Tensor, kv: Tensor, pair: Pair, take: Any) -> Tensor:
        if torch.is_grad_enabled() == trained:
            kv, pair = take(kv), Pair(pair.queries, pair.queries)
        return finish(self, x, normed, kv, pair, take)

    patch.setattr(PackedBlock, "finish", less)


class _GatherOnce(torch.autograd.Function):
    """Rows that are taken several times get the gradient of one of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        result = grad.new_zeros(ctx.count, grad.shape[1])
        result[index.long()] = grad
        return result, None


def _keys_gathered_once(patch: Patch) -> None:
    patch.setattr(packed_block, "gather_tokens", _GatherOnce.apply)


def _contexts_counted_once(patch: Patch) -> None:
    def tokens(context: Tensor, mask: Tensor, table: Tensor, *rest: Any, **options: Any) -> Any:
        # zero, with the rest of the gradient
        blocks = rest[1].shape[1]
        context = context.detach() + (context - context.detach()) / blocks
        return predictor_tokens(context, mask, table, *rest, **options)

    patch.setattr(packed, "predictor_tokens", tokens)


def _contexts_mixed_up(layout: Layout) -> dict[str, Any]:
    """Target rows in the order [target, image, context]."""
    blocks, images = layout.masks.target_index.shape[1], layout.num_images
    index = layout.loss_index.view(blocks, -1, images, layout.target_length)
    return {"loss_index": index.transpose(1, 2).flatten().contiguous()}


def _rolled(name: str, layout: Layout) -> dict[str, Any]:
    return {name: getattr(layout, name).roll(1)}


def _padding_seen(patch: Patch) -> None:
    patch.setattr(
        Sequences, "valid", property(lambda self: torch.ones(self.count, self.longest) > 0)
    )


def _no_final_norm(patch: Patch) -> None:
    forward = ContextEncoder.forward

    def without(self: ContextEncoder, *args: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as inner:
            # its weights get a gradient, of zero
            inner.setattr(packed, "norm", lambda n, x, dtype: x + 0 * n.weight + 0 * n.bias)
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


FORWARD, GRADIENT, LOSS, FINAL = "forward", "gradient", "loss", "final weights"
MOVED, SCHEDULE = "target movement", "schedule"
BEFORE = {SCHEDULE, FORWARD, GRADIENT}

# mistake; how it is made; kinds of rows that must fail; kinds that cannot
MISTAKES: dict[str, tuple[Callable[[Patch], None], set[str], set[str]]] = {
    "target rows shifted": (
        lambda p: _layout(p, partial(_rolled, "loss_index")),
        {FORWARD, GRADIENT, LOSS, FINAL},
        {SCHEDULE},
    ),
    "target rows of other contexts": (
        lambda p: _layout(p, _contexts_mixed_up),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "needed rows shifted": (
        lambda p: _layout(p, partial(_rolled, "needed")),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "context positions shifted": (
        lambda p: _layout(p, partial(_rolled, "context_patch")),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "first keys of other rows": (
        lambda p: _layout(p, partial(_rolled, "source")),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "no table in the predictor": (
        partial(_table_missing, rows=True, sequences=True),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "no table in the first keys": (
        partial(_table_missing, rows=True, sequences=False),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "no table in the sequences": (
        partial(_table_missing, rows=False, sequences=True),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "tanh gelu": (
        lambda p: _other_functional(p, gelu=partial(F.gelu, approximate="tanh")),
        {FORWARD, GRADIENT},
        {SCHEDULE},
    ),
    "second norm with eps 1e-6": (
        lambda p: p.setattr(fast, "TARGET_NORM_EPS", 1e-6),
        {FORWARD},
        {SCHEDULE},
    ),
    "second norm with eps 1e-6, in the loss alone": (
        lambda p: _loss(p, lambda k: k | {"eps": 1e-6}),
        {LOSS},
        {SCHEDULE, FORWARD},
    ),
    "another loss": (
        lambda p: _loss(p, lambda k: k | {"kind": "l2"}),
        {GRADIENT, LOSS},
        {SCHEDULE, FORWARD},
    ),
    "mean over other elements": (
        lambda p: _loss(p, lambda k: k | {"count": k["count"] / 3}),
        {GRADIENT, LOSS},
        {SCHEDULE, FORWARD},
    ),
    "target encoder sees wanted rows": (
        partial(_last_block_sees_wanted_rows, trained=False),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "predictor sees wanted rows": (
        partial(_last_block_sees_wanted_rows, trained=True),
        {FORWARD, GRADIENT, LOSS},
        {SCHEDULE},
    ),
    "repeated keys counted once": (_keys_gathered_once, {GRADIENT}, {SCHEDULE, FORWARD}),
    "repeated contexts counted once": (_contexts_counted_once, {GRADIENT}, {SCHEDULE, FORWARD}),
    "padding seen": (_padding_seen, {FORWARD, GRADIENT, LOSS}, {SCHEDULE}),
    "no final norm": (_no_final_norm, {FORWARD, GRADIENT, LOSS}, {SCHEDULE}),
    "colours reversed": (_colours_reversed, {FORWARD, GRADIENT, LOSS}, {SCHEDULE}),
    "mask token not decayed": (
        lambda p: _groups(p, lambda n, w: w.ndim >= 2 and n != "mask_token"),
        {FINAL},
        BEFORE,
    ),
    "biases and norms decayed": (lambda p: _groups(p, lambda n, w: True), {FINAL}, BEFORE),
    "nothing decayed": (lambda p: _groups(p, lambda n, w: False), {FINAL}, BEFORE),
    "ema before the update": (_ema_first, {MOVED}, BEFORE),
    "no ema": (lambda p: _values(p, lambda v: replace(v, momentum=1.0)), {MOVED}, BEFORE),
    "ema by half a percent less": (
        lambda p: _values(p, lambda v: replace(v, momentum=1 - 0.995 * (1 - v.momentum))),
        {MOVED},
        BEFORE,
    ),
    "learning rate off by one": (
        lambda p: _values(p, lambda v: replace(v, lr=v.lr * 1.01)),
        {FINAL},
        BEFORE,
    ),
    "weight decay off": (
        lambda p: _values(p, lambda v: replace(v, weight_decay=v.weight_decay + 0.1)),
        {FINAL},
        BEFORE,
    ),
}


@pytest.mark.parametrize(("make", "fails", "holds"), MISTAKES.values(), ids=MISTAKES)
def test_a_known_mistake_fails(make, fails, holds, uneven, monkeypatch):
    make(monkeypatch)
    failed = failures(uneven, path="fast")
    assert fails <= failed.keys()
    assert not holds & failed.keys()


def test_the_stand_ins_pass_without_a_mistake(uneven, monkeypatch):
    _layout(monkeypatch, lambda layout: {})
    _other_functional(monkeypatch)
    _groups(monkeypatch, lambda n, w: w.ndim >= 2)
    _values(monkeypatch, lambda values: values)
    _loss(monkeypatch, lambda options: options)
    assert not failures(uneven, path="fast")


# what the published recording, of one context, cannot know
OF_TWO_CONTEXTS = {"target rows of other contexts", "padding seen"}


@pytest.mark.parametrize("name", [name for name in MISTAKES if name not in OF_TWO_CONTEXTS])
def test_the_published_recording_finds_it_too(name, monkeypatch):
    make, fails, holds = MISTAKES[name]
    make(monkeypatch)
    failed = failures(GOLDEN, path="fast")
    assert failed.keys() & (fails | {FINAL})
    assert not holds & failed.keys()


class _GeluLinear(packed_block._GeluLinear):
    """Recomputes the tanh approximation."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        inner = torch.ops.aten.gelu_backward(grad @ weight, h, approximate="tanh")
        return inner, grad.t() @ F.gelu(h, approximate="tanh"), grad.sum(0)


class _NormLinear(packed_block._NormLinear):
    """Recomputes the norm without gain and shift."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, _, _, mean, rstd, _ = ctx.saved_tensors
        normed = (x.float() - mean) * rstd
        grads = packed_block._NormLinear.backward(ctx, grad)
        return *grads[:4], grad.t() @ normed.to(grad.dtype), grads[5]


@pytest.mark.parametrize(
    ("name", "function"), [("_gelu_linear", _GeluLinear), ("_norm_linear", _NormLinear)]
)
def test_a_wrong_recomputation_fails(name, function, uneven, monkeypatch):
    monkeypatch.setattr(packed_block, name, function.apply)
    assert replay(uneven, path="fast").ok
    failed = failures(uneven, path="fast", memory="selective")
    assert GRADIENT in failed
    assert not {SCHEDULE, FORWARD} & failed.keys()


def _stale_copies(patch: Patch) -> None:
    patch.setattr(AdamWEMA, "mirror", lambda *_: None)


def _norms_in_half(patch: Patch) -> None:
    def norm(layer: nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
        weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
        return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, layer.eps)

    patch.setattr(packed_block, "norm", norm)
    patch.setattr(packed, "norm", norm)


@pytest.mark.parametrize("make", [_stale_copies, _norms_in_half])
def test_less_precision_than_the_reference_path_fails(make, monkeypatch):
    make(monkeypatch)
    failed = failures(GOLDEN, path="fast", dtype="bfloat16")
    assert {RATIO, EACH} <= failed.keys()


def test_norms_in_bfloat16_are_found_by_the_ratios_alone(monkeypatch):
    _norms_in_half(monkeypatch)
    assert failures(GOLDEN, path="fast", dtype="bfloat16").keys() == {RATIO, EACH}


def test_another_rounding_of_the_averages_fails(monkeypatch):
    """The recording's averages are float32, and their rounding a part of how far they move."""
    init = AdamWEMA.__init__

    def lerp(self: AdamWEMA, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "ema_form": "lerp"})

    monkeypatch.setattr(AdamWEMA, "__init__", lerp)
    assert failures(GOLDEN, path="fast").keys() == {MOVED}
