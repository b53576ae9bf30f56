"""For tests of how XLA divides a pass over several GPUs, on several CPU devices: plain XLA takes the kernel's place."""

from jax.interpreters import mlir

from jaxnorm import dispatch


def assume():
    """In a process of its own: it stays."""
    for one_pass in (dispatch.FORWARD, dispatch.BACKWARD):
        mlir.register_lowering(one_pass.primitive, dispatch._lowering(one_pass, "cuda"), platform="cpu")
