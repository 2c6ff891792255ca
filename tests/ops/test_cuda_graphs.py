"""CUDA graphs of a forward and of a training step."""

import copy

import pytest
import torch
from networks import Function, network
from oracle import normal

import fastlinear

pytestmark = pytest.mark.usefixtures("triton_backend")


# CUDA graphs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def warmed_up(step: Function) -> None:
    """Runs `step` on a stream of its own, as what is to be captured must have been run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("plain_outputs")  # guards would be written by the graph, again and again
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_cuda_graph_of_a_forward_replays(dtype: torch.dtype, device: torch.device) -> None:
    model = network(fastlinear.Linear, device, dtype)
    input = normal((40, 3), dtype, device)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        warmed_up(lambda: model(input))
        with torch.cuda.graph(graph):
            output = model(input)
        for _ in range(2):
            input.copy_(torch.randn_like(input))
            graph.replay()
            torch.testing.assert_close(output, model(input.clone()))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("plain_outputs")
@pytest.mark.parametrize("rows", [40, 5000], ids=["one sum", "split sums"])
def test_cuda_graph_of_a_training_step_replays(rows: int, device: torch.device) -> None:
    model = network(fastlinear.Linear, device, torch.float32)
    eager = copy.deepcopy(model)
    input = normal((rows, 3), torch.float32, device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input).square().mean().backward()

    warmed_up(step)
    # Gradients that are None when the capture starts are the graph's own, and each replay
    # overwrites them.
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(input).square().mean().backward()
    for _ in range(2):
        input.copy_(torch.randn_like(input))
        graph.replay()
        eager.zero_grad(set_to_none=True)
        eager(input.clone()).square().mean().backward()
        torch.testing.assert_close(
            [parameter.grad for parameter in model.parameters()],
            [parameter.grad for parameter in eager.parameters()],
        )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("plain_outputs")
def test_compiled_with_cuda_graphs_trains_as_eager(device: torch.device) -> None:
    """With split sums, the counters of which outlive a call."""
    model = network(fastlinear.Linear, device, torch.float32)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(4):  # run, captured and replayed
        input = torch.randn(5000, 3, device=device)
        torch.compiler.cudagraph_mark_step_begin()
        for one in (compiled, eager):
            one.zero_grad(set_to_none=True)
            one(input).square().mean().backward()
        torch.testing.assert_close(
            [parameter.grad for parameter in model.parameters()],
            [parameter.grad for parameter in eager.parameters()],
        )


@pytest.mark.gpu
@needs_gpu
# torch's own warm-up and capture are on two streams.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@pytest.mark.usefixtures("plain_outputs")
def test_cuda_graphed_callable_trains_as_eager(device: torch.device) -> None:
    model = network(fastlinear.Linear, device, torch.float32)
    eager = copy.deepcopy(model)
    sample = torch.randn(40, 3, device=device, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(model, (sample,))
    for _ in range(2):
        input = torch.randn(40, 3, device=device, requires_grad=True)
        ours, theirs = (call(input).square().mean() for call in (graphed, eager))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, (input, *model.parameters())),
            torch.autograd.grad(theirs, (input, *eager.parameters())),
        )
