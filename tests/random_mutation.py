"""Changes random tokens of the package, one at a time, and checks that the suite notices.

Run it as `python tests/random_mutation.py`; `--seed` repeats a run, on the same sources.

A place is drawn by its kind first, so that the many names leave room for the few comparisons: in
jitted functions, and in the Python around them. Docstrings, comments, annotations, decorators and
what an exception says are left alone. Each mutant is tested as in mutation.py, by the tests of its
room and then of the rooms that build on it. The diff of one that no test noticed is printed, and
the run exits with 1, unless EQUIVALENT has it.
"""

import argparse
import ast
import difflib
import io
import random
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).with_name("helpers")))

from mutant import ROOT, Mutant, outcomes, planted

# Changes that change nothing, as "file: line before -> line after", with the reason.
EQUIVALENT: dict[str, str] = {}

# The folders of tests that notice a change of a room: its own, then those of what builds on it.
ROOMS = {
    "kernels/forward": "kernels/forward kernels ops choice api",
    "kernels/backward": "kernels/backward kernels ops choice api",
    "kernels/language": "kernels/forward kernels/backward kernels ops api",
    "kernels/launching": "kernels/launching kernels ops choice api",
    "kernels/configs": "kernels/configs kernels choice ops tuning api",
    "fastlinear/ops": "ops api choice distributed",
    "fastlinear/choice": "choice tuning ops api distributed",
    "fastlinear/tuning": "tuning choice api distributed",
    "fastlinear/conversion": "conversion api",
    "fastlinear": "api ops choice tuning conversion",
}
# It compiles every kernel anew after any change to their sources.
LEFT_OUT = "--ignore=tests/kernels/test_compile.py"

# What may stand in the place of what: "_" is a space, "," an or.
OPERATORS = """+:- -:+ *:+,// /:* //:*,% %:// &:| |:& +=:-= -=:+= *=:+= /=:*= //=:*= &=:|= |=:&=
    <:<=,> <=:<,>= >:>=,< >=:>,<= ==:!= !=:== is:is_not is_not:is in:not_in not_in:in
    and:or or:and"""
INSTEAD = {
    symbol: tuple(others.split(","))
    for symbol, others in (pair.replace("_", " ").split(":") for pair in OPERATORS.split())
}
OTHER_WAY = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}


class Place(NamedTuple):
    """Characters `start` to `end` of a file's text, and what may stand there instead."""

    kind: str
    start: int
    end: int
    options: tuple[str, ...]


def kin(name: str, names: set[str]) -> tuple[str, ...]:
    """Those of `names` that are of one kind with `name`, as offs_m and offs_n, or M and N."""

    def family(one: str) -> str:
        return "size" if len(one) == 1 and one.isupper() else one.rpartition("_")[0]

    return tuple(sorted(one for one in names - {name} if family(one) == family(name) != ""))


class Source:
    """A file of the package, and the places in it that can be changed."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.text = (ROOT / file).read_text()
        self.lines = self.text.splitlines(keepends=True)
        self.starts = [0, *accumulate(map(len, self.lines))]
        self.tokens = [
            (self.starts[token.start[0] - 1] + token.start[1], token.string)
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline)
        ]
        self.places: dict[bool, list[Place]] = {True: [], False: []}
        self.walk(ast.parse(self.text), False, set())

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where `node` starts and ends; ast counts the bytes of a line."""

        def at(line: int, column: int) -> int:
            return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

        first = at(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return first, at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def walk(self, node: ast.AST, jitted: bool, names: set[str]) -> None:
        """Notes the places below `node`; `names` are those of the function that it is in."""
        match node:
            case ast.Raise() | ast.JoinedStr() | ast.keyword(arg="strict"):
                return
            case ast.If(ast.Name("TYPE_CHECKING")) | ast.Call(ast.Attribute(attr="warn")):
                return
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.FunctionDef):
            jitted = jitted or any("jit" in ast.unparse(one) for one in node.decorator_list)
            children = [node.args, *node.body]
            within = [(getattr(one, "id", ""), getattr(one, "attr", "")) for one in ast.walk(node)]
            names = {name for both in within for name in both}
        elif isinstance(node, ast.arg | ast.ClassDef):
            children = getattr(node, "body", [])
        elif isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        self.places[jitted] += [place for place in self.changes(node, names) if place.options]
        for child in children:
            self.walk(child, jitted, names)

    def changes(self, node: ast.AST, names: set[str]) -> Iterator[Place]:
        match node:
            case ast.BinOp(left, _, right) | ast.AugAssign(left, _, right):
                yield from self.operator("operator", left, right)
            case ast.BoolOp():
                for left, right in pairwise(node.values):
                    yield from self.operator("logic", left, right)
            case ast.Compare():
                for left, right in pairwise([node.left, *node.comparators]):
                    yield from self.operator("comparison", left, right)
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield Place("sign", self.span(node)[0], self.span(node.operand)[0], ("",))
            case ast.Constant(value=bool()):
                yield Place("truth", *self.span(node), (str(not node.value),))
            case ast.Constant(value=int() | float() as value):
                others = [other for other in (value + 1, value - 1) if value != other >= 0]
                yield Place("number", *self.span(node), tuple(map(repr, others)))
            case ast.Name(id=name, ctx=ast.Load()) | ast.Attribute(attr=name, ctx=ast.Load()):
                end = self.span(node)[1]
                options = (OTHER_WAY[name],) if name in OTHER_WAY else kin(name, names)
                kind = "extreme" if name in OTHER_WAY else "name"
                yield Place(kind, end - len(name), end, options)
            case ast.Call():
                yield from self.arguments(node)

    def operator(self, kind: str, left: ast.AST, right: ast.AST) -> Iterator[Place]:
        """What stands between two operands, but for parentheses and comments."""
        first, last = self.span(left)[1], self.span(right)[0]
        between = [
            one for one in self.tokens if first <= one[0] < last and one[1].strip()[:1] not in "()#"
        ]
        symbol = " ".join(string for _, string in between)
        if symbol in INSTEAD:
            end = between[-1][0] + len(between[-1][1])
            yield Place(kind, between[0][0], end, INSTEAD[symbol])

    def arguments(self, call: ast.Call) -> Iterator[Place]:
        """Without one that is passed by name, and with two names that change places."""
        given = [*call.args, *call.keywords]
        for before, argument, after in zip([None, *given], given, [*given[1:], None], strict=False):
            if isinstance(argument, ast.keyword) and argument.arg not in (None, "strict"):
                start, end = self.span(argument)
                if before is not None:
                    start = self.span(before)[1]
                elif after is not None:
                    end = self.span(after)[0]
                yield Place("keyword", start, end, ("",))
        for one, other in pairwise(call.args):
            if isinstance(one, ast.Name) and isinstance(other, ast.Name) and one.id != other.id:
                start, end = self.span(one)[0], self.span(other)[1]
                between = self.text[self.span(one)[1] : self.span(other)[0]]
                yield Place("arguments", start, end, (other.id + between + one.id,))


def tests_for(file: str) -> tuple[str, ...]:
    """Those that notice a planted bug of the file first, then folder by folder."""
    known = [test for mutant in planted() if mutant.file == file for test in mutant.tests]
    room = next(room for room in (*ROOMS,) if file.startswith(room + "/"))
    folders = [f"tests/{folder}" for folder in ROOMS[room].split()]
    return (*dict.fromkeys(known), *folders, LEFT_OUT)


def draw(chance: random.Random, sources: list[Source], jitted: bool, count: int) -> list[Mutant]:
    kinds: dict[str, list[tuple[Source, Place]]] = defaultdict(list)
    for source in sources:
        for place in source.places[jitted]:
            kinds[place.kind].append((source, place))
    mutants: list[Mutant] = []
    while len(mutants) < count and kinds:
        kind = chance.choice(sorted(kinds))
        source, place = kinds[kind].pop(chance.randrange(len(kinds[kind])))
        if not kinds[kind]:
            del kinds[kind]
        text = source.text[: place.start] + chance.choice(place.options) + source.text[place.end :]
        try:
            ast.parse(text)
        except SyntaxError:  # as where what is deleted stands in parentheses
            continue
        name = f"{source.file}:{source.text.count(chr(10), 0, place.start) + 1}, {kind}"
        mutants.append(Mutant(name, source.file, source.text, text, tests_for(source.file)))
    return mutants


def lines_of(mutant: Mutant, context: int) -> list[str]:
    before, after = mutant.old.splitlines(), mutant.new.splitlines()
    return [*difflib.unified_diff(before, after, lineterm="", n=context)][2:]


def key(mutant: Mutant) -> str:
    """As in EQUIVALENT."""
    lines = lines_of(mutant, 0)
    old, new = ([line[1:].strip() for line in lines if line[0] == sign] for sign in "-+")
    return f"{mutant.file}: {' '.join(old)} -> {' '.join(new)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--jitted", type=int, default=30, help="changes in jitted functions")
    parser.add_argument("--python", type=int, default=30, help="changes in what is around them")
    parser.add_argument("--jobs", type=int, help="mutants at a time; as many as there are cores")
    parser.add_argument("--seconds", type=float, default=600, help="how long a mutant is tested")
    given = parser.parse_args()
    print(f"repeat with --seed {given.seed} --jitted {given.jitted} --python {given.python}")
    files = sorted(
        path for room in ("kernels", "fastlinear") for path in (ROOT / room).rglob("*.py")
    )
    sources = [Source(str(path.relative_to(ROOT))) for path in files]
    chance = random.Random(given.seed)
    mutants = draw(chance, sources, True, given.jitted) + draw(chance, sources, False, given.python)
    survivors = 0
    for mutant, end, how in outcomes(mutants, given.jobs, given.seconds):
        print(f"{'ALIVE ' if end == 'passed' else 'killed'}  {key(mutant)}: {how}", flush=True)
        if end == "passed":
            reason = EQUIVALENT.get(key(mutant))
            survivors += reason is None
            print(*([f"equivalent: {reason}"] if reason else lines_of(mutant, 3)), sep="\n")
    print(f"{survivors} survivors / {len(mutants)} changes")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
