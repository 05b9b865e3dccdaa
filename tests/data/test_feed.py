import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe.config import TrainConfig
from jvitmoe.data.batches import Resident, TrainOrder, fitting, on_devices
from jvitmoe.errors import ConfigError
from jvitmoe.machine.devices import make_mesh


def mesh_of(devices):
    return make_mesh(TrainConfig(devices=devices))


def order(count=26, batch_size=8, devices=1, seed=0):
    return TrainOrder(count, batch_size, seed, mesh_of(devices))


def test_an_epoch_shows_no_image_twice_and_leaves_out_less_than_a_batch():
    one = order()
    assert one.steps_per_epoch == 3
    for epoch in range(5):
        index_SB = np.asarray(one.epoch(epoch))
        assert index_SB.shape == (3, 8)
        assert index_SB.dtype == np.int32
        assert len(set(index_SB.ravel().tolist()) & set(range(26))) == 24


@pytest.mark.parametrize("count", [1, 200, 239, 240, 451, 600, 1919, 1920, 10**6])
def test_a_batch_that_is_chosen_gives_30_steps_and_no_larger_one_does(count):
    size = fitting(count)
    assert size in {8, 16, 32, 64, 128, 256}
    assert size == 8 or count // size >= 30
    assert size == 256 or count // (2 * size) < 30
    for unit in (1, 3, 4, 32, 1000):  # devices x experts
        assert fitting(count, unit) % unit == 0
        assert fitting(count, unit) == max(size, unit) or 256 % unit


def test_what_one_epoch_leaves_out_another_shows():
    one = order()
    assert {i for epoch in range(8) for i in np.asarray(one.epoch(epoch)).ravel().tolist()} == set(range(26))


def test_epochs_and_seeds_differ():
    epochs = [np.asarray(order(seed=seed).epoch(epoch)).tobytes() for seed in (0, 1) for epoch in range(4)]
    assert len(set(epochs)) == 8


def test_an_epoch_is_a_function_of_seed_and_number_only():
    one, other = order(), order()
    one.epoch(0)
    np.testing.assert_array_equal(one.epoch(3), other.epoch(3))
    np.testing.assert_array_equal(one.epoch(0), other.epoch(0))


@pytest.mark.parametrize("devices", [2, 4])
def test_the_order_is_the_same_on_any_number_of_devices_and_whole_on_each(devices):
    index_SB = order(devices=devices).epoch(1)
    np.testing.assert_array_equal(index_SB, order().epoch(1))
    assert {shard.data.shape for shard in index_SB.addressable_shards} == {(3, 8)}
    assert len(index_SB.addressable_shards) == devices


@pytest.mark.parametrize(
    ("batch_size", "devices", "rule"),
    [(9, 2, "it must be a multiple of the 2 devices;"), (28, 4, "it must be at most the 26 training images")],
)
def test_a_batch_that_does_not_fit_is_an_error_that_names_value_and_rule(batch_size, devices, rule):
    with pytest.raises(ConfigError) as error:
        order(batch_size=batch_size, devices=devices)
    message = str(error.value)
    assert f"config.train.batch_size is {batch_size}; {rule}" in message
    assert "\n" not in message


@pytest.mark.parametrize(("devices", "expert_devices", "slots"), [(1, 1, 1), (4, 1, 2), (4, 2, 2), (2, 1, 4)])
def test_rows_lie_by_data_device_then_by_the_expert_that_they_meet(devices, expert_devices, slots):
    """Image n of the global batch is in slot n modulo the slots, and devices have consecutive images."""
    mesh = make_mesh(TrainConfig(devices=devices, expert_devices=expert_devices))

    def slot_of_expert(step):
        return (jnp.arange(slots) + step) % slots

    one = TrainOrder(50, 16, 0, mesh, slots, slot_of_expert=slot_of_expert)
    for epoch in (0, 2):
        rows, order_SB = one.rows_on_host(epoch), np.asarray(one.epoch(epoch))
        chex.assert_trees_all_equal(jax.device_get(one.rows(epoch)), rows)
        np.testing.assert_array_equal(np.take_along_axis(order_SB, rows.index_SB, 1), rows.row_SB)
        for s, index_B in enumerate(rows.index_SB):
            parts = index_B.reshape(devices // expert_devices, slots, -1)
            for data, index_EN in enumerate(parts):
                share = 16 // len(parts)
                for e, index_N in enumerate(index_EN):
                    slot = (e + epoch * 3 + s) % slots
                    wanted = [n for n in range(data * share, (data + 1) * share) if n % slots == slot]
                    np.testing.assert_array_equal(index_N, wanted)


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 8])
def test_evaluation_visits_every_image_exactly_once(tiny_split, devices, batch_size):
    for count in (1, 7, 8, 9, 16, 26):
        split = tiny_split.select(np.arange(count))
        batches = Resident(split, batch_size, mesh_of(devices))
        found = [jax.device_get(batch) for batch in batches]
        assert len(found) == len(batches)
        assert batches.batch_size % devices == 0
        assert batch_size <= batches.batch_size < batch_size + devices
        assert {len(batch.labels_B) for batch in found} == {batches.batch_size}
        assert all((batch.labels_B >= 0).any() for batch in found)  # no batch is padding alone
        pixels_NP, labels_N = (np.concatenate([batch[n] for batch in found]) for n in (0, 1))
        np.testing.assert_array_equal(labels_N[labels_N >= 0], split.labels_N)
        np.testing.assert_array_equal(pixels_NP[labels_N >= 0], split.images_NHWc.reshape(count, -1))


def test_a_split_lies_whole_on_every_device(tiny_split):
    images = on_devices(tiny_split, mesh_of(4))
    assert len(images.pixels_NP.addressable_shards) == 4
    assert images.pixels_NP.dtype == jnp.uint8
    for shard in images.pixels_NP.addressable_shards:
        np.testing.assert_array_equal(shard.data, tiny_split.images_NHWc.reshape(26, -1))
    for shard in images.labels_N.addressable_shards:
        np.testing.assert_array_equal(shard.data, tiny_split.labels_N)
