"""What an activation is: elementwise or refused, comparable by what it does, its captures as arguments."""

from jaxnorm.activations.prepared import Prepared, prepare

__all__ = ["Prepared", "prepare"]
