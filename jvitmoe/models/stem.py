"""CCT's parts around the blocks: convolutional tokenizer and sequence pooling (Hassani et al., arXiv 2104.05704).

B batch · H, W rows and columns of a feature map · T tokens · D width · c channels
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvitmoe.models.layers import Linear, linear

CHANNELS = 64  # of every convolution but the last, as in CCT


class ConvStem(nn.Module):
    """images_BHWc -> tokens_BTD. Each factor 2 of `patch` halves H and W by a 3 x 3 convolution without bias and ReLU,
    either of stride 1 with 3 x 3 max pooling of stride 2 after it (CCT), or `strided`: of stride 2 (Xiao et al., arXiv
    2106.14881, without normalisation and the last 1 x 1 convolution, so that tokens pass a ReLU), which costs less:
    results/recipe_search has the times of a step."""

    patch: int
    width: int
    dtype: Any
    strided: bool = False

    @nn.compact
    def __call__(self, images_BHWc: jax.Array) -> jax.Array:
        x_BHWc = images_BHWc.astype(self.dtype)
        layers = self.patch.bit_length() - 1
        for layer in range(layers):
            features = self.width if layer == layers - 1 else CHANNELS
            init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # He et al., arXiv 1502.01852
            settings = {"use_bias": False, "kernel_init": init, "dtype": self.dtype, "name": f"conv{layer}"}
            stride = 2 if self.strided else 1
            x_BHWc = nn.relu(nn.Conv(features, (3, 3), stride, padding=1, **settings)(x_BHWc))
            x_BHWc = x_BHWc if self.strided else max_pool(x_BHWc)
        return x_BHWc.reshape(x_BHWc.shape[0], -1, self.width)  # B may be symbolic: no len()


def max_pool(x_BHWc: jax.Array) -> jax.Array:
    """Returns the maximum of every second 3 x 3 window, [B, H / 2, W / 2, c], of values that are not negative."""
    for axis in (1, 2):
        # Slices and maxima: XLA's reduce_window is slow to differentiate on a CPU.
        even, odd = (jax.lax.slice_in_dim(x_BHWc, start, None, 2, axis) for start in (0, 1))
        first, last = (jax.lax.slice_in_dim(odd, *ends, axis=axis) for ends in ((0, 1), (0, -1)))
        before = jax.lax.concatenate([jnp.zeros_like(first), last], axis)
        x_BHWc = jnp.maximum(jnp.maximum(even, odd), before)
    return x_BHWc


class SequencePool(nn.Module):
    """x_BTD -> x_BD: the mean of the tokens with weights softmax over T of a linear layer."""

    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scores_BT1 = linear(x_BTD, Linear(x_BTD.shape[-1:], (1,), name="scores")(), self.dtype)
        weights_BT1 = jax.nn.softmax(scores_BT1.astype(jnp.float32), axis=1).astype(self.dtype)
        return (weights_BT1 * x_BTD).sum(axis=1)
