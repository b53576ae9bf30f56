"""PyTorch's side of worker.py. It needs PyTorch and nothing else."""

import functools
import os

import torch
from torch.nn import functional

from benchmarks.shapes import EPSILON
from benchmarks.worker import serve

ACTIVATIONS = {
    "relu": functional.relu,
    "silu": functional.silu,
    # What jax.nn.gelu computes by default.
    "gelu": functools.partial(functional.gelu, approximate="tanh"),
}


def prepare(case):
    """A function that makes one call: forward, or y and the gradients of all inputs."""
    batch, spatial, channels = case["shape"]
    torch.manual_seed(0)

    def draw():
        # The logical shape is always (N, C, *spatial); the layout is how it lies in memory.
        if case["layout"] == "channels-last":
            x = torch.randn(batch, *spatial, channels).movedim(-1, 1)
        else:
            x = torch.randn(batch, channels, *spatial)
        return x.to(getattr(torch, case["dtype"]))

    dy, *inputs = draw(), draw(), torch.ones(channels), torch.zeros(channels)
    if case["residual"]:
        inputs.append(draw())

    def forward():
        x, gamma, beta, *residual = inputs
        z = functional.instance_norm(x, weight=gamma, bias=beta, eps=EPSILON)
        return ACTIVATIONS[case["activation"]](z + residual[0] if residual else z)

    def step():
        y = forward()
        return y, *torch.autograd.grad(y, inputs, dy)

    if case["pass_name"] == "forward":
        return forward
    for tensor in inputs:
        tensor.requires_grad_()
    return step


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    serve({"version": torch.__version__, "threads": torch.get_num_threads()}, prepare)
