"""The fingerprint of an array, by which damage of a checkpoint is found: dtype, shape, and two sums of 32 bits.

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
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PART = 2**18  # elements that NumPy takes at a time: they fit into a cache
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def of_devices(tree: Any) -> tuple[dict[str, str], list[str]]:
    """Returns ({"blocks.mlp.up": "float32[4, 8] 0123456789abcdef", ...}, faults) of arrays on one mesh. A fault is an
    array of which two devices hold unequal copies: "head.bias on device 1 of process 0 is not equal to that on device
    0 of process 0". All processes must call it, and get the same. No array is gathered."""
    leaves = jax.tree.leaves(tree)
    mesh, specs = leaves[0].sharding.mesh, tuple(leaf.sharding.spec for leaf in leaves)
    sums_DN2, found_N2, faults = np.asarray(_program(mesh, specs)(leaves)), [], []
    for n, (name, leaf) in enumerate(zip(kinds(tree), leaves, strict=True)):
        holders = dict[str, list[int]]()  # part of the array -> the devices that hold a copy of it
        for d, part in enumerate(leaf.sharding.devices_indices_map(leaf.shape).values()):
            holders.setdefault(str(part), []).append(d)
        found_N2.append(sum(sums_DN2[copies[0], n] for copies in holders.values()))
        unequal = [text for copies in holders.values() if (text := _unequal(sums_DN2[copies, n], mesh, copies))]
        faults += [f"{name} {text}" for text in unequal[:1]]
    return _texts(tree, np.array(found_N2)), faults


def _unequal(sums_D2: np.ndarray, mesh: Mesh, copies: Sequence[int]) -> str:
    """Returns on which device a copy differs from the first one, or, if most do, the first one from another; "" if all
    copies are equal."""
    wrong_D = (sums_D2 != sums_D2[0]).any(1)
    if not wrong_D.any():
        return ""
    pair = copies[int(wrong_D.argmax())], copies[0]
    one, other = (_where(mesh, d) for d in (pair if 2 * wrong_D.sum() <= len(wrong_D) else pair[::-1]))
    return f"{one} is not equal to that {other}"


def _where(mesh: Mesh, d: int) -> str:
    """Returns the words for a device: its number among those of its process."""
    device = mesh.devices.flat[d]
    own = sorted(other.id for other in mesh.devices.flat if other.process_index == device.process_index)
    return f"on device {own.index(device.id)} of process {device.process_index}"


def of_host(tree: Any) -> dict[str, str]:
    """Returns {"blocks.mlp.up": "float32[4, 8] 0123456789abcdef", ...} of a tree of NumPy arrays."""
    return _texts(tree, np.array([_of_array(leaf) for leaf in jax.tree.leaves(tree)]))


def kinds(tree: Any) -> dict[str, str]:
    """Returns {"blocks.mlp.up": "float32[4, 8]", ...}, with which the fingerprints of these arrays begin."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype.name}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _texts(tree: Any, sums_N2: np.ndarray) -> dict[str, str]:
    sums = zip(kinds(tree).items(), sums_N2.tolist(), strict=True)
    return {name: f"{kind} {first:08x}{second:08x}" for (name, kind), (first, second) in sums}


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
def _program(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    """Returns the function from arrays that are split so to the sums [D, N, 2] that each device has of its parts."""

    def one(part: jax.Array, spec: PartitionSpec) -> jax.Array:
        bits = part if part.dtype == bool else jax.lax.bitcast_convert_type(part, UINT[part.dtype.itemsize])
        index, stride = jnp.uint32(0), 1
        for axis in reversed(range(part.ndim)):
            place = jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis)
            count = part.shape[axis]
            if axis < len(spec) and spec[axis]:
                place += jax.lax.axis_index(spec[axis]).astype(jnp.uint32) * np.uint32(count)
                count *= jax.lax.axis_size(spec[axis])
            index, stride = index + place * np.uint32(stride % 2**32), stride * count
        # One reduction of both, which reads the array once; XLA for a CPU is slow with two.
        terms, zeros = _terms(bits.astype(jnp.uint32), index), (jnp.uint32(0),) * 2
        return jnp.stack(jax.lax.reduce(terms, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), range(part.ndim)))

    def all_parts(parts: list[jax.Array]) -> jax.Array:
        return jnp.stack([one(part, spec) for part, spec in zip(parts, specs, strict=True)])[None]

    # By device, because XLA may take copies for equal, and read only one.
    each = jax.shard_map(
        all_parts, mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec(mesh.axis_names), check_vma=False
    )
    return jax.jit(each, out_shardings=NamedSharding(mesh, PartitionSpec()))
