"""A model as it was, after it has been run."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastlinear import _torch_internals as internals


@contextlib.contextmanager
def unchanged(model: nn.Module, given: list[Tensor]) -> Iterator[None]:
    """Puts back at its end what a forward and a backward change of a model, and of what it gets."""
    tensors = [*model.parameters(), *(one for one in given if one.is_leaf)]
    devices = {one.device.index for one in (*tensors, *model.buffers(), *given) if one.is_cuda}
    with contextlib.ExitStack() as at_the_end:
        at_the_end.enter_context(torch.random.fork_rng(sorted(devices)))
        at_the_end.enter_context(internals.without_accumulation_hooks(tensors))
        for module in model.modules():
            at_the_end.callback(setattr, module, "training", module.training)
            if not isinstance(module, torch.jit.ScriptModule):
                at_the_end.callback(module._buffers.update, dict(module._buffers))
        for buffer in model.buffers():
            if not is_lazy(buffer):
                at_the_end.callback(_put_back, buffer, buffer.detach().clone())
        for tensor in tensors:
            gradient, main_grad = tensor.grad, getattr(tensor, "main_grad", None)
            at_the_end.callback(setattr, tensor, "grad", gradient)
            if gradient is not None and gradient._is_view():  # of memory that all ranks share, say
                at_the_end.callback(_put_back, gradient, gradient.clone())
            if isinstance(main_grad, Tensor):
                at_the_end.callback(_put_back, main_grad, main_grad.clone())
            if hasattr(tensor, "grad_added_to_main_grad"):
                was = tensor.grad_added_to_main_grad
                at_the_end.callback(setattr, tensor, "grad_added_to_main_grad", was)
            tensor.grad = None
        yield


def _put_back(tensor: Tensor, value: Tensor) -> None:
    """Only where it has changed: a graph may have saved it, and count its versions."""
    same = torch.equal(tensor.nan_to_num(), value.nan_to_num()) and torch.equal(
        tensor.isnan(), value.isnan()
    )
    if not same:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)
