"""PyTorch's turns, in a process and an interpreter of their own: needs PyTorch, nothing else, and no newer Python.

Reads one JSON object per line and answers with one:

    {"shape": [N, C, *spatial], "layout": "channels-last", "dtype": "float32", "step": true}   ->  {}
    {"calls": 3}                                                                               ->  {"seconds": per call}
"""

import json
import os
import sys
import time

import torch
from torch.nn import functional

EPSILON = 1e-5


def main():
    torch.set_num_threads(os.cpu_count())
    print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    call = None
    for line in sys.stdin:
        request = json.loads(line)
        if "calls" in request:
            answer = {"seconds": turn(call, request["calls"])}
        else:
            call, answer = prepare(**request), {}
        print(json.dumps(answer), flush=True)


def turn(call, calls):
    call()  # Not timed, as in turns.py.
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def prepare(shape, layout, dtype, step):
    """A function without arguments: forward, or y, dx, dgamma and dbeta."""
    torch.manual_seed(0)
    x, dy = (to_layout(torch.randn(shape), layout).to(getattr(torch, dtype)) for _ in range(2))
    gamma, beta = torch.ones(shape[1]), torch.zeros(shape[1])
    if not step:
        return lambda: norm(x, gamma, beta)
    for tensor in (x, gamma, beta):
        tensor.requires_grad_()

    def run():
        y = norm(x, gamma, beta)
        return (y, *torch.autograd.grad(y, (x, gamma, beta), dy))

    return run


def norm(x, gamma, beta):
    return functional.relu(functional.instance_norm(x, weight=gamma, bias=beta, eps=EPSILON))


def to_layout(x, layout):
    """The logical shape is always (N, C, *spatial), as PyTorch has it."""
    if layout == "channels-first":
        return x
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim])


if __name__ == "__main__":
    main()
