"""The fingerprint of an array, by which damage of a checkpoint is found: two sums of 32 bits.

For elements of bits u_i (as uint32; shorter types are widened) at the flat index i of the global array, modulo 2^32:

    m_i    = mix(u_i + i · 0x9E3779B1)      mix: products with odd numbers, and x ^ (x >> n)
    first  = sum of m_i · (2i + 1)
    second = sum of m_i

Each of them finds every single changed element: `mix` is a bijection, and an odd factor has an inverse. Other damage,
such as a block of zeros, elements exchanged or signs flipped, escapes each by a chance of about 2^-32, and both by
2^-63 (their lowest bits are equal); by 2^-(63-k) if all changed elements lie multiples of 2^k apart, as in a column.
They are sums of integers, so an array has one fingerprint on any number of devices, however it is split, and on the
host.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

PART = 2**18  # elements that NumPy takes at a time: they fit into a cache
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def of_devices(tree: Any) -> list[dict[str, str]]:
    """Returns, for each process, {"blocks.mlp.up": 16 hexadecimal digits, ...} of its copies of arrays on one mesh. All
    processes must call it. No array is gathered."""
    leaves = jax.tree.leaves(tree)
    sums_N2 = np.asarray(_program(leaves[0].sharding.mesh)(leaves))
    return [_texts(tree, sums) for sums in np.reshape(multihost_utils.process_allgather(sums_N2), (-1, *sums_N2.shape))]


def of_host(tree: Any) -> dict[str, str]:
    """Returns {"blocks.mlp.up": 16 hexadecimal digits, ...} of a tree of NumPy arrays."""
    return _texts(tree, np.array([_of_array(leaf) for leaf in jax.tree.leaves(tree)]))


def _texts(tree: Any, sums_N2: np.ndarray) -> dict[str, str]:
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)]
    return {name: f"{first:08x}{second:08x}" for name, (first, second) in zip(names, sums_N2.tolist(), strict=True)}


def _terms(bits: Any, index: Any) -> tuple[Any, Any]:
    """Returns the terms of both sums; arrays of uint32, NumPy's or JAX's. The first is mixed before it is multiplied:
    an odd factor keeps the highest bit, so two signs that flip would leave that sum as it was."""
    mixed = bits + index * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
    mixed ^= mixed >> 16
    return mixed * (2 * index + 1), mixed


def _of_array(array: np.ndarray) -> np.ndarray:
    bits_N, sums = np.ascontiguousarray(array).reshape(-1).view(UINT[array.dtype.itemsize]), np.zeros(2, np.uint32)
    for start in range(0, len(bits_N), PART):
        part = bits_N[start : start + PART].astype(np.uint32)
        index = np.arange(start, start + len(part)).astype(np.uint32)
        sums += np.array([terms.sum(dtype=np.uint32) for terms in _terms(part, index)])
    return sums


@functools.cache
def _program(mesh: Any) -> Any:
    """Returns the function from arrays on a mesh to their sums [N, 2] in each of its devices."""

    def one(array: jax.Array) -> jax.Array:
        bits = array if array.dtype == bool else jax.lax.bitcast_convert_type(array, UINT[array.dtype.itemsize])
        index = jnp.uint32(0)
        for axis in range(array.ndim):
            stride = np.uint32(math.prod(array.shape[axis + 1 :]) % 2**32)
            index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * stride
        # One reduction of both, which reads the array once; XLA for a CPU is slow with two.
        terms, zeros = _terms(bits.astype(jnp.uint32), index), (jnp.uint32(0),) * 2
        return jnp.stack(jax.lax.reduce(terms, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), range(array.ndim)))

    return jax.jit(
        lambda arrays: jnp.stack([one(x) for x in arrays]), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
