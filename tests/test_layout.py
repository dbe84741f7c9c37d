"""The house rules that a machine can check: who imports whom, what importing does, sizes."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINER = sorted((ROOT / "ijepa_fast").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
PACKAGES = [*TRAINER, *KERNELS]

# rooms, from the ground up; each imports from its own floor or from lower ones, never in a circle
FLOORS = (
    ("_torch", "keyed_random", "errors", "atomic", "config", "__main__"),
    ("model", "masks", "schedules", "data", "callbacks"),
    ("ranks",),
    ("reference", "estimate", "state"),
    ("fast", "weights"),
    ("step",),
    ("evaluation",),
    ("visualize",),
    ("run", "settings"),
    ("verify", "doctor"),
    ("train",),
)
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}


def _module(path):
    """`ijepa_fast/data/order.py` -> `ijepa_fast.data.order`."""
    base = ROOT / "kernels" if path in KERNELS else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path): path for path in PACKAGES}


def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(path):
    """Full names of what a file imports, inside functions and under TYPE_CHECKING too.

    `from a.b import c` is a.b.c where that is a module of ours, else a.b.
    """
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found


def _ours(path, package):
    """Imported modules of one of the packages."""
    return {n for n in _imports(path) if n == package or n.startswith(package + ".")}


def _part(name):
    """`ijepa_fast.data.order` -> `data`; the package itself -> ''."""
    return name.split(".")[1] if "." in name else ""


def _last(name):
    """`ijepa_kernels.optim._table` -> `_table`."""
    return name.rpartition(".")[2]


def _ids(paths):
    return [_module(path) for path in paths]


# --- who imports whom ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", KERNELS, ids=_ids(KERNELS))
def test_kernels_need_torch_and_triton_only(path):
    allowed = {"torch", "triton", "ijepa_kernels", *sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in _imports(path)} <= allowed


# these gather the ops, or test them
GATHERERS = {"average", "ijepa_kernels", "optim", "optimizer", "plan", "testing"}


@pytest.mark.parametrize("path", KERNELS, ids=_ids(KERNELS))
def test_no_op_imports_another(path):
    if _last(_module(path)) in GATHERERS:
        return
    # what several ops share starts with an underscore
    assert all(_last(name).startswith("_") for name in _ours(path, "ijepa_kernels"))


def test_the_reference_path_is_free_of_kernels():
    """And whatever it imports."""
    seen, pending = set(), ["ijepa_fast.reference"]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        assert not _ours(MODULES[name], "ijepa_kernels"), name
        # the package's own names are imported when they are asked for
        pending += _ours(MODULES[name], "ijepa_fast") - {"ijepa_fast"}
    assert {"ijepa_fast.model", "ijepa_fast.masks"} < seen


@pytest.mark.parametrize("path", TRAINER, ids=_ids(TRAINER))
def test_arrows_point_down(path):
    part = _part(_module(path))
    if part == "":
        # names for type checkers alone: `test_importing_is_quiet_and_changes_nothing` imports it
        return
    assert part in FLOOR, f"{part} has no floor yet: add it to FLOORS"
    for name in _ours(path, "ijepa_fast"):
        imported = _part(name)
        assert imported == "" or FLOOR[imported] <= FLOOR[part], f"{part} imports {imported}"


@pytest.mark.parametrize("path", TRAINER, ids=_ids(TRAINER))
def test_rooms_are_entered_by_the_door(path):
    """What another room may use of one stands in its `__init__.py`."""
    part = _part(_module(path))
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            _, _, rest = node.module.partition("ijepa_fast.")
            room, _, inside = rest.partition(".")
            # the package's own names may stand behind a door, as `weights.export` does
            assert not inside or room == part or not part, f"line {node.lineno}: {node.module}"


def test_no_module_imports_itself_in_a_circle():
    edges = {name: _ours(path, name.partition(".")[0]) for name, path in MODULES.items()}
    # a package's __init__ gathers its modules; they reach each other past it
    gathered = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(edges.get(name, set()) - gathered - {name}):
                visit(other, [*above, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])


def test_data_knows_nothing_of_training():
    for path in TRAINER:
        if _part(_module(path)) == "data":
            parts = {_part(name) for name in _ours(path, "ijepa_fast")}
            assert parts <= {"__main__", "atomic", "data", "config", "errors", "keyed_random"}, path


@pytest.mark.parametrize("path", TRAINER, ids=_ids(TRAINER))
def test_private_api_of_pytorch_stands_in_one_file(path):
    private = re.compile(r"(torch|aten|dist)(\.\w+)*\._[a-z]\w*")
    names = [ast.unparse(n) for n in ast.walk(_tree(path)) if isinstance(n, ast.Attribute)]
    assert not [name for name in names if private.fullmatch(name)]


def test_files_of_pytorch_are_read_as_plain_values():
    """The one place where ruff allows `torch.load`."""
    nodes = ast.walk(_tree(MODULES["ijepa_fast.weights.read"]))
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert calls
    for call in calls:
        assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords]


# --- what importing does -------------------------------------------------------------------------

PROBE = """
import os, sys, threading
environment = dict(os.environ)
import torch
import triton, triton.language  # what it brings along is its own affair
grad, threads = torch.is_grad_enabled(), torch.get_num_threads()

def settings():
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
        torch.get_num_threads(), torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
        torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled(),
        torch.initial_seed(), torch.random.get_rng_state().sum().item(),
    )

before, alive, modules = settings(), threading.active_count(), set(sys.modules)
import ijepa_fast, ijepa_kernels
new = {n.partition(".")[0] for n in set(sys.modules) - modules}
assert new <= {"ijepa_fast", "ijepa_kernels"}, new
for name in %r:
    __import__(name)
after = settings()
assert before == after, (before, after)
assert threading.active_count() == alive
assert dict(os.environ) == environment
assert not torch.cuda.is_initialized()
unwanted = {"nvidia.dali", "PIL", "matplotlib", "tensorboard", "transformers", "xformers"}
unwanted |= {"mlflow", "wandb"}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""


def test_importing_is_quiet_and_changes_nothing(tmp_path):
    """Every module of both packages."""
    names = [name for name in MODULES if not name.endswith("__main__")]
    result = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", PROBE % names],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", "")
    assert not list(tmp_path.iterdir())


def test_the_environment_is_read_by_the_launcher_only():
    readers = {
        _module(path)
        for path in PACKAGES
        if re.search(r"\bos\.(environ|getenv)\b", path.read_text(encoding="utf-8"))
    }
    # torchrun's variables; where the cache lies
    assert readers <= {
        "ijepa_fast.ranks.distributed",
        "ijepa_fast.train",
        "ijepa_fast.__main__",
        "ijepa_fast.data.sets.idx",
    }


def test_hugging_face_kernels_stays_importable(tmp_path):
    """A regular package `kernels` anywhere on the path wins over the folder in the repository."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): return 'theirs'\n")
    code = "import kernels; print(kernels.__file__); print(kernels.get_kernel())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "kernels" / "__init__.py"), "theirs"]


# --- sizes, words, version -----------------------------------------------------------------------


def test_no_file_without_a_subject():
    assert not [p for p in PACKAGES if p.name in ("utils.py", "helpers.py", "common.py")]


@pytest.mark.parametrize("path", PACKAGES, ids=_ids(PACKAGES))
def test_a_module_says_what_it_offers(path):
    """By `__all__`; ruff holds that the names exist (F822)."""
    assigned = [node for node in _tree(path).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    offers = any(ast.unparse(node).startswith("__all__") for node in assigned)
    assert offers or _module(path) in ("ijepa_fast", "ijepa_kernels")


def test_every_kernel_has_its_parts():
    """Op file, export, test, benchmark, catalogue row."""
    ops = [
        path.stem
        for path in KERNELS
        if _last(_module(path)) not in GATHERERS and not path.stem.startswith("_")
    ]
    exports = "".join(path.read_text() for path in KERNELS if path.name == "__init__.py")
    tested = "".join(path.read_text() for path in (ROOT / "tests" / "ops").glob("test_*.py"))
    catalogue = (ROOT / "kernels" / "README.md").read_text()
    for op in ops:
        assert f".{op} import" in exports, op
        assert f".{op} import" in tested, op
        assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file(), op
        # ops in place end in an underscore
        assert f"`{op}`" in catalogue or f"`{op}_`" in catalogue, op
