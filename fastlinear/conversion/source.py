"""How the methods of a class use the parts of a module, by what their source says."""

import ast
import functools
import inspect
import textwrap
from collections import Counter, defaultdict
from itertools import pairwise
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any, NamedTuple

from torch import nn

_CONTAINERS = {nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict}
_NOT_READ = ("abc", "builtins", "torch", "typing")  # packages whose classes name no parts of ours
# By these a module gives its parts, or gets others, without that its code names them.
_UNNAMED = {"_modules", "__dict__", "__getattr__", "__getattribute__", "__setattr__", "apply"}
_UNNAMED |= {"children", "modules", "named_children", "named_modules", "get_submodule"}
_UNNAMED |= {"add_module", "register_module", "set_submodule"}
_SCOPES = {"eval", "exec", "globals", "locals", "vars"}  # by these, code has variables unnamed
_DATA = {"weight", "bias", "in_features", "out_features"}  # who asks for them calls nothing
# What else may read a variable after a return.
_LATER = (
    *(ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.GeneratorExp),
    *(ast.Global, ast.Nonlocal, ast.ExceptHandler),
)


class Use(NamedTuple):
    """Where the code says `self.name`.

    how: "call", of it; "items", calls of what it contains; "data", tensors of it; or "other".
    before, after: the names of the parts that alone give the call its input and get its output.
    """

    how: str
    before: str | None = None
    after: str | None = None


class Source(NamedTuple):
    """What the code says, by the names of parts.

    near: what is called on their outputs, directly or not.
    unknown: why it cannot be told what the code does with the parts, if so.
    """

    uses: dict[str, list[Use]]
    near: dict[str, set[str]]
    unknown: str | None = None


def read(kind: type[nn.Module]) -> Source:
    """What the methods of `kind` say."""
    source = Source(defaultdict(list), defaultdict(set))
    packages = {base: base.__module__.partition(".")[0] for base in kind.__mro__}
    own = [base for base, package in packages.items() if package not in _NOT_READ]
    for base in packages.keys() - _CONTAINERS:
        if packages[base] == "torch" and (own or not base.__module__.startswith("torch.nn.")):
            return source._replace(unknown=f"{kind.__name__} runs code of {base.__module__}")
    for base in own:
        for name, member in vars(base).items():
            if isinstance(member, (GetSetDescriptorType, MemberDescriptorType)):
                continue
            functions = [member]
            if isinstance(member, property):
                functions = [member.fget, member.fset, member.fdel]
            elif isinstance(member, functools.cached_property):
                functions = [member.func]
            for function in functions:
                why = _read_function(function, source)
                if name in _UNNAMED:
                    why = "decides what names mean"
                if why is not None:
                    return source._replace(unknown=f"{base.__name__}.{name} {why}")
    return source


def tree_of(function: FunctionType) -> Any:
    """What the source of `function` says; None where there is none that can be read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, TypeError, ValueError, IndexError):
        return None


def _read_function(function: Any, source: Source) -> str | None:
    """Adds to `source` what a method says, or returns why that cannot be told."""
    if isinstance(function, (type, staticmethod, classmethod)):
        return None
    if not isinstance(function, FunctionType):
        opaque = callable(function) or hasattr(function, "__get__")
        return "is no plain function" if opaque else None
    code = function.__code__
    if code.co_freevars not in ((), ("__class__",)) or hasattr(function, "__wrapped__"):
        return "is decorated, or has variables of a function around it"
    tree = tree_of(function)
    if getattr(tree, "name", None) != code.co_name or not code.co_argcount:
        return "has no source that can be read"
    me = code.co_varnames[0]
    around: dict[Any, Any] = {
        node: outer for outer in ast.walk(tree) for node in ast.iter_child_nodes(outer)
    }
    after = _outputs(tree, me)
    before = {taker: giver for giver, taker in after.items()}
    items = _looped_over(tree)
    _add_near(tree, me, source.near)
    is_init = tree.name == "__init__"  # it has run: what it has set is there to be looked at
    for node in ast.walk(tree):
        outer: Any = around.get(node)
        match node:
            case ast.Name(id=name) if name in _SCOPES:
                return f"calls {name}"
            case ast.Attribute(attr=name) if _is_unnamed(name) and not is_init:
                if ast.unparse(node.value).partition("(")[0] in (me, "super"):
                    return f"asks for {name}"
            case ast.Name(id=name) if name == me and not isinstance(outer, ast.Attribute):
                if not (isinstance(outer, ast.Call) and ast.unparse(outer.func) == "super"):
                    return f"hands on {me}, and so all of its parts"
            case ast.Name(id=name) if name == me:
                user = around[outer]
                if is_init and (isinstance(outer.ctx, ast.Store) or _is_told(outer, around)):
                    continue
                use = Use("other")
                if isinstance(user, ast.Attribute) and user.attr in _DATA:
                    use = Use("data")
                elif isinstance(user, ast.Call) and user.func is outer:
                    giver, taker = before.get(user), after.get(user)
                    use = Use("call", _part(giver, me), _part(taker, me))
                elif outer in items or _is_item_called(outer, around):
                    use = Use("items")
                source.uses[outer.attr].append(use)
    return None


def _part(node: ast.AST | None, me: str) -> str | None:
    """The name of the part that is called, if `node` is `self.name(...)`."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=root), attr=name)) if root == me:
            return name
    return None


def _is_unnamed(name: str) -> bool:
    """Whether a module's attribute gives parts of other names, as private ones do."""
    return name in _UNNAMED or (name.startswith("__") and not name.endswith("__"))


def _is_told(part: Any, around: dict[Any, Any]) -> bool:
    """Whether `part` stands in a statement `part.append(...)`, or of another method."""
    call = around[around[part]]
    return (
        isinstance(call, ast.Call)
        and isinstance(around[call], ast.Expr)
        and (isinstance(call.func, ast.Attribute) and call.func.value is part)
    )


def _is_item_called(part: Any, around: dict[Any, Any]) -> bool:
    """Whether `part` stands in `part[0](...)`, or in `len(part)`."""
    user = around[part]
    if isinstance(user, ast.Call):
        return ast.unparse(user.func) == "len"
    call = around[user]
    return isinstance(user, ast.Subscript) and isinstance(call, ast.Call) and call.func is user


def _outputs(tree: ast.AST, me: str) -> dict[ast.AST, ast.AST]:
    """The calls of parts whose output goes to the call of a part and nowhere else, with that call.

    These are `self.b(self.a(x))`, and `h = self.a(x)` with nothing between it and `h = self.b(h)`
    or `return self.b(h)`; these alone where nothing else in the function can outlive it and read h.
    """
    found: dict[ast.AST, ast.AST] = {}
    nodes = list(ast.walk(tree))
    for node in nodes:
        match node:
            case ast.Call(args=[giver], keywords=[]) if _part(node, me) and _part(giver, me):
                found[giver] = node
    if any(
        isinstance(node, _LATER) or getattr(node, "finalbody", None)
        for node in nodes
        if node is not tree
    ):
        return found
    blocks = [getattr(node, field, None) for node in nodes for field in ("body", "orelse")]
    for block in blocks:
        for pair in pairwise(block if isinstance(block, list) else []):
            match pair:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=giver),
                    ast.Assign(value=ast.Call(args=[ast.Name(id=given)], keywords=[]) as taker)
                    | ast.Return(value=ast.Call(args=[ast.Name(id=given)], keywords=[]) as taker),
                ) if name == given and _part(giver, me) and _part(taker, me):
                    targets = getattr(pair[1], "targets", pair[0].targets)
                    if [ast.unparse(target) for target in targets] == [name]:
                        found[giver] = taker
    return found


def _looped_over(tree: ast.AST) -> set[ast.AST]:
    """What is looped over by a variable that is called, and nothing else."""
    nodes = list(ast.walk(tree))
    called = {node.func for node in nodes if isinstance(node, ast.Call)}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    other = {node.id for node in names if isinstance(node.ctx, ast.Load) and node not in called}
    loops = [node for node in nodes if isinstance(node, (ast.For, ast.comprehension))]
    return {loop.iter for loop in loops if getattr(loop.target, "id", None) not in {*other, None}}


def _add_near(tree: ast.AST, me: str, near: dict[str, set[str]]) -> None:
    """Adds the names of what is called on an output, if by a variable that is set once.

    What is no part is in there as "()" and its name. This is for the reasons alone.
    """
    nodes = list(ast.walk(tree))
    stores = Counter(
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    named: dict[str, ast.AST] = {}
    for node in nodes:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.NamedExpr(target=ast.Name(id=name), value=value)
            ) if stores[name] == 1:
                named[name] = value
    for node in nodes:
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func).rpartition(".")[2]
            for giver in (*node.args[:1], getattr(node.func, "value", None)):
                giver = giver.value if isinstance(giver, ast.NamedExpr) else giver
                part = _part(named.get(getattr(giver, "id", ""), giver), me)
                if part is not None:
                    near[part].add(_part(node, me) or f"(){function}")
