"""oneDNN's linear, where tables say that it is faster: as exact as PyTorch's, and in all its uses.

What compiling, torch.func, checkpoints and autocast do is done again with it.
"""

import gc
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onednn as everywhere
import pytest
import torch
import torch.nn.functional as F
from made_up import TILE, table
from test_autocast import (  # noqa: F401
    test_autocast_regions_nest,
    test_autocast_takes_dtypes_as_pytorch_does,
)
from test_checkpointing import (  # noqa: F401
    test_checkpoint_policy_saves_the_op,
    test_checkpoint_recomputes_under_autocast,
)
from test_torch_compile import (  # noqa: F401
    tables,
    test_compile_compiles_as_often_as_nn_linear,
    test_compile_layer_with_activation,
    test_compile_once_for_a_batch_marked_dynamic,
    test_compile_under_autocast,
    test_compile_with_a_bias_of_one_element,
    test_compiled_autograd,
    test_compiled_autograd_has_one_graph,
)
from test_torch_func import (  # noqa: F401
    test_functional_call_per_sample_gradients,
    test_functional_call_trains_an_ensemble,
    test_functional_transform,
    test_vmap_in_chunks,
    test_vmap_over_any_operand,
    test_vmap_twice,
)
from torch import Tensor

import fastlinear
from fastlinear import _machine as machine
from fastlinear.choice import backend, known, onednn
from fastlinear.choice import table as rows
from fastlinear.choice.table import BY_ROWS, PYTORCH, Key, Row
from fastlinear.kernels.launching import launch
from fastlinear.ops.elementwise import ACTIVATIONS

CPU = torch.device("cpu")
N, K = 24, 40
pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="it is for CPUs"),
    pytest.mark.skipif(not onednn.takes("output", CPU, torch.float32, None, True), reason="none"),
]


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the place of that with the kernels, for what is done again."""
    everywhere.take_everywhere(monkeypatch)
    with fastlinear.use_backend("auto"):
        yield


@pytest.fixture
def kernels_ran() -> Callable[[], bool]:
    """Asked by what is done again, and never so here."""
    return lambda: True


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The activations that oneDNN is called with; no kernel runs, as on a CPU without Triton."""
    found: list[str | None] = []
    output = onednn.output

    def noted(
        input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
    ) -> Tensor:
        found.append(activation)
        return output(input, weight, bias, activation)

    monkeypatch.setattr(onednn, "output", noted)
    monkeypatch.setattr(launch, "run", None)
    return found


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those that oneDNN computes, by product."""
    found: list[str] = []

    def note(product: str) -> None:
        compute = getattr(onednn, product)

        def noted(*given: Any) -> Any:
            found.append(product)
            return compute(*given)

        monkeypatch.setattr(onednn, product, noted)

    for product in ("grad_input", "grad_weight"):
        note(product)
    return found


def operands(
    shape: tuple[int, ...], dtype: torch.dtype, biased: bool, wanted: str = ""
) -> list[Tensor | None]:
    # Activations get values of about 1, as in a model: where a sigmoid is nearly 1, what its error
    # makes of the gradient has no bound.
    made = [torch.randn(*shape, K), torch.randn(N, K) / math.sqrt(K), torch.randn(N)]
    made = [one.to(dtype) for one in made]
    for name, one in zip(rows.OPERANDS, made, strict=True):
        one.requires_grad_(name in wanted.split())
    return [*made[:2], made[2] if biased else None]


def by_pytorch(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    output = F.linear(input, weight, bias)
    return output if activation is None else ACTIVATIONS[activation](output)


Compute = Callable[[Callable[..., Tensor], list[Any]], tuple[Tensor, ...]]


def check(compute: Compute, given: list[Tensor | None], roundings: int = 4, times: int = 3) -> None:
    """What `compute` makes of fastlinear.linear is about as exact as what it makes of PyTorch's.

    Both against float64, as the largest error of each result. Of few elements PyTorch's may be
    exact by chance: so many roundings of the largest are allowed besides.

    Args:
        compute: results of a function such as `linear`, and operands.
        given: the operands.
        roundings: how many operations lie between operands and results.
        times: how often ours is computed: first by the op, and then by the way that is remembered.
    """
    doubles = [None if one is None else one.detach().double() for one in given]
    for one, double in zip(given, doubles, strict=True):
        if one is not None and double is not None:
            double.requires_grad_(one.requires_grad)
    truths, theirs = compute(by_pytorch, doubles), compute(by_pytorch, given)
    for _ in range(times):
        for ours, their, truth in zip(
            compute(fastlinear.linear, given), theirs, truths, strict=True
        ):
            assert (ours.shape, ours.dtype) == (their.shape, their.dtype)
            if ours.numel():
                error, their_error = ((one.double() - truth).abs().max() for one in (ours, their))
                rounding = torch.finfo(ours.dtype).eps * truth.abs().max()
                assert error <= 3 * their_error + roundings * rounding


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)], ids=str)
def test_outputs_are_as_exact_as_pytorch_s(
    activation: str | None, dtype: torch.dtype, shape: tuple[int, ...], taken: list[str | None]
) -> None:
    if not onednn.takes("output", CPU, dtype, None, True):
        pytest.skip("not on this CPU")
    for biased in (True, False):
        given = operands(shape, dtype, biased)
        check(lambda linear, operands: (linear(*operands, activation),), given)
        assert fastlinear.linear(*given, activation).is_contiguous()
    fused = onednn.takes("output", CPU, dtype, activation, True)
    assert taken == ([activation] * 8 if fused else [])


MASKS = [" ".join(one) for n in (1, 2, 3) for one in itertools.combinations(rows.OPERANDS, n)]


def wanted_of(operands: list[Any]) -> list[Tensor]:
    return [one for one in operands if one is not None and one.requires_grad]


@pytest.mark.parametrize("wanted", MASKS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu", "relu_squared"])
def test_gradients_of_every_mask_are_as_exact_as_pytorch_s(
    wanted: str, activation: str | None, taken: list[str | None], gradients: list[str]
) -> None:
    grad = torch.randn(2, 3, N)

    def compute(linear: Callable[..., Tensor], operands: list[Any]) -> tuple[Tensor, ...]:
        output = linear(*operands, activation)
        return torch.autograd.grad(output, wanted_of(operands), grad.to(output.dtype))

    check(compute, operands((2, 3), torch.float32, True, wanted), roundings=10)
    assert len(taken) == (0 if activation == "relu_squared" else 3)
    by = [f"grad_{name}" for name in ("input", "weight") if name in wanted.split()]
    assert gradients == by * 3


@pytest.mark.parametrize("activation", [None, "gelu", "sigmoid"])
def test_second_derivatives_are_as_exact_as_pytorch_s(
    activation: str | None, taken: list[str | None]
) -> None:
    def compute(linear: Callable[..., Tensor], operands: list[Any]) -> tuple[Tensor, ...]:
        output = linear(*operands, activation)
        first = torch.autograd.grad(output.square().sum(), operands, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), operands)

    check(compute, operands((3,), torch.float32, True, "input weight bias"), roundings=10)
    assert taken


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_output_may_change_in_place(
    activation: str | None, shape: tuple[int, ...], taken: list[str | None]
) -> None:
    def compute(linear: Callable[..., Tensor], operands: list[Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear(*operands, activation).mul_(2).sum(), operands)

    check(compute, operands(shape, torch.float32, True, "input weight bias"), roundings=10)
    assert taken


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_bias_of_any_strides_is_read_as_it_lies(
    activation: str | None, taken: list[str | None]
) -> None:
    for bias in (torch.randn(2 * N)[::2], torch.randn(1).expand(N), torch.randn(2, N).t()[:, 0]):
        # In place of the one that is contiguous, in double too.
        def compute(
            linear: Callable[..., Tensor], operands: list[Any], bias: Tensor = bias
        ) -> tuple[Tensor, ...]:
            return (linear(*operands[:2], bias.to(operands[0].dtype), activation),)

        check(compute, operands((4,), torch.float32, False))
    assert taken


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, -3e38])
def test_values_past_all_bounds_are_pytorch_s(
    activation: str | None, value: float, taken: list[str | None]
) -> None:
    input, weight, bias = operands((4,), torch.float32, True)
    assert bias is not None
    bias[::2] = value
    ours, theirs = (
        one(input, weight, bias, activation)[:, ::2] for one in (fastlinear.linear, by_pytorch)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_what_is_no_strided_tensor_is_pytorch_s_to_take_or_refuse(taken: list[str | None]) -> None:
    input, weight, bias = operands((4,), torch.float32, True)
    assert weight is not None
    assert bias is not None
    for other in (input.to_sparse(), input.to_sparse_csr()):
        torch.testing.assert_close(
            fastlinear.linear(other, weight), F.linear(other, weight), check_layout=False
        )
    sparse = weight.to_sparse_csr()
    torch.testing.assert_close(fastlinear.linear(input, sparse), F.linear(input, sparse))
    for wrong in ([1.0], None, 3):
        for given in ((wrong, weight, bias), (input, wrong, bias)):
            with pytest.raises(TypeError) as theirs:
                F.linear(*given)
            with pytest.raises(TypeError) as ours:
                fastlinear.linear(*given)
            assert str(ours.value) == str(theirs.value)
    assert not taken


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_higher_derivatives_do_without_the_table_too(
    activation: str | None, taken: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands((4,), torch.float32, True, "input weight")[:2]
    output = fastlinear.linear(*given, None, activation)
    monkeypatch.undo()
    monkeypatch.setattr(launch, "run", None)
    monkeypatch.setattr(known, "seen", True)  # as it stays
    theirs = by_pytorch(*given, None, activation)
    for _ in range(3):
        output, theirs = (
            torch.autograd.grad(one.square().sum(), given, create_graph=True)[0]
            for one in (output, theirs)
        )
    torch.testing.assert_close(output, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item())


def test_what_it_does_not_take_goes_pytorch_s_way(taken: list[str | None]) -> None:
    input, weight, bias = operands((4,), torch.float32, True)
    assert weight is not None
    with torch.no_grad():
        fastlinear.linear(input.mT.contiguous().mT, weight, bias)
        fastlinear.linear(input, weight.T.contiguous().T, bias)
        fastlinear.linear(input.double(), weight.double(), bias.double())
        fastlinear.linear(input, weight, bias[:1])
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        fastlinear.linear(input, weight, bias)
        torch._C._set_mkldnn_enabled(enabled)
        torch.func.vmap(fastlinear.linear, (0, None, None))(input, weight, bias)
        with pytest.raises(RuntimeError):
            fastlinear.linear(input[:, :3], weight, bias)
    assert not taken


def test_backward_does_without_the_table_of_its_forward(
    taken: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(linear: Callable[..., Tensor], operands: list[Any]) -> tuple[Tensor, ...]:
        output = linear(*operands)
        monkeypatch.undo()
        monkeypatch.setattr(launch, "run", None)
        monkeypatch.setattr(known, "seen", True)  # as it stays
        assert not known.available
        return torch.autograd.grad(output.sum(), operands)

    given = operands((4,), torch.float32, True, "input weight bias")
    ours = compute(fastlinear.linear, given)
    assert taken
    both = {fastlinear.linear: lambda linear, operands: ours}
    check(lambda linear, operands: both.get(linear, compute)(linear, operands), given, times=1)


@pytest.mark.parametrize("wanted", ["", "input weight"])
def test_gated_pair_goes_by_the_rows_of_its_layers(wanted: str, taken: list[str | None]) -> None:
    grad = torch.randn(4, N)

    def compute(linear: Callable[..., Tensor], operands: list[Any]) -> tuple[Tensor, ...]:
        input, gate, up = operands
        if linear is fastlinear.linear:
            output = fastlinear.gated_linear(input, gate, up)
        else:
            output = linear(input, gate, None, "silu") * linear(input, up, None)
        if not wanted:
            return (output,)
        return torch.autograd.grad(output, operands, grad.to(output.dtype))

    input, gate, _ = operands((4,), torch.float32, False, wanted)
    up = torch.randn(N, K, requires_grad="weight" in wanted)
    check(compute, [input, gate, up], roundings=10, times=2)
    assert taken == ([None] * 4 if wanted else ["silu", None] * 2)


def test_ways_keep_no_tensor_alive(taken: list[str | None]) -> None:
    given = operands((4,), torch.float32, True, "weight")
    for _ in range(3):
        fastlinear.linear(*given, "gelu").sum().backward()
    alive = [weakref.ref(one) for one in given if one is not None]
    del given
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


def test_explain_names_it(taken: list[str | None]) -> None:
    layer, input = fastlinear.Linear(K, N, activation="gelu"), torch.randn(4, K)
    said = fastlinear.explain(layer, input)
    assert said.path == "onednn"
    assert [product.kernel for product in said.products] == ["onednn", None, "onednn"]
    assert "takes onednn: a table says that it is faster here" in str(said)
    assert not taken


# Tables of a CPU.


def key(product: str, m: int, wanted: str = "") -> Key:
    return Key(product, "float32", "ieee", None, True, wanted, N, K, m)


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """As where there is no interpreter: what writes the table of the CPU and its threads."""
    monkeypatch.undo()
    monkeypatch.setenv("FASTLINEAR_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launch, "INTERPRETING", False)
    launch.target_of.cache_clear()
    threads = torch.get_num_threads()

    def write(*given: Row) -> None:
        device = machine.device_name(CPU)
        assert device is not None
        rows.write(tmp_path / rows.file_name(device), table(*given)._replace(device=device))
        backend.use_tables()

    with fastlinear.use_backend("auto"):
        yield write
    torch.set_num_threads(threads)
    monkeypatch.undo()
    launch.target_of.cache_clear()
    backend.use_tables()


def way_of(wanted: str = "", m: int = 4) -> str | None:
    layer, input = fastlinear.Linear(K, N), torch.randn(m, K)
    input.requires_grad_("input" in wanted)
    layer.weight.requires_grad_("weight" in wanted)
    layer.bias.requires_grad_("bias" in wanted)
    check(lambda linear, operands: (linear(*operands),), [input, layer.weight, layer.bias], times=1)
    if wanted:
        layer(input).sum().backward()
    return fastlinear.explain(layer, input).path


def test_table_is_for_a_number_of_threads(
    plain_cpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, taken = onednn.output, []
    monkeypatch.setattr(onednn, "output", lambda *given: taken.append(1) or output(*given))
    torch.set_num_threads(1)
    plain_cpu(rows.Row(*key("output", 4), "onednn", 1.0, 2.0, 1.0, 2.0))
    name = machine.device_name(CPU)
    assert name is not None
    assert name.endswith(", 1 thread")
    found = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        found.append((way_of(), len(taken)))
    pytorchs = "torch.nn.functional.linear"
    assert found == [(pytorchs, 0), ("onednn", 1), (pytorchs, 1)]


def test_table_that_is_read_while_onednn_is_off_counts_when_it_is_on(
    plain_cpu: Callable[..., None],
) -> None:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        plain_cpu(rows.Row(*key("output", 4), "onednn", 1.0, 2.0, 1.0, 2.0))
        assert way_of() == "torch.nn.functional.linear"
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    assert way_of() == "onednn"


def test_compiled_step_runs_in_every_backend_but_the_kernels(
    plain_cpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_cpu(
        rows.Row(*key("output", 4), "onednn", 1.0, 2.0, 1.0, 2.0),
        rows.Row(*key("training", 4, "input weight bias"), BY_ROWS, 1.0, 2.0, 1.0, 2.0),
    )
    layer, input = fastlinear.Linear(K, N), torch.randn(4, K, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    output = compiled(input)
    with fastlinear.use_backend("torch"):
        output.sum().backward()
    torch.testing.assert_close(layer.weight.grad, input.detach().sum(0).expand(N, -1))


def test_step_goes_by_the_row_of_its_gradients(plain_cpu: Callable[..., None]) -> None:
    plain_cpu(
        rows.Row(*key("output", 4), "onednn", 1.0, 2.0, 1.0, 2.0),
        rows.Row(*key("training", 4, "input weight bias"), BY_ROWS, 1.0, 2.0, 1.0, 2.0),
        rows.Row(*key("training", 4, "input bias"), PYTORCH, 2.0, 2.0, 2.0, 2.0),
    )
    for wanted, path in (
        ("", "onednn"),
        ("input weight bias", "onednn"),
        ("weight bias", "onednn"),  # as with all of them
        ("input bias", "torch.nn.functional.linear"),
    ):
        assert way_of(wanted) == path, wanted


def test_explain_knows_when_it_is_switched_off() -> None:
    layer, input = fastlinear.Linear(K, N), torch.randn(4, K)
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        kernels = [product.kernel for product in fastlinear.explain(layer, input).products]
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    assert "onednn" not in kernels


@pytest.mark.parametrize("product", ["grad_input", "grad_weight"])
def test_gradient_goes_by_its_own_row(
    product: str, plain_cpu: Callable[..., None], gradients: list[str]
) -> None:
    plain_cpu(
        rows.Row(*key("output", 4), PYTORCH, 1.0, 1.0, 1.0, 1.0),
        rows.Row(*key("training", 4, "input weight bias"), BY_ROWS, 1.0, 2.0, 1.0, 2.0),
        rows.Row(
            *key(product, 4)._replace(bias=product == "grad_weight"), "onednn", 1.0, 2.0, 1.0, 2.0
        ),
    )
    assert way_of("input weight bias") == "onednn"
    layer, input = fastlinear.Linear(K, N), torch.randn(4, K, requires_grad=True)
    layer(input).sum().backward()
    assert gradients == []  # of an expanded gradient, which is not as it was measured
    (layer(input) * 1).sum().backward()
    assert gradients == [product]


def test_gradients_are_the_same_bits_each_time(gradients: list[str]) -> None:
    input, weight = torch.randn(64, 300), torch.randn(200, 300)
    grad = torch.randn(64, 200)
    first = onednn.grad_input(grad, weight), *onednn.grad_weight(grad, input, True)
    for _ in range(20):
        again = onednn.grad_input(grad, weight), *onednn.grad_weight(grad, input, True)
        assert all(map(torch.equal, again, first))


def test_kernels_of_a_cpu_s_table_are_no_matter_without_triton(
    plain_cpu: Callable[..., None],
) -> None:
    plain_cpu(
        rows.Row(*key("output", 4), TILE, 1.0, 2.0, 1.0, 2.0),
        rows.Row(*key("training", 4, "input weight bias"), BY_ROWS, 1.0, 2.0, 1.0, 2.0),
    )
    for wanted in ("", "input weight bias"):
        assert way_of(wanted) == "torch.nn.functional.linear"
