"""Tables of what was measured: per device, the fastest way to compute each product of a layer.

A table is a JSON file of plain values: what may stand in it, and how it is read, written and added
to. Those that are shipped lie in kernels/tuned/. Nothing here imports Triton.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch

from fastlinear import _files as files
from fastlinear.choice import cublaslt, onednn
from fastlinear.kernels.configs.config import BackwardConfig, Config, Kind
from fastlinear.kernels.launching.operands import ACTIVATIONS

FORMAT = 2

# "gradients" is grad_input and grad_weight, of which one launch can be both; "training" is all of a
# layer's products with their autograd, as one step of forward and backward.
Product = Literal["output", "grad_input", "grad_weight", "gradients", "training"]
PRODUCTS: tuple[Product, ...] = get_args(Product)
# What else than a kernel's configuration a row may have: PyTorch's F.linear and matmul; what
# PyTorch has besides them; and, for the last two products, each product as its own row says.
PYTORCH = "pytorch"
LIBRARIES = {library.NAME: library for library in (onednn, cublaslt)}
BY_ROWS = "rows"
DTYPES = ("float16", "bfloat16", "float32", "float64")
PRECISION = re.compile("[a-z0-9 ]{1,16}")
OPERANDS = ("input", "weight", "bias")

Candidate: TypeAlias = Config | BackwardConfig | str


class Key(NamedTuple):
    """What a row is for; its fields are the row's."""

    product: str
    dtype: str
    precision: str
    activation: str | None
    bias: bool
    wanted: str
    n: int
    k: int
    m: int


class Row(NamedTuple):
    """The fastest of the candidates that were measured for one product.

    product, dtype, precision: of what.
    activation, bias: what the layer has of them, where that is part of the product: of "output" and
        "training" and, as the gradient of the bias, of "grad_weight" and "gradients".
    wanted: of "training", whose gradients, as in "input weight bias"; "" of the others.
    n, k: out_features and in_features.
    m: rows that it was measured with; it stands for all numbers of rows with this `bucket`.
    candidate: a Config, for "gradients" a BackwardConfig, a library's name, PYTORCH or BY_ROWS.
    device_us, wall_us: microseconds of a call on the device, and for the caller: on a CPU the same.
    pytorch_device_us, pytorch_wall_us: PyTorch's.
    """

    product: str
    dtype: str
    precision: str
    activation: str | None
    bias: bool
    wanted: str
    n: int
    k: int
    m: int
    candidate: Candidate
    device_us: float
    pytorch_device_us: float
    wall_us: float
    pytorch_wall_us: float

    @property
    def key(self) -> Key:
        return Key(*self[:9])

    def wins(self, margin: float) -> bool:
        """Whether it is so many times as fast on the device, and no slower for the caller."""
        faster = self.pytorch_device_us >= margin * self.device_us
        return faster and self.wall_us <= self.pytorch_wall_us

    def by_pytorch(self) -> "Row":
        """The same product, computed by PyTorch."""
        device_us, wall_us = self.pytorch_device_us, self.pytorch_wall_us
        return self._replace(candidate=PYTORCH, device_us=device_us, wall_us=wall_us)


class Table(NamedTuple):
    """Rows, and what they were measured on and with.

    kernels: a hash of the kernels' sources.
    """

    device: str
    driver: str
    torch: str
    triton: str
    fastlinear: str
    kernels: str
    date: str
    rows: tuple[Row, ...]

    def outdated(self, software: dict[str, str]) -> str | None:
        """What of torch and Triton has another version than here, in words.

        Bug fixes, 2.13.0 and 2.13.1, count as one.
        """
        for name in ("torch", "triton"):
            measured, version = getattr(self, name), software[name]
            if measured.split("+")[0].split(".")[:2] != version.split("+")[0].split(".")[:2]:
                return f"it was measured with {name} {measured}, and this is {version}"
        return None


def call(
    dtype: torch.dtype,
    bias: bool,
    n: int,
    k: int,
    m: int,
    *,
    wanted: str = "input weight bias",
    activation: str | None = None,
    precision: str = "ieee",
) -> Key:
    """The key of a call of `linear`: of its training or, where nothing is wanted, its output."""
    product = "training" if wanted else "output"
    wanted = wanted if bias else wanted.removesuffix("bias").strip()
    return Key(product, name_of(dtype), precision, activation, bias, wanted, n, k, bucket(m))


def name_of(dtype: torch.dtype) -> str:
    """That by which tables know a dtype."""
    return str(dtype).removeprefix("torch.")


def in_words(call: Key) -> str:
    """A call, in a few words."""
    dtype = call.dtype if call.precision == "ieee" else call.precision
    words = [dtype, f"{call.n}x{call.k}", call.activation, None if call.bias else "no bias"]
    return " ".join(filter(None, [*words, f"{call.m} rows"]))


def is_there(candidate: Candidate, key: Key, device: torch.device) -> bool:
    """Whether a library, where that is the candidate, takes such a product here and now."""
    if not isinstance(candidate, str) or candidate not in LIBRARIES:
        return True
    what = key.product, device, getattr(torch, key.dtype), key.activation, key.bias
    return LIBRARIES[candidate].takes(*what)


def bucket(m: int) -> int:
    """The power of two that stands for m rows: the next one that is not smaller."""
    return 1 << max(m - 1, 0).bit_length()


def parse(text: str) -> Table:
    """The table in a file's text.

    Raises:
        ValueError: it is none, or has values that no measurement gives; the message says which.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        version = found.get("format") if isinstance(found, dict) else None
        raise ValueError(f"its format is {version!r}, and {FORMAT} is what is read here")
    names = {"format", *Table._fields}
    if set(found) != names or not isinstance(found["rows"], list):
        raise ValueError(f"it has {', '.join(sorted(found))} instead of {', '.join(sorted(names))}")
    texts = {name: found[name] for name in Table._fields[:-1]}
    for name, value in texts.items():
        if not isinstance(value, str) or len(value) > 200:
            raise ValueError(f"{name} is {value!r:.60}, not a text of 200 characters at most")
    rows = tuple(_parse_row(row, number) for number, row in enumerate(found["rows"]))
    return Table(rows=rows, **texts)


def _parse_row(row: Any, number: int) -> Row:
    def check(right: object, name: str, takes: str) -> None:
        if not right:
            raise ValueError(f"row {number} has {name} = {row[name]!r:.60}, which is not {takes}")

    found = sorted(row) if isinstance(row, dict) else [repr(row)]
    if found != sorted(Row._fields):
        takes = ", ".join(sorted(Row._fields))
        raise ValueError(f"row {number} has {', '.join(found):.200} instead of {takes}")
    product, activation = row["product"], row["activation"]
    check(product in PRODUCTS, "product", f"one of {', '.join(PRODUCTS)}")
    check(row["dtype"] in DTYPES, "dtype", f"one of {', '.join(DTYPES)}")
    precision = isinstance(row["precision"], str) and PRECISION.fullmatch(row["precision"])
    check(precision, "precision", "a word of a to z and 0 to 9")
    applied = activation is None or activation in ACTIVATIONS
    check(applied, "activation", f"null or one of {', '.join(ACTIVATIONS)}")
    check(type(row["bias"]) is bool, "bias", "true or false")
    check(not (row["bias"] and product == "grad_input"), "bias", "false, as grad_input's is")
    wanted = row["wanted"].split() if isinstance(row["wanted"], str) else [""]
    right = wanted == [name for name in OPERANDS if name in wanted]
    right = right and bool(wanted) == (product == "training")
    check(right, "wanted", "operands that the training is to have gradients of")
    for name in ("n", "k", "m"):
        check(type(row[name]) is int and 0 < row[name] < 2**31, name, "from 1 to 2147483647")
    check(row["m"] == bucket(row["m"]), "m", "a power of two")
    for name in Row._fields[-4:]:
        right = type(row[name]) in (int, float) and 0 < row[name] < 1e9
        check(right, name, "microseconds above 0 and below 1e9")
    candidate = _parse_candidate(row["candidate"], product)
    check(candidate is not None, "candidate", "what computes that product")
    return Row(**row | {"candidate": candidate})


def _parse_candidate(given: Any, product: str) -> Candidate | None:
    """The candidate of a row for `product`; None if it is none."""
    if isinstance(given, str):
        named = [PYTORCH, *(name for name, one in LIBRARIES.items() if product in one.PRODUCTS)]
        named += [BY_ROWS] * (product in ("training", "gradients"))
        return given if given in named else None
    if product == "training" or not isinstance(given, dict):
        return None
    if product != "gradients":
        return _parse_config(given)
    if set(given) != {"input", "weight"}:
        return None
    input, weight = _parse_config(given["input"]), _parse_config(given["weight"])
    return None if input is None or weight is None else BackwardConfig(input, weight)


def _parse_config(given: Any) -> Config | None:
    names = [field.name for field in dataclasses.fields(Config)]
    if not isinstance(given, dict) or set(given) != set(names):
        return None
    sizes = [given[name] for name in names if name != "kind"]
    right = all(type(size) is int and 0 < size <= 65_536 for size in sizes)
    return Config(**given) if right and given["kind"] in get_args(Kind) else None


def as_text(table: Table) -> str:
    """What `parse` reads, a row a line."""
    head = {"format": FORMAT} | table._replace(rows=())._asdict()
    lines = ",\n".join(
        f"  {json.dumps(row._asdict(), default=dataclasses.asdict)}" for row in table.rows
    )
    return json.dumps(head, indent=1).replace("[]\n}", f"[\n{lines}\n ]\n}}\n")


def read(path: Path) -> Table:
    """The table in a file, as `parse`; an OSError where it cannot be read."""
    return parse(path.read_text(encoding="utf-8"))


def write(path: Path, table: Table) -> None:
    """Puts `table` in the place of what `path` held, as `files.replace`."""
    files.replace(path, as_text(table))


def file_name(device: str) -> str:
    """That of a device's table: "NVIDIA H100 80GB HBM3" has nvidia-h100-80gb-hbm3.json."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


class Store:
    """A table's file that is added to. Others may too: it is read again before each writing.

    rows: those that were measured before, here and with the same software.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, here: Table) -> None:
        """here: what is measured on and with, and no rows."""
        self.path, self.here = path, here
        with files.locked(self.path):
            self.rows, why = self._read()
        if why is not None:
            print(f"{path} is written anew: {why}", file=sys.stderr)

    def add(self, row: Row) -> None:
        """Writes `row` beside those that are there, in the place of one for the same product."""
        with files.locked(self.path):
            rows = self._read()[0] | {row.key: row}
            write(self.path, self.here._replace(rows=tuple(rows.values())))

    def _read(self) -> tuple[dict[Key, Row], str | None]:
        """The rows that hold here, and why those that are there do not."""
        if not self.path.exists():
            return {}, None
        try:
            found = read(self.path)
        except ValueError as error:
            return {}, str(error)
        why = found.outdated(self.here._asdict())
        if found.kernels != self.here.kernels:
            why = "it was measured with other kernels"
        if found.device != self.here.device:
            why = f"it is for {found.device!r}, and this is {self.here.device!r}"
        return ({row.key: row for row in found.rows} if why is None else {}), why
