"""The naive arm: one untuned Triton matmul for every product, and everything else apart.

What a first Triton kernel looks like: a fixed tile, the bias added and the activation applied in
passes of their own by PyTorch. It says what fusing and choosing tiles is worth.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    ALLOW_TF32: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """c (M, N), contiguous, is a (M, K) @ b (K, N); one program a BLOCK x BLOCK tile."""
    offs_m = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offs_n = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=ACC_DTYPE)
    for k in range(0, K, BLOCK):
        mask_k = offs_k < K - k
        a = tl.load(
            a_ptr + offs_m[:, None] * stride_am + (k + offs_k)[None, :] * stride_ak,
            mask=(offs_m < M)[:, None] & mask_k[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + (k + offs_k)[:, None] * stride_bk + offs_n[None, :] * stride_bn,
            mask=mask_k[:, None] & (offs_n < N)[None, :],
            other=0.0,
        )
        acc = tl.dot(
            a, b, acc, input_precision="tf32" if ALLOW_TF32 else "ieee", out_dtype=ACC_DTYPE
        )
    c_ptrs = c_ptr + offs_m[:, None] * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    c = a.new_empty(m, n)
    matmul_kernel[triton.cdiv(m, BLOCK), triton.cdiv(n, BLOCK)](
        a,
        b,
        c,
        m,
        n,
        k,
        *a.stride(),
        *b.stride(),
        ALLOW_TF32=a.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest",
        ACC_DTYPE=tl.float64 if a.dtype == torch.float64 else tl.float32,
        BLOCK=BLOCK,
    )
    return c


class NaiveLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return matmul(input, weight.t())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        input, weight = ctx.saved_tensors
        return matmul(grad_output, weight), matmul(grad_output.t(), input)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = NaiveLinear.apply(input, weight)
    return output if bias is None else output + bias
