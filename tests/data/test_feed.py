import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe.config import TrainConfig
from jvitmoe.data.batches import TrainOrder, eval_batches, on_devices
from jvitmoe.errors import ConfigError
from jvitmoe.runtime.devices import make_mesh


def mesh_of(devices):
    return make_mesh(TrainConfig(devices=devices))


def order(count=26, batch_size=8, devices=1, seed=0):
    return TrainOrder(count, batch_size, jax.random.key(seed), mesh_of(devices))


def test_an_epoch_shows_no_image_twice_and_leaves_out_less_than_a_batch():
    one = order()
    assert one.steps_per_epoch == 3
    for epoch in range(5):
        index_SB = np.asarray(one.epoch(epoch))
        assert index_SB.shape == (3, 8)
        assert index_SB.dtype == np.int32
        assert len(set(index_SB.ravel().tolist()) & set(range(26))) == 24


def test_an_epoch_that_batches_fill_is_a_permutation():
    index_SB = np.asarray(order(count=24).epoch(0))
    np.testing.assert_array_equal(np.sort(index_SB.ravel()), np.arange(24))
    assert (index_SB.ravel() != np.arange(24)).any()


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


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 8])
def test_evaluation_visits_every_image_exactly_once(devices, batch_size):
    for count in (1, 7, 8, 9, 16, 26):
        batches = eval_batches(count, batch_size, mesh_of(devices))
        index_SB, mask_SB = np.asarray(batches.index_SB), np.asarray(batches.mask_SB)
        np.testing.assert_array_equal(np.sort(index_SB[mask_SB]), np.arange(count))
        assert ((index_SB >= 0) & (index_SB < count)).all()  # padding can be gathered too
        assert index_SB.shape == mask_SB.shape
        assert index_SB.shape[1] % devices == 0
        assert batch_size <= index_SB.shape[1] < batch_size + devices
        assert mask_SB.any(1).all()  # no batch is padding alone
        assert index_SB.dtype == np.int32
        assert mask_SB.dtype == np.bool_


def test_a_split_lies_whole_on_every_device(tiny_split):
    images = on_devices(tiny_split, mesh_of(4))
    assert len(images.pixels_NP.addressable_shards) == 4
    assert images.pixels_NP.dtype == jnp.uint8
    for shard in images.pixels_NP.addressable_shards:
        np.testing.assert_array_equal(shard.data, tiny_split.images_NHWc.reshape(26, -1))
    np.testing.assert_array_equal(images.rows(np.arange(26))[0], tiny_split.images_NHWc)
    for shard in images.labels_N.addressable_shards:
        np.testing.assert_array_equal(shard.data, tiny_split.labels_N)
