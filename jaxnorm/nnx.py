"""The Flax NNX layers: they own the parameters and leave the rest to instance_norm and group_norm."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax.nn import initializers
from jax.typing import ArrayLike

from jaxnorm import arguments
from jaxnorm.arguments import Activation, AxisName, Implementation
from jaxnorm.layer import (
    AxisIndexGroups,
    channel_axes,
    check_momentum,
    check_reduction_axes,
    normalize,
    updated,
    uses_running_average,
)


class InstanceNorm(nnx.InstanceNorm):
    """flax.nnx.InstanceNorm with accurate statistics, a fused activation and a fused residual add.

    It takes the same arguments. It is a flax.nnx.InstanceNorm and lets Flax create the parameters: they have the same
    names, values and metadata, and state moves both ways. It has the same output dtype and is channels-last by default.
    See jaxnorm.instance_norm for the formula.

    Args:
      num_features: the number of channels of x. For several feature_axes the product of their sizes.
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
      use_fast_variance: ignored; accepted for compatibility. The statistics are always the stable ones in at least
        float32, and cost no more.
      promote_dtype: a function of ((x, scale, bias), dtype=dtype). What your own returns is what is normalized, scaled
        and shifted. Flax's is not called, since it rounds the input to dtype before the statistics.
      rngs: the streams of random keys; one of "params" for the scale, then one for the bias.
      bias_metadata, scale_metadata: metadata of the parameters.
      activation: None, or a function applied last, such as jax.nn.relu. An NNX module, such as flax.nnx.PReLU(), is
        trained with the layer.
      implementation: as in jaxnorm.instance_norm.
      track_running_stats: whether to keep running averages of the mean and the unbiased variance of every channel,
        as torch.nn.InstanceNorm does with this argument: BatchStat variables "mean" and "var".
      momentum: the weight of the new statistics in the running average, as in PyTorch: 1 minus Flax's.
      use_running_average: with track_running_stats, whether to normalize with the running averages (and leave them)
        or with the statistics of the input (and update them); train(), eval() and nnx.view set it, as in
        flax.nnx.BatchNorm.
      stats_axis_name: the mapped axis, or axes, over which the running averages are averaged too, such as the axis of
        the devices that share a batch; flax.nnx.BatchNorm calls it axis_name.

    >>> import jax
    >>> import jaxnorm
    >>> from flax import nnx
    >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    >>> layer = jaxnorm.nnx.InstanceNorm(3, activation=jax.nn.relu, rngs=nnx.Rngs(1))
    >>> layer.scale.shape, layer.bias.shape
    ((3,), (3,))
    >>> layer(x, residual=x).shape
    (2, 8, 8, 3)
    """

    # A flax.nnx.InstanceNorm whose class is replaced by this one lacks these attributes.
    activation: Activation | None = None
    implementation: Implementation | None = None
    track_running_stats: bool = False
    momentum: float = 0.1
    use_running_average: bool | None = False
    stats_axis_name: AxisName | None = None

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = flax_promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        activation: Activation | None = None,
        implementation: Implementation | None = None,
        track_running_stats: bool = False,
        momentum: float = 0.1,
        use_running_average: bool | None = False,
        stats_axis_name: AxisName | None = None,
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            feature_axes=feature_axes,
            # Flax only keeps it.
            axis_name=axis_name,  # type: ignore[arg-type]
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.activation = activation
        self.implementation = implementation
        self.track_running_stats = track_running_stats
        self.momentum = momentum
        self.use_running_average = use_running_average
        self.stats_axis_name = stats_axis_name
        if track_running_stats:
            check_momentum(momentum)
            self.mean = nnx.BatchStat(jnp.zeros(num_features, jnp.float32))
            self.var = nnx.BatchStat(jnp.ones(num_features, jnp.float32))
        else:
            uses_running_average(track_running_stats, use_running_average, None)

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
          ValueError: as jaxnorm.instance_norm, in the words of this layer; or x has not num_features channels.
        """
        x = arguments.as_array("x", x)
        axes = channel_axes(x.shape, self.feature_axes)
        channels = tuple(x.shape[axis] for axis in axes)
        _check_num_features(self.num_features, x.shape, axes)
        x, scale, bias = _promoted(self, x, self.num_features)
        # eval() sets the attribute of every layer, also of those without running averages.
        in_layer = self.use_running_average if self.track_running_stats else None
        use_running = uses_running_average(self.track_running_stats, in_layer, use_running_average)
        y, statistics = normalize(
            x,
            None if scale is None else scale.reshape(channels),
            None if bias is None else bias.reshape(channels),
            epsilon=self.epsilon,
            dtype=self.dtype,
            channel_axis=axes,
            activation=self.activation,
            mask=mask,
            residual=residual,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            implementation=self.implementation,
            running=(self.mean[...].reshape(channels), self.var[...].reshape(channels)) if use_running else None,
        )
        if self.track_running_stats and not use_running:
            running = self.mean[...], self.var[...]
            self.mean[...], self.var[...] = updated(running, statistics, self.momentum, self.stats_axis_name)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode of a view that nnx.view makes.

        Args:
          use_running_average: if True, a layer with running averages normalizes with them; if False, with the
            statistics of the input; None leaves it as it is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class GroupNorm(nnx.GroupNorm):
    """flax.nnx.GroupNorm with accurate statistics, a fused activation and a fused residual add.

    It takes the same arguments. It is a flax.nnx.GroupNorm and lets Flax create the parameters: they have the same
    names, values and metadata, and state moves both ways. It has the same output dtype, and the channels are the last
    axis. See jaxnorm.group_norm for the formula.

    Args:
      num_features: the number of channels of x.
      num_groups: how many groups the channels form.
      group_size: or how many neighboring channels form a group; num_groups must be None then.
      reduction_axes: None, or all axes but the batch. Merge axes that are not to be reduced into the batch.
      epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init: as in jaxnorm.nnx.InstanceNorm.
      axis_name, axis_index_groups, use_fast_variance, promote_dtype, rngs, bias_metadata, scale_metadata: as in
        jaxnorm.nnx.InstanceNorm.
      activation, implementation: as in jaxnorm.nnx.InstanceNorm.

    >>> import jax
    >>> import jaxnorm
    >>> from flax import nnx
    >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 64))
    >>> layer = jaxnorm.nnx.GroupNorm(64, num_groups=32, activation=jax.nn.silu, rngs=nnx.Rngs(1))
    >>> layer.scale.shape, layer.bias.shape
    ((64,), (64,))
    >>> layer(x, residual=x).shape
    (2, 8, 8, 64)
    """

    # A flax.nnx.GroupNorm whose class is replaced by this one lacks these attributes.
    activation: Activation | None = None
    implementation: Implementation | None = None

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        reduction_axes: Axes | None = None,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = flax_promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        activation: Activation | None = None,
        implementation: Implementation | None = None,
    ):
        super().__init__(
            num_features,
            num_groups,
            group_size,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            reduction_axes=reduction_axes,
            # Flax only keeps it.
            axis_name=axis_name,  # type: ignore[arg-type]
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.activation = activation
        self.implementation = implementation

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None, residual: ArrayLike | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: (N, ..., C), with or without spatial axes. Integers are converted, as Flax does.
          mask, residual: as in jaxnorm.nnx.InstanceNorm.

        Returns:
          An array of the shape of x.

        Raises:
          TypeError: as jaxnorm.group_norm, in the words of this layer.
          ValueError: as jaxnorm.group_norm, in the words of this layer; or x has not num_features channels.
        """
        x = arguments.check_rank(arguments.as_array("x", x), least=2)
        check_reduction_axes(self.reduction_axes, x.shape)
        num_features = self.num_groups * self.group_size
        if x.shape[-1] != num_features:
            raise ValueError(
                f"num_features must be the number of channels of x, the last axis: got num_features={num_features} for "
                f"x of shape {x.shape}. Make the layer with num_features={x.shape[-1]}."
            )
        x, scale, bias = _promoted(self, x, num_features)
        y, _ = normalize(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            dtype=self.dtype,
            channel_axis=(x.ndim - 1,),
            group_size=self.group_size,
            activation=self.activation,
            mask=mask,
            residual=residual,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            implementation=self.implementation,
        )
        return y


def _promoted(
    layer: InstanceNorm | GroupNorm, x: jax.Array, num_features: int
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """x, the scale and the bias, by the promote_dtype of the user if there is one."""
    scale, bias = _parameter(layer, "scale", num_features), _parameter(layer, "bias", num_features)
    if layer.promote_dtype is not flax_promote_dtype:
        x, scale, bias = layer.promote_dtype((x, scale, bias), dtype=layer.dtype)
    return x, scale, bias


def _parameter(layer: InstanceNorm | GroupNorm, name: str, num_features: int) -> jax.Array | None:
    """The value of a parameter, which may come from anywhere."""
    parameter = getattr(layer, name)
    if parameter is None:
        return None
    value: jax.Array = parameter[...]
    if value.shape != (num_features,):
        raise ValueError(
            f"{name} must have shape ({num_features},), since num_features={num_features}: got {value.shape}. "
            "Load the state of a layer with as many features."
        )
    return value


def _check_num_features(num_features: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """num_features counts the channels of x, along all channel axes together."""
    count = math.prod(shape[axis] for axis in axes)
    if num_features == count:
        return
    message = (
        "num_features must be the number of channels of x, the product of the sizes of feature_axes: "
        f"got num_features={num_features} for x of shape {shape}, which has {count} along {axes}. "
    )
    fits = [axis for axis in range(1, len(shape)) if shape[axis] == num_features]
    if fits:
        message += f"It would fit feature_axes={' or '.join(map(str, fits))}: is x laid out as you think?"
    else:
        message += f"Make the layer with num_features={count}."
    raise ValueError(message)
