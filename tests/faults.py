"""What selfcheck must see: functions that it runs in processes of their own, each with something wrong."""

import functools
import itertools
import os
import sys
import time

import numpy as np


def dies():
    print("CUDA_ERROR_LAUNCH_FAILED [from C++]", file=sys.stderr, flush=True)
    os.abort()


def leaves():
    os._exit(3)


def hangs():
    while True:
        time.sleep(1)


def refuses():
    raise RuntimeError("cannot launch <object at 0x7f00deadbeef>")


def fine():
    return {"outcome": "right"}


def wrong(case, change):
    """The row of a case whose forward pass has a fault."""
    from jaxnorm.selfcheck import numbers

    numbers.forward = functools.partial(_CHANGES[change], numbers.forward)
    return numbers.numbers(case)


def _scaled(forward, case, given):
    return forward(case, given) * 1.0001


def _not_a_number(forward, case, given):
    y = forward(case, given)
    return y.at[(0,) * y.ndim].set(np.nan)


def _wrong_gradient(forward, case, given):
    """y is right."""
    import jax

    y = forward(case, given)
    return y + 1e-3 * (y - jax.lax.stop_gradient(y))


def _overwritten(forward, case, given):
    """The first positions of the second sample, by the rounded-up last box of the first one."""
    y = forward(case, given)
    return y.at[1, 0].set(y[0, -1])


_CHANGES = {
    "none": lambda forward, case, given: forward(case, given),
    "scaled": _scaled,
    "not a number": _not_a_number,
    "wrong gradient": _wrong_gradient,
    "overwritten": _overwritten,
}


def race(case, repeats, wrong):
    """The row of a case whose run of that number, of all, differs in one bit; None: no run does."""
    import jax
    import jax.numpy as jnp

    from jaxnorm.selfcheck import numbers, races

    original, count = numbers.forward, itertools.count(1)

    def noise(_):
        return np.float32(1e-6 if next(count) == wrong else 0)

    def forward(case, given):
        y = original(case, given)
        first = jax.lax.stop_gradient(y[(0,) * y.ndim])
        return y + jax.lax.stop_gradient(jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32), first))

    numbers.forward = forward
    return races.races(case, repeats) | {"runs": next(count) - 1}
