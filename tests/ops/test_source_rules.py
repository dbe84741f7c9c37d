"""House rules for kernels that can be read off their source: what no test on small tensors shows,
and what only some GPUs or some sizes would punish.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

import ijepa_kernels
from tests.ops.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="reads the same source in every lane")

FILES = sorted(Path(ijepa_kernels.__file__).parent.rglob("*.py"))
# these hold no op
GATHERERS = {"__init__", "average", "optimizer", "plan", "testing"}


def _functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def _jitted(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {
        name: function
        for name, function in _functions(tree).items()
        if any(re.match(r"triton\.jit\b", ast.unparse(d)) for d in function.decorator_list)
    }


def _calls(node: ast.AST, names: str) -> Iterator[ast.Call]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and re.fullmatch(names, ast.unparse(call.func)):
            yield call


def _text(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute) else ""


def _at(node: ast.expr) -> str:
    return f"line {node.lineno}: {ast.unparse(node)}"


# --- the simple rules ----------------------------------------------------------------------------


def program_ids_are_int64(tree, _):
    """`tl.program_id(k).to(tl.int64)`, at once: a product of int32 wraps past 2^31 elements."""
    widened = {
        call.func.value
        for call in _calls(tree, r".*\.to")
        if isinstance(call.func, ast.Attribute)
        and [ast.unparse(a) for a in call.args] == ["tl.int64"]
    }
    yield from (_at(call) for call in _calls(tree, r"tl\.program_id") if call not in widened)


def no_atomics(tree, _):
    """The order of atomic additions is the hardware's: other bits every time."""
    yield from (_at(call) for call in _calls(tree, r"(.*\.)?atomic_\w+"))


def no_autotuning(tree, _):
    """Autotuned kernels cannot run in the interpreter; launch tables are functions."""
    for name, function in _functions(tree).items():
        for decorator in function.decorator_list:
            if re.search(r"\b(autotune|heuristics)\b", ast.unparse(decorator)):
                yield f"{name}: {ast.unparse(decorator)}"


def kernels_are_called_kernel(tree, _):
    """`_<...>_kernel` is what is launched, and nothing else is called so: the static gate looks
    for these names.
    """
    jitted = _jitted(tree)
    for call in _calls(tree, ".*"):
        if isinstance(call.func, ast.Subscript):
            launched = {ast.unparse(call.func.value)}
        elif ast.unparse(call.func) == "run":
            inside = chain.from_iterable(map(ast.walk, call.args))
            launched = {node.id for node in inside if isinstance(node, ast.Name)}
        else:
            continue
        for name in launched & set(jitted):
            if not re.fullmatch(r"_\w+_kernel", name):
                yield f"{name} is launched"
    yield from (name for name in jitted if not name.startswith("_"))
    yield from (n for n in _functions(tree) if n.endswith("_kernel") and n not in jitted)


def kernels_are_launched_held(tree, name):
    """By `_launch.run`: Triton's own launch costs the host twice the time."""
    if name == "_launch":
        return
    for call in _calls(tree, r".*_kernel\[.*\]"):
        yield _at(call)


def private_torch_is_in_one_file(tree, name):
    """In `_torch.py`, with what replaces it."""
    for node in ast.walk(tree):
        private = re.fullmatch(r"(torch|forward_ad)(\.\w+)*\._[a-zA-Z]\w*", _text(node))
        if private and name != "_torch":
            yield _text(node)


def other_functions_are_annotated(tree, _):
    """All arguments and the result, of methods too."""
    jitted = set(_jitted(tree).values())
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function in jitted:
            continue
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        for argument in arguments:
            if argument.annotation is None and argument.arg not in ("self", "cls"):
                yield f"{function.name}({argument.arg})"
        if function.returns is None:
            yield f"{function.name} -> ?"


def no_half_precision_inside(tree, _):
    """Kernels compute in float32 whatever the tensors are; outputs name their own dtype."""
    for function in _jitted(tree).values():
        for node in ast.walk(function):
            half = ("tl.float16", "tl.bfloat16")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in half:
                yield f"{function.name}, {_at(node)}"


def ops_have_reference_and_bytes(tree, name):
    """`<op>_ref` and `<op>_bytes` in the op's file."""
    if name in GATHERERS or name.startswith("_"):
        return
    wanted = {f"{name}_ref", f"{name}_bytes"}
    yield from wanted - set(_functions(tree))


# --- rules that follow values --------------------------------------------------------------------

# what an integer may be: a constant or bounded by one, an int32 known at run time only, an int64,
# and a product that was taken in int32 and may have wrapped
BOUNDED, NARROW, WIDE, WRAPPED = range(4)

# names whose products stay far below 2^31: tensors in a list, a group of pixels within a patch
SMALL = {"L", "group"}


class _Value(NamedTuple):
    size: int
    many: bool = False  # a tensor of them: comes from a tl.arange
    table: bool = False  # an address within a table of int64, see ijepa_kernels/optim/_table.py


def _together(values: Iterable[_Value]) -> _Value:
    """Of a sum and the like: the wider type counts, what has wrapped stays wrapped."""
    values = list(values)
    size = max((v.size for v in values), default=BOUNDED)
    return _Value(size, any(v.many for v in values), any(v.table for v in values))


def _either(first: _Value, second: _Value) -> _Value:
    """Of a name that two paths assign: the worse."""
    order = (BOUNDED, WIDE, NARROW, WRAPPED)
    return _together([first, second])._replace(size=max(first.size, second.size, key=order.index))


class _Walk:
    """Runs one jitted function on such values, in the order of the source; loops twice, both arms
    of an if, helpers with the values that they are called with.
    """

    def __init__(self, jitted: dict[str, ast.FunctionDef], name: str) -> None:
        self.jitted, self.name = jitted, name
        self.unmasked: set[str] = set()
        self.wrapped: set[str] = set()

    def run(self, given: list[_Value]) -> list[_Value]:
        """What the function returns; one value for each element of a tuple."""
        self.names: dict[str, _Value] = {}
        self.results: list[_Value] = []
        for position, argument in enumerate(self.jitted[self.name].args.args):
            constant = argument.annotation and "constexpr" in ast.unparse(argument.annotation)
            value = given[position] if position < len(given) else _Value(NARROW)
            self.assign(ast.Name(argument.arg), [_Value(BOUNDED) if constant else value])
        if {"table_ptr", "L"} <= set(self.names):
            self.names["table_ptr"] = _Value(NARROW, table=True)
        self.block(self.jitted[self.name].body)
        return self.results

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[target], value=value):
                self.assign(target, self.values(value))
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.assign(target, self.values(value))
            case ast.AugAssign(target=target, op=op, value=value):
                self.assign(target, [self.value(ast.BinOp(target, op, value))])
            case ast.If(test=test, body=body, orelse=orelse):
                self.value(test)
                before = dict(self.names)
                self.block(body)
                after, self.names = self.names, before
                self.block(orelse)
                self.names = {
                    n: _either(after.get(n, v), self.names.get(n, v))
                    for n, v in (after | self.names).items()
                }
            case ast.For(target=target, iter=iter, body=body):
                for _ in range(2):
                    self.assign(target, [self.value(iter)])
                    self.block(body)
            case ast.While(body=body):
                self.block(body * 2)
            case ast.Return(value=ast.expr() as value):
                values = self.values(value)
                known = self.results or values
                self.results = [_either(*pair) for pair in zip(known, values, strict=True)]
            case ast.Expr(value=value):
                self.value(value)

    def assign(self, target: ast.expr, values: list[_Value]) -> None:
        if isinstance(target, ast.Tuple):
            for i, element in enumerate(target.elts):
                self.assign(element, [values[i] if len(values) > 1 else values[0]])
        else:
            name, value = ast.unparse(target), _together(values)
            self.names[name] = value._replace(size=BOUNDED) if name in SMALL else value

    def values(self, node: ast.expr) -> list[_Value]:
        """Of a tuple, or of a helper that returns one; else a single value."""
        if isinstance(node, ast.Tuple):
            return [self.value(element) for element in node.elts]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in self.jitted:
            return self.helper(node)
        return [self.value(node)]

    def value(self, node: ast.AST) -> _Value:
        match node:
            case ast.Name(id=name):
                return self.names.get(name, _Value(BOUNDED))
            case ast.BinOp(left=left, op=op, right=right):
                result = _together([self.value(left), self.value(right)])
                if isinstance(op, ast.Mod) and self.value(right).size == BOUNDED:
                    return result._replace(size=BOUNDED)
                wraps = isinstance(op, ast.Mult) and result.size == NARROW
                return result._replace(size=WRAPPED) if wraps else result
            case ast.Compare(left=left, comparators=comparators):
                return _together(map(self.value, [left, *comparators]))._replace(size=BOUNDED)
            case ast.Call():
                return self.call(node)
            case ast.Subscript(value=value):
                return self.value(value)
            case ast.IfExp(body=body, orelse=orelse):
                return _either(self.value(body), self.value(orelse))
            case ast.Tuple() | ast.UnaryOp() | ast.BoolOp():
                return _together(map(self.value, ast.iter_child_nodes(node)))
            case _:
                return _Value(BOUNDED)

    def call(self, node: ast.Call) -> _Value:
        name = ast.unparse(node.func)
        if name in self.jitted:
            return _together(self.helper(node))
        arguments = [self.value(a) for a in [*node.args, *(k.value for k in node.keywords)]]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            value = self.value(node.func.value)
            dtypes = {ast.unparse(argument) for argument in node.args}
            if "tl.int64" in dtypes and value.size != WRAPPED:
                return value._replace(size=WIDE)
            return value._replace(size=NARROW) if value.size == WIDE else value
        if name in ("tl.load", "tl.store"):
            self.access(node, arguments[0])
            return _Value(WIDE if arguments[0].table else NARROW, arguments[0].many)
        if name == "tl.arange":
            return _Value(BOUNDED, many=True)
        if name in ("tl.program_id", "tl.num_programs"):
            return _Value(NARROW)
        if name == "range":
            # how far a loop goes does not make its start wrap
            start = arguments[0] if len(arguments) > 1 else _Value(BOUNDED)
            others = [v._replace(size=NARROW) if v.size == WRAPPED else v for v in arguments]
            return _together([start, *others[len(arguments) > 1 :]])
        if name == "tl.where":
            arguments[0] = arguments[0]._replace(size=BOUNDED)
        result = _together(arguments)
        if name == "tl.minimum" and BOUNDED in (argument.size for argument in arguments):
            return result._replace(size=BOUNDED)
        return result

    def helper(self, node: ast.Call) -> list[_Value]:
        walk = _Walk(self.jitted, ast.unparse(node.func))
        results = walk.run([self.value(argument) for argument in node.args])
        self.unmasked |= walk.unmasked
        self.wrapped |= walk.wrapped
        return results or [_Value(BOUNDED)]

    def access(self, node: ast.Call, address: _Value) -> None:
        second = 1 if ast.unparse(node.func) == "tl.load" else 2
        masks = [k.value for k in node.keywords if k.arg == "mask"] + node.args[second:][:1]
        if address.many and all(isinstance(mask, ast.Constant) for mask in masks):
            self.unmasked.add(f"{self.name}, {_at(node)}")
        if address.size == WRAPPED:
            self.wrapped.add(f"{self.name}, {_at(node)}")


def _walked(tree: ast.Module) -> Iterator[_Walk]:
    jitted = _jitted(tree)
    called = {ast.unparse(call.func) for call in _calls(tree, r"\w+")}
    for name in jitted:
        if name.endswith("_kernel"):
            walk = _Walk(jitted, name)
            walk.run([])
            yield walk
        elif name not in called:
            # somebody else's helper: anything may be given to it
            walk = _Walk(jitted, name)
            walk.run([_Value(NARROW, many=True)] * len(jitted[name].args.args))
            yield walk


def accesses_of_many_are_masked(tree, _):
    """A load or store whose address comes from a `tl.arange` has a mask. One of a single element
    needs none: the size of the grid keeps its program id in range.
    """
    for walk in _walked(tree):
        yield from walk.unmasked


def offsets_are_multiplied_in_int64(tree, _):
    """No address contains a product with an int32 known at run time only, such as a loaded index
    that was not widened first.
    """
    for walk in _walked(tree):
        yield from walk.wrapped


# --- the tests -----------------------------------------------------------------------------------

RULES = (
    program_ids_are_int64,
    no_atomics,
    no_autotuning,
    kernels_are_called_kernel,
    kernels_are_launched_held,
    private_torch_is_in_one_file,
    other_functions_are_annotated,
    no_half_precision_inside,
    ops_have_reference_and_bytes,
    accesses_of_many_are_masked,
    offsets_are_multiplied_in_int64,
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule, path):
    assert not list(rule(ast.parse(path.read_text(encoding="utf-8")), path.stem)), rule.__doc__
