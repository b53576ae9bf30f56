"""What selfcheck must see: functions that it runs in processes of their own, each with something wrong."""

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


def right(**arguments):
    """None at all."""
    from jaxnorm.report import check

    return check.numbers(**arguments)


def scaled(**arguments):
    """y is off by a ten-thousandth, and so are its gradients."""
    return _with_forward(lambda y: y * 1.0001, arguments)


def not_a_number(**arguments):
    return _with_forward(lambda y: y.at[(0,) * y.ndim].set(np.nan), arguments)


def wrong_gradient(**arguments):
    """y is right."""
    import jax

    return _with_forward(lambda y: y + 1e-3 * (y - jax.lax.stop_gradient(y)), arguments)


def _with_forward(change, arguments):
    from jaxnorm.report import check

    original = check.forward
    check.forward = lambda case, given: change(original(case, given))
    return check.numbers(**arguments)


def steady(**arguments):
    """The same bits again and again."""
    return _racing(None, arguments)


def racy(**arguments):
    """One bit differs in the fiftieth run."""
    return _racing(50, arguments)


def _racing(wrong, arguments):
    import jax
    import jax.numpy as jnp

    from jaxnorm.report import check, races

    original, count = check.forward, itertools.count(1)

    def seen(_):
        return np.float32(1e-6 if next(count) == wrong else 0)

    def forward(case, given):
        y = original(case, given)
        first = jax.lax.stop_gradient(y[(0,) * y.ndim])
        noise = jax.pure_callback(seen, jax.ShapeDtypeStruct((), jnp.float32), first)
        return y + jax.lax.stop_gradient(noise)

    check.forward = forward
    found = races.races(**arguments, busy=False)
    return found | {"runs": next(count) - 1}
