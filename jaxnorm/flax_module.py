"""Flax linen layers: they own the parameters and leave the rest to instance_norm and group_norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.nn import initializers
from jax.typing import ArrayLike

from jaxnorm import arguments
from jaxnorm.arguments import Activation, Axes, AxisName, Implementation
from jaxnorm.functional import instance_norm
from jaxnorm.layer import (
    AxisIndexGroups,
    channel_axes,
    channels_per_group,
    check_momentum,
    check_reduction_axes,
    normalize,
    updated,
    uses_running_average,
)


class InstanceNorm(nn.Module):
    """flax.linen.InstanceNorm with accurate statistics, a fused activation and a fused residual add.

    It takes the same arguments and has the same parameters ("scale" and "bias", so checkpoints load both ways) and
    output dtype, and is channels-last by default. See jaxnorm.instance_norm for the formula.

    Attributes:
      epsilon: added to the variance.
      dtype: result dtype; None infers it from the input and the parameters, so a bfloat16 input with float32
        parameters gives float32. Statistics are those of the input as it comes, in at least float32.
      param_dtype: dtype of the parameters.
      use_bias: whether to add a bias (beta).
      use_scale: whether to multiply by a scale (gamma).
      bias_init, scale_init: initializers.
      feature_axes: the channel axes, one or several; axis 0 is the batch, the rest is spatial.
      axis_name: the mapped axis (shard_map, pmap, vmap) over which the positions of one instance are spread. JAX
        raises a NameError where no such axis is mapped.
      axis_index_groups: groups of indices of that axis that share their instances, as in jax.lax.psum.
      use_fast_variance, force_float32_reductions: ignored; accepted for compatibility. The statistics are always the
        stable ones in at least float32, and cost no more.
      activation: None, or a function applied last, such as jax.nn.relu. A linen module, such as flax.linen.PReLU(), is
        a submodule of the layer and has its parameters there. A function may call modules, but not create them.
      implementation: as in jaxnorm.instance_norm.
      track_running_stats: whether to keep running averages of the mean and the unbiased variance of every channel,
        as torch.nn.InstanceNorm does with this argument: "mean" and "var" in the collection "batch_stats".
      momentum: the weight of the new statistics in the running average, as in PyTorch: 1 minus Flax's.
      use_running_average: with track_running_stats, whether to normalize with the running averages (and leave them)
        or with the statistics of the input (and update them); here or when called.
      stats_axis_name: the mapped axis, or axes, over which the running averages are averaged too, such as the axis of
        the devices that share a batch; flax.linen.BatchNorm calls it axis_name.

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
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    activation: Activation | None = None
    implementation: Implementation | None = None
    track_running_stats: bool = False
    momentum: float = 0.1
    use_running_average: bool | None = None
    stats_axis_name: AxisName | None = None

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
          use_running_average: as the attribute of that name, which it overrides if it is not None.

        Returns:
          An array of the shape of x.

        Raises:
          TypeError: as jaxnorm.instance_norm, in the words of this layer.
          ValueError: as jaxnorm.instance_norm, in the words of this layer.
        """
        x = arguments.as_array("x", x)
        axes = channel_axes(x.shape, self.feature_axes)
        channels = tuple(x.shape[axis] for axis in axes)
        use_running = uses_running_average(self.track_running_stats, self.use_running_average, use_running_average)
        scale, bias = _scale_and_bias(self, channels)
        if self.track_running_stats:
            check_momentum(self.momentum)
            mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
            var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        y, statistics = normalize(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            dtype=self.dtype,
            channel_axis=axes,
            activation=self.activation,
            mask=mask,
            residual=residual,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            implementation=self.implementation,
            running=(mean.value, var.value) if use_running else None,
            initializing=self.is_initializing(),
        )
        if self.track_running_stats and not use_running and not self.is_initializing():
            running = mean.value, var.value
            mean.value, var.value = updated(running, statistics, self.momentum, self.stats_axis_name)
        return y


class GroupNorm(nn.Module):
    """flax.linen.GroupNorm with accurate statistics, a fused activation and a fused residual add.

    It takes the same arguments and has the same parameters ("scale" and "bias", so checkpoints load both ways) and
    output dtype; the channels are the last axis. See jaxnorm.group_norm for the formula.

    Attributes:
      num_groups: how many groups the channels form.
      group_size: or how many neighboring channels form a group; num_groups must be None then.
      epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init: as in jaxnorm.InstanceNorm.
      reduction_axes: None, or all axes but the batch. Merge axes that are not to be reduced into the batch.
      axis_name, axis_index_groups, use_fast_variance, force_float32_reductions: as in jaxnorm.InstanceNorm.
      activation, implementation: as in jaxnorm.InstanceNorm.

    >>> import jax, jax.numpy as jnp
    >>> import jaxnorm
    >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 64))
    >>> layer = jaxnorm.GroupNorm(num_groups=32, activation=jax.nn.silu)
    >>> variables = layer.init(jax.random.key(1), x)
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (64,), 'scale': (64,)}}
    >>> layer.apply(variables, x, residual=x).shape
    (2, 8, 8, 64)
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes | None = None
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    activation: Activation | None = None
    implementation: Implementation | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None, residual: ArrayLike | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: (N, ..., C), with or without spatial axes. Integers are converted, as Flax does.
          mask, residual: as in jaxnorm.InstanceNorm.

        Returns:
          An array of the shape of x.

        Raises:
          TypeError: as jaxnorm.group_norm, in the words of this layer.
          ValueError: as jaxnorm.group_norm, in the words of this layer.
        """
        x = arguments.check_rank(arguments.as_array("x", x), least=2)
        check_reduction_axes(self.reduction_axes, x.shape)
        group_size = channels_per_group(self.num_groups, self.group_size, x.shape)
        scale, bias = _scale_and_bias(self, x.shape[-1:])
        y, _ = normalize(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            dtype=self.dtype,
            channel_axis=(x.ndim - 1,),
            group_size=group_size,
            activation=self.activation,
            mask=mask,
            residual=residual,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            implementation=self.implementation,
            initializing=self.is_initializing(),
        )
        return y


def _scale_and_bias(
    layer: InstanceNorm | GroupNorm, shape: tuple[int, ...]
) -> tuple[jax.Array | None, jax.Array | None]:
    """The parameters of a layer, created where it is initialized. No method, since Flax would log a method's calls."""
    scale = layer.param("scale", layer.scale_init, shape, layer.param_dtype) if layer.use_scale else None
    bias = layer.param("bias", layer.bias_init, shape, layer.param_dtype) if layer.use_bias else None
    return scale, bias


class InstanceNorm2D(nn.Module):
    """Instance normalization of feature maps (N, C, H, W), with one scale and one bias per map.

    This is the layer of PuzzleLib's documentation: parameters "scale" and "bias" of shape (num_maps,), float32.

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
