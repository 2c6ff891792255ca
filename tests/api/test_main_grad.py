"""Gradients of weights that are added to `weight.main_grad`."""

import threading
from typing import Any

import pytest
import torch
from oracle import DTYPES, normal, sum_scale
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlinear
from fastlinear import main_grad as module
from fastlinear.kernels.backward.grad_weight import linear_backward_weight
from fastlinear.kernels.backward.linear import linear_backward

PATHS = ["torch", "auto", "auto with kernels", "triton"]
ACTIVATIONS = [None, "relu", "gelu"]  # the derivative from the output, or from the pre-activation


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each way to compute it; that of "auto" on a GPU by having the kernels run here."""
    if request.param == "auto with kernels":
        monkeypatch.setattr(module, "by_the_kernels", lambda input: True)
    with fastlinear.use_backend(request.param.split()[0]):
        yield request.param


def accumulating(
    in_features: int, out_features: int, device: torch.device, **options: Any
) -> fastlinear.Linear:
    layer = fastlinear.Linear(
        in_features, out_features, device=device, accumulate_into_main_grad=True, **options
    )
    wide = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    layer.weight.main_grad = torch.randn(layer.weight.shape, dtype=wide, device=device)
    return layer


def beside(layer: fastlinear.Linear) -> fastlinear.Linear:
    """The same layer, whose gradients are autograd's."""
    twin = fastlinear.Linear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
        activation=layer.activation,
    )
    twin.load_state_dict(layer.state_dict())
    return twin


def assert_added(main_grad: Tensor, start: Tensor, grad_output: Tensor, input: Tensor) -> None:
    """main_grad is start and the product, of M rows, but for roundings of its own dtype.

    One of the total, and as many of the sum as it has terms, at its size on the way.
    """
    expected = start.double() + grad_output.double().mT @ input.double()
    terms = grad_output.double()[:, :, None] * input.double()[:, None, :]
    rounding = torch.finfo(main_grad.dtype).eps
    total = expected.abs().max().item() if expected.numel() else 0.0
    budget = rounding * (2 * sum_scale(terms, main_grad.dtype, 0) + total)
    torch.testing.assert_close(main_grad.double(), expected, rtol=0, atol=budget)


@pytest.mark.parametrize("shape", [(), (5, 7), (0, 3)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_layer(
    activation: str | None, shape: tuple[int, ...], path: str, device: torch.device
) -> None:
    """In float64, where sums in another order differ by little."""
    layer = accumulating(33, 40, device, dtype=torch.float64, activation=activation)
    twin, start = beside(layer), layer.weight.main_grad.clone()
    input = torch.randn(*shape, 33, dtype=torch.float64, device=device, requires_grad=True)
    again = input.detach().clone().requires_grad_()
    for _ in range(2):
        grad_output = torch.randn(*shape, 40, dtype=torch.float64, device=device)
        output = layer(input)
        expected = twin(again)
        torch.testing.assert_close(output, expected)
        output.backward(grad_output)
        expected.backward(grad_output)
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.weight.main_grad - start, twin.weight.grad)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)
    torch.testing.assert_close(input.grad, again.grad)


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(70, 50, 77), (517, 10, 20), (1, 40, 1), (0, 5, 7), (5, 7, 0)], ids=str
)
def test_the_kernels_add_unrounded_sums(
    m: int, n: int, k: int, dtype: torch.dtype, together: bool, splits: int, device: torch.device
) -> None:
    """The error is that of the float32 sums: none of a gradient that was rounded to 16 bits."""
    grad_output, input = normal((m, n), dtype, device), normal((m, k), dtype, device)
    weight = normal((n, k), dtype, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    main_grad = normal((n, k), wide, device)
    start = main_grad.clone()
    given = {"main_grad": main_grad, "splits": splits}
    if together:
        _, grad_weight, grad_bias = linear_backward(grad_output, input, weight, True, **given)
    else:
        grad_weight, grad_bias = linear_backward_weight(grad_output, input, True, **given)
    assert grad_weight is None
    given["main_grad"] = None
    *_, alone = (
        linear_backward(grad_output, input, weight, True, **given)
        if together
        else linear_backward_weight(grad_output, input, True, **given)
    )
    assert torch.equal(grad_bias, alone)
    assert_added(main_grad, start, grad_output, input)


def test_same_bits_every_time(triton_backend: None, device: torch.device) -> None:
    grad_output, input = (
        torch.randn(300, size, dtype=torch.bfloat16, device=device) for size in (20, 30)
    )
    start = torch.randn(20, 30, device=device)
    results = []
    for _ in range(2):
        main_grad = start.clone()
        linear_backward_weight(grad_output, input, main_grad=main_grad, splits=4)
        results.append(main_grad)
    assert torch.equal(*results)


def test_under_autocast(path: str, device: torch.device) -> None:
    """The product is of what autocast makes of the operands, the sum float32."""
    layer = accumulating(48, 40, device)
    start = layer.weight.main_grad.clone()
    input, grad_output = torch.randn(70, 48, device=device), torch.randn(70, 40, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = layer(input)
        expected = nn.functional.linear(input, layer.weight, layer.bias)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    output.backward(grad_output.bfloat16())
    assert_added(layer.weight.main_grad, start, grad_output.bfloat16(), input.bfloat16())
    assert layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits(path: str, dtype: torch.dtype, device: torch.device) -> None:
    layer = accumulating(48, 40, device, dtype=dtype)
    start = layer.weight.main_grad.clone()
    input, grad_output = (torch.randn(70, size, dtype=dtype, device=device) for size in (48, 40))
    layer(input).backward(grad_output)
    assert_added(layer.weight.main_grad, start, grad_output, input)


@pytest.mark.skipif(torch.version.hip is not None, reason="cuBLAS is NVIDIA's")
def test_cublas_is_asked_for_its_float32_sums() -> None:
    """As far as that goes without a GPU: which products PyTorch runs, of fake tensors."""
    products = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, given: Any = (), named: Any = None
        ) -> Any:
            products.extend([(op, given[0].dtype)] if "mm" in str(op) else [])
            return op(*given, **(named or {}))

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with FakeTensorMode(), Noted():
            grad_output, input, main_grad = (
                torch.empty(*shape, dtype=dtype, device="cuda")
                for shape in ((5, 7, 4), (5, 7, 3), (4, 3))
            )
            module._add_by_pytorch(grad_output, input, main_grad.float())
    mm, addmm = torch.ops.aten.mm.dtype, torch.ops.aten.addmm_.default
    assert products == [(mm, torch.bfloat16), (mm, torch.float16), (addmm, torch.float32)]


def test_one_launch_and_no_tensor_for_the_gradient(
    triton_backend: None, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    from fastlinear.kernels.launching import launch

    layer = accumulating(48, 40, device)
    output = layer(torch.randn(70, 48, device=device, requires_grad=True))
    launched, allocated, run, allocate = [], [], launch.run, launch.allocate
    monkeypatch.setattr(launch, "run", lambda *given: (launched.append(given[0]), run(*given)))
    monkeypatch.setattr(
        launch, "allocate", lambda like, one: allocated.append(one.shape) or allocate(like, one)
    )
    output.sum().backward()
    assert [kernel.__name__ for kernel in launched] == ["linear_backward_kernel"]
    assert allocated == [(70, 48), (40,)]


def test_without_main_grad_the_error_says_so(path: str, device: torch.device) -> None:
    layer = fastlinear.Linear(3, 4, device=device, accumulate_into_main_grad=True)
    input = torch.randn(2, 3, device=device)
    with pytest.raises(RuntimeError, match=r"weight.main_grad.* shape \(4, 3\).* has none"):
        layer(input)
    with torch.no_grad():  # nothing is to be accumulated
        torch.testing.assert_close(layer(input), beside(layer)(input))
    layer.weight.requires_grad_(False)
    layer(input).sum().backward()
    assert layer.bias.grad is not None


REFUSED = {
    "no tensor": (lambda weight: [0.0], "is list"),
    "dtype": (lambda weight: weight.bfloat16(), "is torch.bfloat16 on"),
    "shape": (lambda weight: weight.mT, r"has shape \(3, 4\)"),
    "strides": (lambda weight: weight.mT.contiguous().mT, r"has strides \(1, 4\)"),
    "device": (lambda weight: weight.to("meta"), "is torch.float32 on meta"),
}


@pytest.mark.parametrize(("made", "said"), REFUSED.values(), ids=REFUSED)
def test_another_main_grad_is_refused(made: Any, said: str, device: torch.device) -> None:
    layer = fastlinear.Linear(3, 4, device=device, accumulate_into_main_grad=True)
    layer.weight.main_grad = made(layer.weight.detach())
    with pytest.raises(RuntimeError, match=f"contiguous torch.float32 tensor .* but it {said}"):
        layer(torch.randn(2, 3, device=device))


def test_another_main_grad_since_the_forward(path: str, device: torch.device) -> None:
    """What is there when the gradient is, takes it; what does not fit any more is refused."""
    layer = accumulating(3, 4, device)
    input = torch.randn(2, 3, device=device)
    output, late = layer(input), layer(input)
    layer.weight.main_grad = torch.zeros(4, 3, device=device)
    output.sum().backward()
    torch.testing.assert_close(layer.weight.main_grad, input.sum(0).expand(4, 3).contiguous())
    del layer.weight.main_grad
    with pytest.raises(RuntimeError, match="has none"):
        late.sum().backward()


def test_hooks_of_autograd_get_zeros(path: str, device: torch.device) -> None:
    """Where training waits for them, and says so by the attribute that Megatron-LM sets."""
    layer = accumulating(3, 4, device)
    layer.weight.grad_added_to_main_grad = False
    layer(torch.randn(2, 3, device=device)).sum().backward()
    assert layer.weight.grad_added_to_main_grad is True
    assert torch.equal(layer.weight.grad, torch.zeros(4, 3, device=device))


def test_autograd_knows_that_main_grad_changes(path: str, device: torch.device) -> None:
    layer = accumulating(3, 4, device)
    kept = (layer.weight.main_grad.requires_grad_() ** 2).sum()
    layer.weight.main_grad.requires_grad_(False)
    layer(torch.randn(2, 3, device=device)).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_is_differentiated_once(path: str, device: torch.device) -> None:
    layer = accumulating(3, 4, device)
    input = torch.randn(2, 3, device=device, requires_grad=True)
    (grad_input,) = torch.autograd.grad(layer(input).square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_input.sum().backward()


def test_what_the_kernels_cannot_take(device: torch.device) -> None:
    layer = accumulating(3, 4, device)
    with pytest.raises(TypeError, match=r"main_grad takes float16.* is torch.complex64"):
        module.linear_into_main_grad(
            torch.randn(2, 3, dtype=torch.complex64, device=device),
            nn.Parameter(torch.randn(4, 3, dtype=torch.complex64, device=device)),
            None,
            None,
        )
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        layer(torch.randn(2, 5, device=device))


# Dynamo looks at .grad of what lies between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_within_a_compiled_function(path: str, device: torch.device) -> None:
    layer = accumulating(3, 4, device)
    start = layer.weight.main_grad.clone()
    input = torch.randn(2, 3, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: layer(2 * x) + 1, backend="aot_eager")
    compiled(input).sum().backward()
    expected = 2 * input.detach().sum(0).expand(4, 3)
    torch.testing.assert_close(layer.weight.main_grad - start, expected)


def test_checkpointed_and_tied(path: str, device: torch.device) -> None:
    """A forward that backward runs again, and a weight that two layers share, add once each."""
    layer = accumulating(3, 3, device, bias=False)
    start = layer.weight.main_grad.clone()
    tied = fastlinear.Linear(3, 3, bias=False, device=device, accumulate_into_main_grad=True)
    tied.weight = layer.weight
    input = torch.randn(2, 3, device=device, requires_grad=True)
    hidden = torch.utils.checkpoint.checkpoint(layer, input, use_reentrant=False)
    tied(hidden).sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    (input.detach() @ weight.mT @ weight.mT).sum().backward()
    torch.testing.assert_close(layer.weight.main_grad - start, weight.grad)


def test_gated_pair_of_such_layers(path: str, device: torch.device) -> None:
    """Falls apart into its layers, each of which adds its own."""
    pair = fastlinear.GatedLinear(3, 4, device=device)
    expected = fastlinear.GatedLinear(3, 4, device=device)
    expected.load_state_dict(pair.state_dict())
    for layer in (pair.gate_proj, pair.up_proj):
        layer.accumulate_into_main_grad = True
        layer.weight.main_grad = torch.zeros(4, 3, device=device)
    input = torch.randn(2, 3, device=device)
    pair(input).sum().backward()
    expected(input).sum().backward()
    for name in ("gate_proj", "up_proj"):
        weight = getattr(pair, name).weight
        assert weight.grad is None
        torch.testing.assert_close(weight.main_grad, getattr(expected, name).weight.grad)


def test_convert_and_revert_leave_such_layers_alone(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 4, device=device), nn.Linear(4, 3, device=device))
    fastlinear.convert(model)
    model[0].accumulate_into_main_grad = True
    report = fastlinear.revert(model)
    assert [name for name, _ in report.skipped] == ["0"]
    assert type(model[0]) is fastlinear.Linear
    assert type(model[1]) is nn.Linear


def test_repr_and_explain_say_so(path: str, device: torch.device) -> None:
    layer = accumulating(3, 4, device)
    assert "accumulate_into_main_grad=True" in repr(layer)
    said = str(fastlinear.explain(layer, torch.randn(2, 3, device=device)))
    by = "the kernel" if "kernels" in path or path == "triton" else "PyTorch"
    assert f"grad_weight is added to weight.main_grad by {by}" in said


@pytest.mark.parametrize("later", ["torch", "auto", "triton"])
def test_backward_takes_the_path_of_its_forward(
    path: str, later: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    from fastlinear.kernels.launching import launch

    layer = accumulating(3, 4, device, activation="relu")
    twin, start = beside(layer), layer.weight.main_grad.clone()
    input = torch.randn(2, 3, device=device, requires_grad=True)
    output, expected = layer(input).sum(), twin(input).sum()
    launched, run = [], launch.run
    monkeypatch.setattr(
        launch, "run", lambda *given: (launched.append(given[0].__name__), run(*given))
    )
    with fastlinear.use_backend(later):
        output.backward()
    kernels = {
        "triton": ["elementwise_backward_kernel", "linear_backward_kernel"],
        "auto with kernels": ["linear_backward_weight_kernel"],
    }
    assert launched == kernels.get(path, [])
    expected.backward()
    torch.testing.assert_close(layer.weight.main_grad - start, twin.weight.grad)


def test_auto_takes_pytorch_where_triton_cannot_launch(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """As where there is no C compiler. Once it has been tried."""
    from fastlinear.kernels.launching import launch

    def refuse(*given: Any) -> None:
        tried.append(given)
        raise launch.CannotLaunch("backend 'triton' needs Triton to compile and launch ...")

    tried: list[Any] = []
    without: set[torch.device] = set()
    monkeypatch.setattr(module, "_without_kernels", without)
    monkeypatch.setattr(module, "by_the_kernels", lambda input: input.device not in without)
    monkeypatch.setattr(launch, "run", refuse)
    layer = accumulating(3, 4, device)
    start, input = layer.weight.main_grad.clone(), torch.randn(2, 3, device=device)
    for _ in range(2):
        layer(input).sum().backward()
    assert len(tried) == 1
    torch.testing.assert_close(layer.weight.main_grad - start, 2 * input.sum(0).expand(4, 3))
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 4.0, device=device))


def test_adds_where_autograd_wants_the_gradient_alone(path: str, device: torch.device) -> None:
    layer = accumulating(3, 4, device)
    start = layer.weight.main_grad.clone()
    input = torch.randn(2, 3, device=device, requires_grad=True)
    loss = layer(input).sum()
    (grad_input,) = torch.autograd.grad(loss, input, retain_graph=True)
    torch.testing.assert_close(grad_input, layer.weight.detach().sum(0).expand(2, 3))
    loss.backward(inputs=[layer.bias], retain_graph=True)
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 2.0, device=device))
    assert torch.equal(layer.weight.main_grad, start)
    loss.backward(inputs=[layer.weight])
    expected = input.detach().sum(0).expand(4, 3)
    torch.testing.assert_close(layer.weight.main_grad - start, expected)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3)], ids=str)
def test_output_may_change_in_place(
    shape: tuple[int, ...], path: str, device: torch.device
) -> None:
    layer = accumulating(3, 4, device)
    start = layer.weight.main_grad.clone()
    input = torch.randn(*shape, device=device)
    nn.Sequential(layer, nn.ReLU(inplace=True))(input).sum().backward()
    twin = beside(layer)
    twin(input).relu().sum().backward()
    torch.testing.assert_close(layer.weight.main_grad - start, twin.weight.grad)


def test_backward_within_autocast(path: str, device: torch.device) -> None:
    layer = accumulating(48, 40, device)
    twin, start = beside(layer), layer.weight.main_grad.clone()
    input = torch.randn(70, 48, device=device, requires_grad=True)
    output, expected = layer(input), twin(input)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(
        layer.weight.main_grad - start, twin.weight.grad, rtol=1e-5, atol=1e-4
    )


def test_autocast_lets_float64_be(path: str, device: torch.device) -> None:
    layer = accumulating(3, 4, device, dtype=torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = layer(torch.randn(2, 3, dtype=torch.float64, device=device))
    assert output.dtype == torch.float64


def test_batch_invariant_rows(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    from fastlinear.kernels.backward import linear as backward

    asked, compute = [], backward.linear_backward
    monkeypatch.setattr(
        backward,
        "linear_backward",
        lambda *given, **named: asked.append(named["batch_invariant"]) or compute(*given, **named),
    )
    layer = accumulating(3, 4, device)
    with fastlinear.batch_invariant():
        layer(torch.randn(2, 3, device=device)).sum().backward()
    assert asked == [True]


@pytest.mark.gpu
def test_threads_lose_nothing(device: torch.device) -> None:
    layer = accumulating(400, 300, device, dtype=torch.bfloat16)
    layer.weight.main_grad.zero_()
    input = torch.ones(4, 400, dtype=torch.bfloat16, device=device)

    def work() -> None:
        for _ in range(10):
            layer(input).sum().backward()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(layer.weight.main_grad, torch.full((300, 400), 160.0, device=device))


def test_torch_fx_and_torchscript(path: str, device: torch.device) -> None:
    layer = accumulating(3, 4, device)
    start = layer.weight.main_grad.clone()
    input = torch.randn(2, 3, device=device)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    traced(input).sum().backward()
    expected = input.sum(0).expand(4, 3)
    torch.testing.assert_close(layer.weight.main_grad - start, expected)
    with pytest.raises(RuntimeError, match=r"torch.jit.script takes layers that leave"):
        torch.jit.script(nn.Sequential(layer))


def test_layers_put_together_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="but layer 1 accumulates into main_grad"):
        fastlinear.BatchedLinear.from_linears(
            [fastlinear.Linear(3, 4, device=device), accumulating(3, 4, device)]
        )
