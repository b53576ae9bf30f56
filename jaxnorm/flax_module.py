"""Flax linen layers: they own the parameters and leave the rest to instance_norm."""

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.nn import initializers
from jax.typing import ArrayLike

from jaxnorm.arguments import Activation, Axes, Implementation
from jaxnorm.functional import instance_norm
from jaxnorm.layer import channel_axes, check_momentum, counted, normalize, updated


class InstanceNorm(nn.Module):
    """flax.linen.InstanceNorm with exact statistics, a fused activation and a fused residual add.

    Takes its place with the same arguments: same parameters ("scale" and "bias", so checkpoints load both ways),
    same output dtype, channels-last by default. See jaxnorm.instance_norm for the formula.

    Attributes:
      epsilon: added to the variance.
      dtype: of the result; None infers it from the input and the parameters, so a bfloat16 input with float32
        parameters gives float32. Statistics are taken of the input as it comes, in at least float32.
      param_dtype: of the parameters.
      use_bias: whether to add a bias (beta).
      use_scale: whether to multiply by a scale (gamma).
      bias_init, scale_init: initializers.
      feature_axes: the channel axes, one or several; axis 0 is the batch, the rest is spatial.
      axis_name: the mapped axis (shard_map, pmap, vmap) over which the positions of one instance are spread.
      axis_index_groups: groups of indices of that axis that share their instances, as in jax.lax.psum.
      use_fast_variance, force_float32_reductions: accepted for Flax's sake; whatever they say, the statistics are the
        stable ones in at least float32, and cost no more.
      activation: None, or an elementwise function applied last, such as jax.nn.relu.
      implementation: as in jaxnorm.instance_norm.
      track_running_stats: whether to keep running averages of the mean and the unbiased variance of every channel,
        as torch.nn.InstanceNorm does with this argument: "mean" and "var" in the collection
        "batch_stats".
      momentum: the weight of the new statistics in the running average, as in PyTorch: 1 minus Flax's.
      use_running_average: with track_running_stats, whether to normalize with the running averages (and leave them)
        or with the statistics of the input (and update them); here or when called, as in flax.linen.BatchNorm.

    >>> import jax, jax.numpy as jnp
    >>> import jaxnorm
    >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    >>> layer = jaxnorm.InstanceNorm(activation=jax.nn.relu)
    >>> variables = layer.init(jax.random.key(1), x)
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (3,), 'scale': (3,)}}
    >>> layer.apply(variables, x, residual=x).shape
    (2, 8, 8, 3)
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    activation: Activation | None = None
    implementation: Implementation | None = None
    track_running_stats: bool = False
    momentum: float = 0.1
    use_running_average: bool | None = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        use_running_average: bool | None = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: (N, ..., C), or as feature_axes says, with at least one spatial axis. Integers are converted, as Flax does.
          mask: None, or an array broadcastable to x, nonzero at the positions that count for the statistics.
          residual: None, or an array of the shape of x that is added before the activation.
          use_running_average: as the attribute of that name; either says it.

        Returns:
          An array of the shape of x.

        Raises:
          TypeError: as jaxnorm.instance_norm, in the words of this layer.
          ValueError: as jaxnorm.instance_norm, in the words of this layer.
        """
        x = jnp.asarray(x)
        axes = channel_axes(x.shape, self.feature_axes)
        shape = tuple(x.shape[axis] for axis in axes)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        if self.is_initializing():
            # A module that the activation calls makes its parameters here: inside a trace, which the checks are, they
            # would be tracers. What is wrong with an activation the checks say.
            with contextlib.suppress(Exception):
                self.activation(jnp.zeros(()))  # type: ignore[misc]
        running = self._running(shape)
        use_running = self._uses_running(use_running_average)
        y, moments = normalize(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            dtype=self.dtype,
            mask=mask,
            residual=residual,
            channel_axis=axes,
            activation=self.activation,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            implementation=self.implementation,
            running=(running[0].value, running[1].value) if running and use_running else None,
        )
        if running and not use_running and not self.is_initializing():
            mean, var = running
            count = counted(x.shape, axes, mask, self.axis_name, self.axis_index_groups)
            mean.value, var.value = updated((mean.value, var.value), moments, self.momentum, count)
        return y

    def _running(self, shape: tuple[int, ...]) -> tuple[nn.Variable[Any], nn.Variable[Any]] | None:
        if not self.track_running_stats:
            return None
        check_momentum(self.momentum)
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(shape, jnp.float32))
        return mean, self.variable("batch_stats", "var", lambda: jnp.ones(shape, jnp.float32))

    def _uses_running(self, at_call: bool | None) -> bool:
        if self.track_running_stats:
            return bool(nn.merge_param("use_running_average", self.use_running_average, at_call))
        if self.use_running_average or at_call:
            raise ValueError(
                "use_running_average=True needs running averages: got track_running_stats=False. "
                "Pass track_running_stats=True from the start of the training."
            )
        return False


class InstanceNorm2D(nn.Module):
    """Instance normalization of feature maps (N, C, H, W), with one scale and one bias per map.

    The layer of PuzzleLib's documentation: parameters "scale" and "bias" of shape (num_maps,), float32.

    Attributes:
      num_maps: the number of maps C.
      epsilon: added to the variance.
      affine: whether the scale and the bias are learned; if not they are 1 and 0.

    >>> import jax, jax.numpy as jnp
    >>> import jaxnorm
    >>> data = jax.random.normal(jax.random.key(0), (5, 3, 4, 4))
    >>> layer = jaxnorm.InstanceNorm2D(num_maps=3)
    >>> variables = layer.init(jax.random.key(1), data)
    >>> bool(jnp.abs(layer.apply(variables, data).mean(axis=(2, 3))).max() < 1e-6)
    True
    """

    num_maps: int
    epsilon: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: ArrayLike) -> jax.Array:
        """Normalizes x of shape (N, num_maps, H, W); returns the shape and dtype of x."""
        if jnp.ndim(x) != 4 or jnp.shape(x)[1] != self.num_maps:
            raise ValueError(
                f"InstanceNorm2D needs an input of shape (N, {self.num_maps}, H, W), since num_maps={self.num_maps}: "
                f"got {jnp.shape(x)}. For other ranks or layouts use jaxnorm.InstanceNorm."
            )
        gamma = self.param("scale", initializers.ones, (self.num_maps,), jnp.float32) if self.affine else None
        beta = self.param("bias", initializers.zeros, (self.num_maps,), jnp.float32) if self.affine else None
        return instance_norm(x, gamma, beta, self.epsilon, channel_axis=1)
