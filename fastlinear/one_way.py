"""Whether code goes one way, whatever it is called with: what a trace cannot tell by itself.

A trace shows one way through a forward. That others do not differ is proven by its bytecode: it has
no branch, and no loop but over the modules of a container. It may ask whether an argument is None.
"""

import builtins
import dis
import functools
import inspect
import sys
import sysconfig
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import nn

_LISTS = (nn.ModuleList, nn.ModuleDict)  # which have no forward of their own
_PACKAGES = ("site-packages", "dist-packages")
_OURS = tuple(str(Path(file).parent) for file in (torch.__file__, __file__))
_STDLIB = (*(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")), "<frozen ")

# These choose by a value, or give modules by other ways than their names.
_FUNCTIONS = {"eval", "exec", "filter", "getattr", "globals", "iter", "locals", "map", "max", "min"}
_FUNCTIONS |= {"next", "reversed", "sorted", "vars"}
_ATTRIBUTES = {"children", "get_submodule", "modules", "named_children", "named_modules"}
_ATTRIBUTES |= {"__dict__", "__getattr__", "__getitem__", "_modules"}
_CHOOSERS = {"attrgetter", "choice", "get", "itemgetter", "permutation", "pop", "popleft"}
# Loops but `for`, what catches an exception, and what brings in values from elsewhere.
_UNSEEN = ("SEND", "GET_AITER", "MATCH_", "SETUP_FINALLY", "IMPORT_", "YIELD_")
_CHOSEN = ("LOAD_CONST", "LOAD_SMALL_INT", "BUILD_SLICE", "BUILD_TUPLE")


class Unproven(ValueError):
    """Why a trace does not stand for every call."""


class _Way(NamedTuple):
    """What a function's one way depends on.

    asked: the arguments that it asks whether they are None.
    loops: the names by which it gets to what it loops over, the first an argument's.
    outer: the names that are neither its arguments nor its variables.
    """

    asked: set[str]
    loops: list[list[str]]
    outer: set[str]


def settings(module: nn.Module) -> dict[str, Any]:
    """The values that have been set on `module`: not its parts, nor functions."""
    if type(module).__module__.startswith("fastlinear."):
        return {}
    own = vars(nn.Module()).keys() - {"training"}
    found = {
        name: value
        for name, value in vars(module).items()
        if name not in own and not callable(value) and not name.startswith("_fastlinear")
    }
    for name, value in found.items():
        values = value.values() if isinstance(value, dict) else value
        if isinstance(value, (dict, list, set, tuple)) and any(
            isinstance(one, nn.Module) for one in values
        ):
            raise Unproven(f"{name} has modules in it that are not registered")
    return found


@contextmanager
def only(optional: Collection[str]) -> Iterator[None]:
    """Fails unless the model's code that runs within went the one way that it can go.

    That is for arguments of the model that are tensors, but for `optional`: whether these are given
    or not is for the caller to try.
    """
    found: list[str] = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and not found and _is_the_models(frame):
            why = _why_not(frame, optional)
            if why is not None:
                found.append(f"{frame.f_code.co_name} {why}")

    before = sys.gettrace()  # not the profiler's: cProfile's could not be set again
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
    if found:
        raise Unproven(found[0])


def _is_the_models(frame: FrameType | None) -> bool:
    """Whether this is not torch's code, nor called by torch's."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_STDLIB) or any(folder in file for folder in _PACKAGES):
            return not file.startswith(_OURS)
        frame = frame.f_back
    return False


def _why_not(frame: FrameType, optional: Collection[str]) -> str | None:
    """What sends the code of `frame`, which is about to run, another way in another call."""
    way = _way_of(frame.f_code)
    if isinstance(way, str):
        return way
    if frame.f_code.co_name == "__exit__":
        return "may catch exceptions"
    values = frame.f_locals
    for name in way.asked:
        value = values[name]
        if isinstance(value, torch.fx.Proxy):
            if value.node.op == "placeholder" and value.node.target not in optional:
                return f"asks whether {name} is None"
        elif value is not None:
            return f"asks whether {name} is None"
    for root, *names in way.loops:
        value = values.get(root)
        for name in names:
            value = getattr(value, name, None) if isinstance(value, nn.Module) else None
        if not isinstance(value, nn.Module):
            return "has a loop"
    for name in way.outer:
        inner = name in frame.f_code.co_freevars
        known = values if inner else {**vars(builtins), **frame.f_globals}
        value = known.get(name)
        is_function = callable(value) and not isinstance(value, nn.Module)
        if name in _FUNCTIONS | _CHOOSERS or not (is_function or isinstance(value, ModuleType)):
            return f"reads {name}"
    return None


@functools.cache
def _way_of(code: CodeType) -> _Way | str:
    """The one way through `code`, or why it has several."""
    arguments = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    way = _Way(set(), [], set())
    steps = _steps(code)
    for place, step in enumerate(steps):
        name, value = step
        before = [("", None), ("", None), *steps[max(place - 9, 0) : place]]
        if name.startswith("STORE_FAST") or name == "DELETE_FAST":
            arguments -= {value} if isinstance(value, str) else set(value)
        if name.startswith(_UNSEEN):
            return "takes what comes, or fails"
        if name == "PUSH_EXC_INFO" and steps[place + 1][0] != "WITH_EXCEPT_START":
            return "catches exceptions"
        if name == "FOR_ITER":
            path = []
            rest = before[:-1]  # without GET_ITER
            while rest[-1][0] == "LOAD_ATTR":
                path.append(rest.pop()[1])
            if not path or not rest[-1][0].startswith("LOAD_FAST"):
                return "has a loop"
            way.loops.append([_last(rest[-1][1]), *reversed(path)])
        elif "JUMP" in name and "IF" in name:
            if before[-1][0] == "TO_BOOL":
                before.pop()
            if before[-1][0] == "WITH_EXCEPT_START":
                continue
            if before[-2:] == [("LOAD_CONST", None), ("IS_OP", before[-1][1])]:
                before, name = before[:-2], "IF_NONE"
            if "NONE" not in name or not before[-1][0].startswith("LOAD_FAST"):
                return "has a branch"
            way.asked.add(_last(before[-1][1]))
        elif name == "BINARY_SUBSCR" or step == ("BINARY_OP", "[]"):
            if before[-1][0] not in _CHOSEN:
                return "has an index that is computed"
        elif name in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"):
            if value not in code.co_cellvars:
                way.outer.add(value)
        elif name in ("LOAD_ATTR", "LOAD_METHOD") and value in _ATTRIBUTES | _CHOOSERS:
            return f"asks for {value}"
    if not way.asked <= arguments:
        return "asks whether a variable is None"
    if not {root for root, *_ in way.loops} <= arguments:
        return "has a loop"
    return way


def _steps(code: CodeType) -> list[tuple[str, Any]]:
    """The instructions of `code`: (name, argument)."""
    steps = []
    for step in dis.get_instructions(code):
        if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN"):
            value = "[]" if step.argrepr == "[]" else step.argval
            steps.append((step.opname, value))
    return steps


def _last(names: Any) -> str:
    """Python 3.13 loads two variables in one step."""
    return names if isinstance(names, str) else names[-1]


def looked_into(part: nn.Module) -> set[nn.Module]:
    """The modules within the parts of `part` that its code may call, besides the parts.

    It is not traced: what it names counts, and what it takes out of containers.
    """
    if type(part).forward is nn.Module.forward:  # it is never called
        return set()
    names, items = set[str](), False
    codes = _codes_of(part)
    for code in codes:
        steps = _steps(code)
        for before, (name, value) in zip([(None, None), *steps], steps, strict=False):
            if name in ("LOAD_ATTR", "LOAD_METHOD"):
                names.add(value)
            if name == "GET_ITER" or name.startswith("BINARY_S") or value == "[]":
                of_list = before[0] == "LOAD_ATTR" and isinstance(
                    getattr(part, str(before[1]), None), _LISTS
                )
                items |= not of_list and before[0] != "BUILD_TUPLE"  # which indexes tensors
    everything = not (names | {name for code in codes for name in code.co_names}).isdisjoint(
        _ATTRIBUTES | {"getattr", "vars"}
    )
    found = set()
    for path, module in part.named_modules(remove_duplicate=False):
        within = path.split(".")
        outer: Any = part
        while within:  # down to the part that is called
            outer = outer.get_submodule(within.pop(0))
            if type(outer).forward is not nn.Module.forward:
                break
        named = all(name in names or (items and name.isdigit()) for name in within)
        if within and (everything or named):
            found.add(module)
    return found


def _codes_of(part: nn.Module) -> list[CodeType]:
    """The code of the forward of `part`, and of its own functions that this names."""
    codes: list[CodeType] = []
    names, seen = ["forward"], set[str]()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        found = vars(part).get(name, inspect.getattr_static(type(part), name, None))
        found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if not isinstance(found, FunctionType):
            continue
        more = [found.__code__, inspect.unwrap(found).__code__]
        while more:
            code = more.pop()
            codes.append(code)
            names += code.co_names
            more += [one for one in code.co_consts if isinstance(one, CodeType)]
    return codes
