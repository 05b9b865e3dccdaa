"""Layers of a ViT: linear, patches, convolutional stem, attention, pooling, head, dropout, GELU.

B batch · T tokens · D width · G heads · V width of a head · I, O inputs and outputs of a linear layer
J side of a patch · C classes · c colour channels
"""

import enum
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import Initializer

CHANNELS = 64  # of every convolution of a stem but the last, as in CCT (Hassani et al., arXiv 2104.05704)


class Site(enum.IntEnum):
    """Where in a layer random numbers are drawn: what is folded into an image's key. Values are part of a run's
    identity: add at the end, never renumber."""

    HIDDEN = 0  # dropout of the hidden units of an MLP
    WEIGHTS = 1  # dropout of the weights of attention
    ATTENTION = 2  # dropout of the output of attention
    MLP = 3  # dropout of the output of the MLP
    ROUTER_NOISE = 4
    EXPERTS = 5  # followed by the index of the expert that a router chose, and the site in it
    ATTENTION_PATH = 6  # drop_path of attention
    MLP_PATH = 7  # drop_path of the MLP


def torch_uniform(fan_in: int) -> Initializer:
    """Returns the initializer U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default of Linear, weight and bias."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def fold_in(key_B: jax.Array, number: int | jax.Array) -> jax.Array:
    """Returns the key of each image at this number."""
    return jax.vmap(jax.random.fold_in, (0, None))(key_B, number)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with its intermediate values recomputed in the backward pass. For cheap functions: storing
    their values for every layer costs memory and, on a CPU, time."""
    return jax.checkpoint(function, prevent_cse=False)  # in the scan over layers XLA cannot merge the two passes


def dropout(x_B: jax.Array, key_B: jax.Array | None, site: Site, rate: float) -> jax.Array:
    """Returns x with a share `rate` of its entries zeroed and the rest scaled by 1 / (1 - rate); x itself without keys.

    Each image has its own key, so the mask does not depend on the number of devices. Each entry uses 16 random bits:
    the rate is rounded to a multiple of 2^-16. In float32 the scale is that of the rounded rate, so the mean is exact;
    in bfloat16 it is off by at most 5e-5 up to a rate of 0.95. The mask of a row (an index of the first axis after B)
    does not depend on the number of rows.
    """
    if key_B is None or rate == 0.0:
        return x_B
    rows, *rest = x_B.shape[1:]
    words = random_words(fold_in(key_B, site), (-(-rows // 4), *rest))
    threshold = min(round(rate * 2**16), 2**16 - 1)
    kept = [(word >> shift & np.uint32(0xFFFF)) >= np.uint32(threshold) for word in words for shift in (0, 16)]
    packed_B = sum((bits.astype(jnp.uint8) << n for n, bits in enumerate(kept)), start=np.uint8(0))
    # Four masks in a byte take one pass, and a quarter of the memory until the backward pass. Without the barrier XLA
    # copies the generator into every fusion that reads them.
    packed_B = jax.lax.optimization_barrier(packed_B)
    kept_B = jnp.stack([packed_B >> n & np.uint8(1) for n in range(4)], axis=2).reshape(len(x_B), -1, *rest)[:, :rows]
    # In float32: bfloat16 would round 1 / 0.9 to 1.109375, so that the mean were 0.16 % too low.
    # The scale of a rounded rate may lie beside a tie of bfloat16, where nearly all products round the same way.
    dropped = threshold / 2**16 if x_B.dtype == jnp.float32 else min(rate, 1 - 2**-16)
    scaled_B = x_B.astype(jnp.float32) * (1.0 / (1.0 - dropped))
    return jnp.where(kept_B == 1, scaled_B, 0.0).astype(x_B.dtype)


def drop_path(x_B: jax.Array, key_B: jax.Array | None, site: Site, rate: jax.Array) -> jax.Array:
    """Returns x with each image's entries all zeroed with probability `rate`, or scaled by 1 / (1 - rate); x itself
    without keys. Source: stochastic depth (Huang et al., arXiv 1603.09382), as in timm."""
    if key_B is None:
        return x_B
    kept_B = jax.vmap(jax.random.uniform)(fold_in(key_B, site)) >= rate
    scale_B = jnp.where(kept_B, 1.0 / (1.0 - rate), 0.0).reshape(-1, *(1 for _ in x_B.shape[1:]))
    return (x_B.astype(jnp.float32) * scale_B).astype(x_B.dtype)  # as in `dropout`


def random_words(key_B: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns 64 random bits for each entry of each image, two arrays uint32 [B, *shape], a pure function of the key.

    They are the output of Threefry-2x32 with 20 rounds (Salmon et al., SC 2011; JAX's own generator) for the input
    (index, 0). The rounds are written out so that XLA fuses them into one pass over the array: on a CPU
    `jax.random.bits` makes many passes, which took 45 % of a step (docs/performance.md).
    """
    seed_B2 = jax.vmap(lambda key: jax.random.bits(key, (2,)))(key_B)
    whole = seed_B2.shape[0], *shape
    k0, k1 = (jnp.broadcast_to(seed_B2[:, n].reshape(-1, *(1 for _ in shape)), whole) for n in (0, 1))
    keys = k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA)
    x = jnp.broadcast_to(jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(1, *shape), whole) + k0
    y = k1
    for group, rotations in enumerate(THREEFRY):
        for rotation in rotations:
            x = x + y
            y = (y << rotation | y >> (32 - rotation)) ^ x
        x, y = x + keys[(group + 1) % 3], y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


THREEFRY = (((13, 15, 26, 6), (17, 29, 16, 24)) * 3)[:5]  # rotations in bits, in groups of four rounds


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


@_gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # Written out because shard_map's check_vma refuses JAX 0.12's derivative in float32.
    (x,), (dx,) = primals, tangents
    cdf = 0.5 * jax.lax.erfc(-x * 0.5**0.5)
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
    return x * cdf, dx * (cdf + x * density)


@recomputed
def gelu(x: jax.Array) -> jax.Array:
    """Returns x Phi(x), the exact GELU (Hendrycks and Gimpel, arXiv 1606.08415), of any shape."""
    return _gelu(x)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x [..., O] + bias [O] in the dtype of x. The gradient of a float32 bias is summed in float32."""
    return x + jnp.broadcast_to(bias, x.shape).astype(x.dtype)


class Linear(nn.Module):
    """The parameters of a linear layer: kernel [*inputs, *outputs] and bias [*outputs]. Returns them as a matrix [I, O]
    and a vector [O]."""

    inputs: tuple[int, ...]  # I is their product
    outputs: tuple[int, ...]  # O is their product

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        init = torch_uniform(fan_in)
        kernel, bias = self.param("kernel", init, (*self.inputs, *self.outputs)), self.param("bias", init, self.outputs)
        return kernel.reshape(fan_in, fan_out), bias.reshape(fan_out)


def linear(x: jax.Array, weights: tuple[jax.Array, jax.Array], dtype: Any) -> jax.Array:
    """Returns x [..., I] times kernel plus bias, [..., O] in `dtype`."""
    kernel_IO, bias_O = weights
    return add_bias(x.astype(dtype) @ kernel_IO.astype(dtype), bias_O)


def sincos2d(grid: int, width: int) -> np.ndarray:
    """Returns fixed positions_TD of grid x grid patches: a quarter of D each for sin and cos of column and row, with
    frequencies 10000^(-i / (D/4 - 1)) (Beyer et al., arXiv 2205.01580)."""
    omega = 10000.0 ** -(np.arange(width // 4) / max(width // 4 - 1, 1))
    row_T, column_T = np.indices((grid, grid)).reshape(2, -1)
    angles = [np.outer(index_T, omega) for index_T in (column_T, row_T)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def in_patches(images_BHWc: jax.Array, patch: int) -> jax.Array:
    """Returns [B, T, J J c], of which a J x J convolution of stride J is one matrix product."""
    b, side, _, c = images_BHWc.shape
    grid = side // patch
    patches = images_BHWc.reshape(b, grid, patch, grid, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(b, grid * grid, patch * patch * c)


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
            how = {"strides": 2} if self.strided else {"conv_general_dilated": convolve}
            x_BHWc = nn.relu(nn.Conv(features, (3, 3), padding=1, **settings, **how)(x_BHWc))
            x_BHWc = x_BHWc if self.strided else max_pool(x_BHWc)
        return x_BHWc.reshape(x_BHWc.shape[0], -1, self.width)  # B may be symbolic: no len()


def convolve(x_BHWc: jax.Array, kernel_JJcD: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """Returns the convolution [B, H, W, D] of stride 1, which keeps H and W. J is odd. `nn.Conv` calls it with more."""
    return _convolve(x_BHWc, kernel_JJcD)


@jax.custom_vjp
def _convolve(x_BHWc: jax.Array, kernel_JJcD: jax.Array) -> jax.Array:
    # Its derivative is written out: XLA's, two other convolutions, is slow on a CPU (docs/performance.md).
    return jax.lax.conv_general_dilated(x_BHWc, kernel_JJcD, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolve_forward(x_BHWc: jax.Array, kernel_JJcD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x_BHWc, kernel_JJcD), (x_BHWc, kernel_JJcD)


def _convolve_backward(saved: tuple[jax.Array, jax.Array], gradient_BHWD: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BHWc, kernel_JJcD = saved
    # Without the barrier XLA would mirror the window and not the kernel, which oneDNN does not take.
    mirrored_JJDc = jax.lax.optimization_barrier(kernel_JJcD[::-1, ::-1].swapaxes(2, 3))
    of_kernel = {"cpu": _kernel_gradient, "default": _kernel_gradient_of_xla}
    of_kernel_JJcD = jax.lax.platform_dependent(x_BHWc, kernel_JJcD, gradient_BHWD, **of_kernel)
    return _convolve(gradient_BHWD, mirrored_JJDc), of_kernel_JJcD


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _kernel_gradient(x_BHWc: jax.Array, kernel_JJcD: jax.Array, gradient_BHWD: jax.Array) -> jax.Array:
    # One product, [J J c, B H W] times [B H W, D].
    side, (height, width) = len(kernel_JJcD), x_BHWc.shape[1:3]
    padded = jnp.pad(x_BHWc, ((0, 0), *[(side // 2, side // 2)] * 2, (0, 0)))
    moved = [padded[:, j : j + height, i : i + width] for j, i in np.ndindex(side, side)]
    patches_NI, gradient_ND = (x.reshape(-1, x.shape[-1]) for x in (jnp.concatenate(moved, axis=-1), gradient_BHWD))
    return (patches_NI.T @ gradient_ND).reshape(kernel_JJcD.shape)


def _kernel_gradient_of_xla(x_BHWc: jax.Array, kernel_JJcD: jax.Array, gradient_BHWD: jax.Array) -> jax.Array:
    return jax.vjp(functools.partial(_convolve.fun, x_BHWc), kernel_JJcD)[1](gradient_BHWD)[0]


def max_pool(x_BHWc: jax.Array) -> jax.Array:
    """Returns the maximum of every second 3 x 3 window, [B, H / 2, W / 2, c], of values that are not negative."""
    return _max_of_three(_max_of_three(x_BHWc, 1), 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of_three(x_BHWc: jax.Array, axis: int) -> jax.Array:
    """Returns the maximum of the entries 2i - 1, 2i and 2i + 1 of an axis; before the first stands 0."""
    # Its derivative is written out: JAX's, of these slices and of reduce_window, is slow on a CPU.
    even, odd = _even_and_odd(x_BHWc, axis)
    return jnp.maximum(jnp.maximum(even, odd), _shifted(odd, axis, 1))


def _max_forward(x_BHWc: jax.Array, axis: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    largest = _max_of_three(x_BHWc, axis)
    return largest, (x_BHWc, largest)


def _max_backward(axis: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    x_BHWc, largest = saved
    even, odd = _even_and_odd(x_BHWc, axis)
    is_even = even == largest  # of equal values one gets the gradient
    is_odd = (odd == largest) & ~is_even
    of_even, of_odd = jnp.where(is_even, gradient, 0), jnp.where(is_odd, gradient, 0)
    of_odd += _shifted(jnp.where(is_even | is_odd, 0, gradient), axis, -1)
    return (jnp.stack([of_even, of_odd], axis + 1).reshape(x_BHWc.shape),)


_max_of_three.defvjp(_max_forward, _max_backward)


def _even_and_odd(x_BHWc: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    even, odd = (jax.lax.slice_in_dim(x_BHWc, start, None, 2, axis) for start in (0, 1))
    return even, odd


def _shifted(x_BHWc: jax.Array, axis: int, by: int) -> jax.Array:
    """Returns x moved by 1 or -1 along an axis, with 0 where nothing comes from."""
    kept = jax.lax.slice_in_dim(x_BHWc, max(-by, 0), x_BHWc.shape[axis] - max(by, 0), axis=axis)
    zero = jnp.zeros_like(jax.lax.slice_in_dim(x_BHWc, 0, 1, axis=axis))
    return jax.lax.concatenate([zero, kept] if by > 0 else [kept, zero], axis)  # jax2onnx pads no symbolic B


class SequencePool(nn.Module):
    """x_BTD -> x_BD: the mean of the tokens with weights softmax over T of a linear layer."""

    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scores_BT1 = linear(x_BTD, Linear(x_BTD.shape[-1:], (1,), name="scores")(), self.dtype)
        weights_BT1 = jax.nn.softmax(scores_BT1.astype(jnp.float32), axis=1).astype(self.dtype)
        return (weights_BT1 * x_BTD).sum(axis=1)


class Attention(nn.Module):
    """Multi-head self-attention with biases; kernels query, key, value [D, G, V] and out [G, V, D].

    With `qk_norm`, a LayerNorm over V of every head's query and key; heads share its scale and bias (Dehghani et al.,
    arXiv 2302.05442, as in timm). cuDNN's fused attention has no dropout after the weights, so training with dropout
    uses XLA's.
    """

    heads: int
    dropout: float
    dtype: Any
    implementation: str = "xla"  # xla | cudnn
    qk_norm: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x_BTD: jax.Array, key_B: jax.Array | None) -> jax.Array:
        b, t, width = x_BTD.shape
        heads = self.heads, width // self.heads
        layers = [Linear((width,), heads, name=name)() for name in ("query", "key", "value")]
        kernel_DO, bias_O = (jnp.concatenate(weights, axis=-1) for weights in zip(*layers, strict=True))
        qkv_BTO = linear(x_BTD, (kernel_DO, bias_O), self.dtype)  # one product instead of three
        query_BTGV, key_BTGV, value_BTGV = (x.reshape(b, t, *heads) for x in jnp.split(qkv_BTO, 3, axis=-1))
        if self.qk_norm:
            query_BTGV = LayerNorm(self.epsilon, dtype=self.dtype, name="query_norm")(query_BTGV)
            key_BTGV = LayerNorm(self.epsilon, dtype=self.dtype, name="key_norm")(key_BTGV)
        if self.implementation == "cudnn" and (key_B is None or self.dropout == 0):
            mixed_BTGV = jax.nn.dot_product_attention(query_BTGV, key_BTGV, value_BTGV, implementation="cudnn")
        else:
            scores_BGTT = jnp.einsum("bqgv,btgv->bgqt", query_BTGV * heads[1] ** -0.5, key_BTGV)
            weights_BGTT = _softmax(scores_BGTT)
            self.sow("intermediates", "weights_BGTT", weights_BGTT, reduce_fn=lambda _, new: new)
            weights_BGTT = dropout(weights_BGTT, key_B, Site.WEIGHTS, self.dropout)
            mixed_BTGV = jnp.einsum("bgqt,btgv->bqgv", weights_BGTT, value_BTGV)
        return linear(mixed_BTGV.reshape(b, t, width), Linear(heads, (width,), name="out")(), self.dtype)


@recomputed
def _softmax(scores_BGTT: jax.Array) -> jax.Array:
    # In float32: bfloat16 has too few bits for a sum of exponentials.
    return jax.nn.softmax(scores_BGTT.astype(jnp.float32)).astype(scores_BGTT.dtype)


class TwoPassLayerNorm(nn.LayerNorm):
    """LayerNorm whose variance is the mean of (x - mean)^2. Flax's default, mean(x^2) - mean^2, cancels in float32: it
    is 6e-3 off where the mean is 100 deviations."""

    use_fast_variance: bool = False


LayerNorm = nn.remat(TwoPassLayerNorm, prevent_cse=False)  # as `recomputed`


class Head(nn.Module):
    """x_BD -> logits_BC: one linear layer, or two with an exact GELU between."""

    classes: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        if self.hidden:
            x_BD = gelu(linear(x_BD, Linear(x_BD.shape[-1:], (self.hidden,), name="hidden")(), self.dtype))
        return linear(x_BD, Linear(x_BD.shape[-1:], (self.classes,), name="logits")(), self.dtype)
