"""The fingerprint finds what changed, and is the same wherever and however it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jvitmoe.config import TrainConfig
from jvitmoe.machine.devices import make_mesh
from jvitmoe.runs import fingerprint
from jvitmoe.training import build
from jvitmoe.training.state import abstract_state

ELEMENTS = np.random.default_rng(0).integers(0, 2**32, 15, np.uint32)
LEAVES = {
    "float32": ELEMENTS.reshape(3, 5).view(np.float32),
    "int32": ELEMENTS.view(np.int32),
    "bfloat16": ELEMENTS.view(np.uint16).view(jnp.bfloat16),
    "int8": ELEMENTS.view(np.int8),
    "scalar": np.array(3, np.int32),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "zeros": np.zeros((4, 3), np.float32),
    "transposed": ELEMENTS.reshape(3, 5).T,
    "parts": np.arange(2 * fingerprint.PART + 3, dtype=np.uint32),
}


def sums(array: np.ndarray) -> tuple[str, str]:
    (text,) = fingerprint.of_host([array]).values()
    digits = text.removeprefix(f"{array.dtype.name}{list(array.shape)} ")
    assert len(digits) == 16
    return digits[:8], digits[8:]


def test_it_is_what_its_formulas_say():
    """The law of the files, in Python's own integers: other programs can check them."""
    first = second = 0
    for i, u in enumerate(ELEMENTS.tolist()):
        mixed = (u + i * 0x9E3779B1) % 2**32
        mixed = (mixed ^ mixed >> 16) * 0x7FEB352D % 2**32
        mixed = (mixed ^ mixed >> 15) * 0x846CA68B % 2**32
        mixed ^= mixed >> 16
        first, second = (first + mixed * (2 * i + 1)) % 2**32, (second + mixed) % 2**32
    assert sums(ELEMENTS) == (f"{first:08x}", f"{second:08x}")


@pytest.mark.parametrize("name", ["float32", "int32", "bfloat16", "int8", "scalar", "zeros", "transposed"])
def test_both_sums_find_every_flipped_bit_of_every_element(name):
    sound = np.ascontiguousarray(LEAVES[name])
    expected = sums(sound)
    for position in range(8 * sound.nbytes):
        damaged = sound.copy()
        damaged.reshape(-1).view(np.uint8)[position // 8] ^= 1 << position % 8
        assert all(a != b for a, b in zip(sums(damaged), expected, strict=True)), position


def test_both_sums_find_any_other_value_of_an_element():
    random = np.random.default_rng(1)
    expected, places, values = sums(ELEMENTS), random.integers(0, 15, 300), random.integers(0, 2**32, 300, np.uint32)
    for place, value in zip(places, values, strict=True):
        damaged = ELEMENTS.copy()
        damaged[place] = value
        assert all(a != b for a, b in zip(sums(damaged), expected, strict=True))


@pytest.mark.parametrize("bit", [31, 30, 0])
def test_each_sum_finds_one_bit_that_flips_in_an_even_number_of_elements(bit):
    """Such as signs: twice 2^31 is 0."""
    random, array = np.random.default_rng(4), np.ones(2**12, np.float32)
    array[1::2] = random.standard_normal(2**11)
    expected = sums(array)
    for count in [2, 2, 2, 2, 4, 64, 2**12] * 10:
        damaged = array.copy()
        damaged.view(np.uint32)[random.choice(len(array), count, replace=False)] ^= np.uint32(1 << bit)
        assert all(a != b for a, b in zip(sums(damaged), expected, strict=True)), count


@pytest.mark.parametrize("distance", [1, 4, 64])
def test_two_changed_elements_escape_by_the_chance_that_the_docstring_says(distance):
    """Of sums of 8 bits, 2^-15 and not 2^-63: the lowest bits of a sum depend on the lowest bits of its terms only."""
    pairs, random = 2**20, np.random.default_rng(5)
    index = random.integers(0, 2**20, pairs, np.uint32)
    change = np.zeros((2, pairs), np.uint32)
    for place in (index, index + np.uint32(distance)):
        before, after = random.integers(0, 2**32, (2, pairs), np.uint32)
        change += np.array(fingerprint._terms(after, place)) - np.array(fingerprint._terms(before, place))
    expected = pairs * distance / 2**15
    assert abs((change % 256 == 0).all(0).sum() - expected) < 5 * expected**0.5


@pytest.mark.parametrize("values", ["random", "opposite", "small"])
def test_two_elements_that_change_places_and_blocks_that_become_zero_are_found(values):
    random = np.random.default_rng(2)
    array = random.standard_normal(2**16).astype(np.float32) if values == "random" else np.ones(2**16, np.float32)
    if values == "opposite":  # differ in one bit, the highest
        array[::3] = -1
    if values == "small":
        array = random.integers(0, 3, 2**16).astype(np.int32)
    expected = sums(array)
    for distance in [*2 ** np.arange(16), *random.integers(1, 2**16, 100)]:
        start = random.integers(0, 2**16 - distance)
        damaged = array.copy()
        damaged[[start, start + distance]] = array[[start + distance, start]]
        assert (sums(damaged) == expected) == (array[start] == array[start + distance])
        damaged = array.copy()
        damaged[start : start + distance] = 0
        assert (sums(damaged) == expected) == (not array[start : start + distance].any())


def test_the_devices_and_the_host_agree_on_every_type_however_an_array_is_split():
    expected = fingerprint.of_host(LEAVES)
    for count, axis in ((1, None), (2, 0), (3, 1), (4, 0), (5, 1)):
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])

        def place(x, mesh=mesh, axis=axis, count=count):
            splits = axis is not None and x.ndim > axis and x.size and x.shape[axis] % count == 0
            spec = PartitionSpec(*[None] * axis, "data") if splits else PartitionSpec()
            return jax.device_put(x, NamedSharding(mesh, spec))

        assert fingerprint.of_devices(jax.tree.map(place, LEAVES)) == (expected, [])


def test_a_training_state_has_one_fingerprint_on_any_devices_and_no_device_gathers_an_array(tiny_config):
    random = np.random.default_rng(3)
    expected, values, size = {}, {}, dict(model={"hidden": 1024}, routing={"experts": 2})
    for count, shard in ((1, "none"), (2, "optimizer"), (4, "parameters")):
        config = tiny_config(train={"devices": count, "shard": shard}, **size)
        mesh = make_mesh(config.train)
        abstract = abstract_state(build.plan_for(config, mesh, config.train.batch_size)).params.experts["mlp"]
        values = values or jax.tree.map(lambda x: random.standard_normal(x.shape, np.float32), abstract)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), values, abstract)
        expected = expected or fingerprint.of_host(values)
        assert fingerprint.of_devices(placed) == (expected, [])
    leaves = jax.tree.leaves(placed)
    assert any(not leaf.is_fully_replicated for leaf in leaves)
    program = fingerprint._program(mesh, tuple(leaf.sharding.spec for leaf in leaves))
    needed = program.lower(leaves).compile().memory_analysis().temp_size_in_bytes
    assert needed < max(leaf.nbytes for leaf in leaves) / 4


SPLITS = {  # of an array on 2 x 2 devices -> which device holds a copy of the same part
    (): None,  # all do
    ("data",): [1, 0, 3, 2],
    (None, "expert"): [2, 3, 0, 1],
    ("expert", "data"): [],
    (("data", "expert"),): [],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("changed", [0, 3])
def test_a_copy_that_changes_in_one_device_is_found_and_the_device_is_named(split, changed):
    mesh = make_mesh(TrainConfig(devices=4, expert_devices=2))
    value = np.random.default_rng(6).standard_normal((4, 6), np.float32)
    array = jax.device_put(value, NamedSharding(mesh, PartitionSpec(*split)))
    parts = [shard.data for shard in array.addressable_shards]
    parts[changed] = parts[changed].at[0, 0].multiply(-1)
    wrong = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
    found, faults = fingerprint.of_devices({"sound": array, "wrong": wrong})
    expected = fingerprint.of_host({"sound": value, "wrong": value})
    assert found["sound"] == expected["sound"]
    if SPLITS[split] == []:  # no other copy, and then the fingerprint is that of what the devices hold
        assert (faults, found["wrong"] == expected["wrong"]) == ([], False)
        return
    pair = (changed, 0 if changed else 1)  # of four copies, that which differs comes first
    if SPLITS[split]:
        pair = max(changed, SPLITS[split][changed]), min(changed, SPLITS[split][changed])
    where = [f"on device {device} of process 0" for device in pair]
    assert faults == [f"wrong {where[0]} is not equal to that {where[1]}"]
