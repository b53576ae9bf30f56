"""What reports on the implementations: explain, selfcheck and the stopwatch."""

from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.tile import NoTile, Tile
from jaxnorm.report.explain import Explanation, Pass

__all__ = ["Device", "Explanation", "NoTile", "Pass", "Tile"]
