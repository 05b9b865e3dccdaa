"""Checkpoints restore bit for bit, on any number of devices, and damage is noticed, named and walked around."""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import threading
import warnings
import zlib
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from jvitmoe import config as config_lib
from jvitmoe.config import Config, ModelConfig, RoutingConfig, TrainConfig
from jvitmoe.experts import build
from jvitmoe.runs.arrays import CheckpointError, checksums, flatten
from jvitmoe.runs.arrays import to_devices as place
from jvitmoe.runs.checkpoint_writer import CheckpointWriter
from jvitmoe.runs.checkpoints import Checkpoints, list_steps
from jvitmoe.runtime import devices
from jvitmoe.runtime.devices import make_mesh
from jvitmoe.training.state import TrainState, abstract_state, make_state


def make_config(devices: int = 1) -> Config:
    # Hidden layers wide enough for leaves that are stored as chunks of their own, not inside an index.
    model = ModelConfig(width=8, hidden=1024, depth=2, heads=2)
    train = TrainConfig(devices=devices, batch_size=24, seed=3)
    return Config(model=model, routing=RoutingConfig(experts=2), train=train).validate()


@functools.cache
def make(devices: int = 1):
    config = make_config(devices)
    model = build.make_model(config, "cpu")
    mesh = make_mesh(config.train)
    return make_state(config, model, mesh), abstract_state(config, model, mesh)


@contextlib.contextmanager
def opened(folder, read_only=False, keep=1):
    if read_only:
        yield Checkpoints(folder)
        return
    checkpoints = CheckpointWriter(folder, keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def test_a_reader_on_its_own_waits_for_no_other_process(tmp_path, monkeypatch):
    state, _ = make()
    save_all(tmp_path, state, [1, 2])
    for name in ("broadcast_one_to_all", "process_allgather", "sync_global_devices"):
        monkeypatch.setattr(multihost_utils, name, lambda *_: pytest.fail("it waits for other processes"))
    found = Checkpoints(tmp_path, shared=False).read("latest")
    assert found.step == 2
    chex.assert_trees_all_equal(found.params, flatten(jax.device_get(at(state, 2).params)))


def test_a_device_without_memory_is_no_damage(tmp_path, monkeypatch):
    state, abstract = make()
    save_all(tmp_path, state, [1, 2])

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(devices, "to_devices", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        restore(tmp_path, abstract)


def restore(folder, abstract):
    with opened(folder) as checkpoints:
        return checkpoints.restore(abstract)


def at(state: TrainState, number: int) -> TrainState:
    return TrainState(jnp.int32(number), jax.tree.map(lambda x: x + number, state.params), state.opt_state)


def save_all(folder, state, numbers, nlls=None, keep=10):
    with opened(folder, keep=keep) as checkpoints:
        for index, number in enumerate(numbers):
            checkpoints.save(at(state, number), make_config(), nlls[index] if nlls else None)


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path):
    state, abstract = make()
    save_all(tmp_path / "c", state, [1, 2])
    restored, meta = restore(tmp_path / "c", abstract)
    chex.assert_trees_all_equal(restored, at(state, 2))
    assert meta["step"] == 2
    assert meta["config"]["train"]["seed"] == 3
    assert {"jax", "flax", "orbax-checkpoint"} <= meta["versions"].keys()


def test_later_changes_to_the_saved_arrays_do_not_reach_the_checkpoint(tmp_path):
    state, abstract = make()
    saved = jax.tree.map(jnp.copy, at(state, 1))
    expected = jax.tree.map(np.array, saved)
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(saved, make_config(), None)
        overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
        jax.block_until_ready(overwrite(saved))
    chex.assert_trees_all_equal(restore(tmp_path / "c", abstract)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("saved_on", "read_on"), [(8, 1), (1, 3), (3, 8)])
def test_any_number_of_devices_reads_any_checkpoint(tmp_path, saved_on, read_on):
    state, _ = make(saved_on)
    save_all(tmp_path / "c", state, [1])
    _, abstract = make(read_on)
    restored, _ = restore(tmp_path / "c", abstract)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(at(state, 1)))
    assert all(len(leaf.devices()) == read_on for leaf in jax.tree.leaves(restored))


def test_no_checkpoint_at_all_is_none(tmp_path):
    _, abstract = make()
    assert restore(tmp_path / "c", abstract) is None


def test_the_best_is_kept_besides_the_newest(tmp_path):
    state, _ = make()
    save_all(tmp_path / "c", state, [1, 2, 3, 4], nlls=[0.5, 0.1, 0.4, 0.3], keep=1)
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        assert (checkpoints.find("best"), checkpoints.find("latest"), checkpoints.find("2")) == (2, 4, 2)


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path):
    state, _ = make()
    save_all(tmp_path / "c", state, [1, 2, 3], nlls=[math.nan, 0.4, 0.5], keep=1)
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.find("best") == 2


def test_a_checkpoint_that_cannot_be_read_back_costs_no_older_one(tmp_path):
    state, _ = make()
    with opened(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(at(state, 1), make_config(), 0.5)
        checkpoints.save(at(state, 2), make_config(), 0.6)
        checkpoints._manager.wait_until_finished()
        flip_byte(tmp_path / "c" / "2")  # as a failing disk does
        with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* is not what was written") as caught:
            checkpoints.save(at(state, 3), make_config(), 0.7)
    assert "\n" not in str(caught.value)
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.check(1) is None


def test_what_a_kill_left_undeleted_goes_with_the_next_start_and_no_reader_deletes(tmp_path):
    state, abstract = make()
    save_all(tmp_path / "c", state, [1, 2, 3, 4], nlls=[0.4, 0.1, 0.3, 0.2])
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        checkpoints.restore(abstract)
        assert checkpoints.steps() == [1, 2, 3, 4]
    with opened(tmp_path / "c", keep=1) as checkpoints:
        assert checkpoints.restore(abstract)[1]["step"] == 4
        assert checkpoints.steps() == [2, 4]  # the best and the newest


def test_damaged_checkpoints_count_for_nothing_and_stay(tmp_path):
    state, abstract = make()
    save_all(tmp_path / "c", state, [1, 2, 3], nlls=[0.1, 0.2, 0.3])
    flip_byte(tmp_path / "c" / "1")  # the best
    flip_byte(tmp_path / "c" / "3")  # the newest
    with opened(tmp_path / "c", keep=1) as checkpoints:
        with pytest.warns(RuntimeWarning, match="checkpoint 3 skipped"):
            assert checkpoints.restore(abstract)[1]["step"] == 2
        for number in (4, 5):
            checkpoints.save(at(state, number), make_config(), 0.5)
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3, 5]  # 2 is now the best, 5 the newest; 4 is gone
        with pytest.warns(RuntimeWarning, match="checkpoint [13] skipped"):
            assert checkpoints.find("best") == 2
        assert checkpoints.find("latest") == 5


def data_files(folder):
    """Returns the files of the item that hold values, largest first; without those of metadata."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.parent != folder and not p.name.startswith("."))
    return sorted(files, key=lambda p: -p.stat().st_size)


def flip_byte(folder):
    path = data_files(folder / "params")[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def truncate_data(folder):
    path = data_files(folder / "params")[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_meta(folder):
    os.truncate(folder / "meta" / "metadata", 20)


def lose_array_metadata(folder):
    next((folder / "params").rglob(".zarray")).unlink()


def copy_in_part(folder):
    for path in sorted(path for path in folder.rglob("*") if path.is_file())[::2]:
        path.unlink()


def lose_item(folder):
    shutil.rmtree(folder / "opt_state")


def edit_meta(folder):
    path = next(p for p in (folder / "meta").iterdir() if p.is_file() and "seed" in p.read_text())
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))


DAMAGES = [flip_byte, empty, copy_in_part, truncate_data, truncate_meta, lose_array_metadata, lose_item, edit_meta]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, tally):
    state, abstract = make()
    save_all(tmp_path / "c", state, [1, 2])
    damage(tmp_path / "c" / "2")
    with pytest.warns(RuntimeWarning, match="checkpoint 2 skipped: ") as caught:
        restored, meta = restore(tmp_path / "c", abstract)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert meta["step"] == 1
    chex.assert_trees_all_equal(restored, at(state, 1))
    tally("damaged checkpoints named and passed over", 1)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_run_never_starts_afresh_by_accident(tmp_path, damage, tally):
    state, abstract = make()
    save_all(tmp_path / "c", state, [1])
    damage(tmp_path / "c" / "1")
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match="none of the checkpoints"):
        restore(tmp_path / "c", abstract)
    tally("damaged checkpoints named and passed over", 1)


@pytest.mark.slow
def test_a_flipped_byte_anywhere_never_gives_other_values(tmp_path, tally):
    state, abstract = make()
    save_all(tmp_path / "sound", state, [1, 2])
    expected = {number: jax.device_get(at(state, number)) for number in (1, 2)}
    random = np.random.default_rng(0)
    files = sorted(p for p in (tmp_path / "sound" / "2").rglob("*") if p.is_file() and p.stat().st_size)
    noticed = 0
    for trial, file in enumerate(files):
        folder = tmp_path / f"trial{trial}"
        shutil.copytree(tmp_path / "sound", folder)
        path = folder / file.relative_to(tmp_path / "sound")
        content = bytearray(path.read_bytes())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored, meta = restore(folder, abstract)
        skipped = any("checkpoint 2 skipped" in str(warning.message) for warning in caught)
        assert meta["step"] == (1 if skipped else 2)
        chex.assert_trees_all_equal(jax.device_get(restored), expected[meta["step"]])
        noticed += skipped
    assert noticed > 0
    tally("bits flipped in checkpoints without one wrong value", len(files))
    tally("of these noticed, the others where nothing depends on them", noticed)


def test_a_damaged_step_can_be_saved_again_and_the_damaged_folder_is_kept_aside(tmp_path):
    state, abstract = make()
    save_all(tmp_path / "c", state, [1, 2])
    flip_byte(tmp_path / "c" / "2")
    with opened(tmp_path / "c") as checkpoints:
        with pytest.warns(RuntimeWarning, match="checkpoint 2 skipped"):
            checkpoints.restore(abstract)
        checkpoints.save(at(state, 2), make_config(), None)
    restored, meta = restore(tmp_path / "c", abstract)
    assert meta["step"] == 2
    chex.assert_trees_all_equal(restored, at(state, 2))
    assert len(list(tmp_path.glob("damaged-checkpoint-2-*"))) == 1


def test_parameters_alone_are_verified_too(tmp_path):
    state, abstract = make()
    save_all(tmp_path / "c", state, [1])
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        saved = checkpoints.read("1")
        chex.assert_trees_all_equal(place(saved.params, abstract.params), at(state, 1).params)
        assert (saved.step, saved.meta["step"], saved.ema) == (1, 1, None)
    flip_byte(tmp_path / "c" / "1")
    with (
        opened(tmp_path / "c", read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"checkpoint 1 in .* cannot be read") as caught,
    ):
        checkpoints.read("1")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_does_not_fit(tmp_path):
    state, abstract = make()
    save_all(tmp_path / "c", state, [1])
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        params = checkpoints.read("1").params
    small = {name: array[..., :1] if name == "positions" else array for name, array in params.items()}
    for arrays in (params | {"more": params["positions"]}, small, {}):
        with pytest.raises(CheckpointError, match=r"in the checkpoint and .* in the model"):
            place(arrays, abstract.params)


def test_orbax_itself_restores_what_was_saved(tmp_path):
    """The folders are Orbax's own checkpoints: programs that know nothing of jvitmoe read them."""
    state, _ = make()
    save_all(tmp_path / "c", state, [1])
    with ocp.PyTreeCheckpointer() as reader:
        params = reader.restore(tmp_path / "c" / "1" / "params")
    chex.assert_trees_all_equal(params, jax.device_get(at(state, 1).params))


def orbax_writes(folder, state, number):
    """Writes a checkpoint as version 0.1.0 did."""
    items = jax.device_get({"params": at(state, number).params, "opt_state": state.opt_state})
    meta = {"step": number, "config": config_lib.to_dict(make_config()), "versions": {}, "nll": None, "checksums": {}}
    for name, tree in items.items():
        leaves = {jax.tree_util.keystr(path): np.ascontiguousarray(x) for path, x in jax.tree.leaves_with_path(tree)}
        meta["checksums"][name] = {path: f"{zlib.crc32(x.tobytes()):08x}" for path, x in leaves.items()}
    checksum = f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=True)) as manager:
        manager.save(number, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta | {"checksum": checksum}), **arrays))


def test_checkpoints_of_version_0_1_0_verify_and_restore_and_all_commands_judge_them_alike(tmp_path):
    state, abstract = make()
    for number in (1, 2):
        orbax_writes(tmp_path / "c", state, number)
    with opened(tmp_path / "c", keep=2) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(abstract)[0], at(state, 2))
    (tmp_path / "c" / "2" / "params" / "_METADATA").unlink()  # Orbax's index of the tree, which nothing here needs
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.check(2) is None
        assert checkpoints.restore(abstract)[1]["step"] == 2
    flip_byte(tmp_path / "c" / "2")
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        assert "does not match its checksum" in checkpoints.check(2)
        with pytest.warns(RuntimeWarning, match="checkpoint 2 skipped"):
            assert checkpoints.restore(abstract)[1]["step"] == 1


@pytest.mark.parametrize("name", ["0", "15", "60"])  # older than all checkpoints, in between, newer
@pytest.mark.parametrize("inside", ["default", "params", "meta/metadata"])
def test_a_foreign_folder_costs_no_checkpoint(tmp_path, name, inside):
    state, abstract = make()
    save_all(tmp_path / "c", state, [10, 20], nlls=[0.1, 0.2])
    (tmp_path / "c" / name / inside).mkdir(parents=True)
    with opened(tmp_path / "c", keep=1) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert checkpoints.restore(abstract)[1]["step"] == 20
        assert (checkpoints.find("latest"), checkpoints.find("best")) == (20, 10)
        assert checkpoints.check(int(name))
        checkpoints.save(at(state, 30), make_config(), 0.3)
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.steps() == sorted({10, 30, int(name)})  # a foreign folder is never deleted


def test_only_a_step_number_as_it_is_written_names_a_checkpoint(tmp_path):
    save_all(tmp_path / "c", make()[0], [5])
    for name in ("²", "٣", "007", "-1", "1e3", "1_0", "99999999999", "4.part2", "x", "9" * 200):
        (tmp_path / "c" / name).mkdir()
    assert list_steps(tmp_path / "c") == [5]
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.steps() == [5]
        for name in ("²", "٣", "007"):
            with pytest.raises(CheckpointError, match="does not exist"):
                checkpoints.find(name)


@pytest.mark.parametrize("which", ["latest", "best"])
@pytest.mark.parametrize("reads", [0, 1])  # how many reads of the chosen checkpoint come before its deletion
def test_a_reader_chooses_again_where_the_trainer_deletes_what_it_chose(tmp_path, monkeypatch, which, reads):
    state, abstract = make()
    with opened(tmp_path / "c", keep=1) as trainer, opened(tmp_path / "c", read_only=True) as reader:
        trainer.save(at(state, 1), make_config(), 0.5)
        trainer._finish_write()
        read, count = reader._read, itertools.count()

        def read_late(*arguments):
            if next(count) == reads:
                trainer.save(at(state, 2), make_config(), 0.4)
                trainer._finish_write()  # deletes checkpoint 1
                assert trainer.steps() == [2]
            return read(*arguments)

        monkeypatch.setattr(reader, "_read", read_late)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saved = reader.read(which)
        assert saved.step == saved.meta["step"] == 2
        chex.assert_trees_all_equal(place(saved.params, abstract.params), at(state, 2).params)
        assert next(count) > reads


ARRAYS = {
    "bfloat16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    "scalar": np.array(3, np.int32),
    "empty": np.zeros((0, 3), np.float32),
    "strided": np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-1],
    "transposed": np.arange(6, dtype=np.int8).reshape(2, 3).T,
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_checksum_is_that_of_the_bytes_of_version_0_1_0(name):
    array = np.asarray(ARRAYS[name])
    assert checksums({"": array}) == {"": f"{zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}"}


def turns(work):
    """Returns how often another thread, which waits for 1 ms between two turns, ran during the work."""
    count, done = itertools.count(), threading.Event()

    def take():
        while not done.wait(0.001):
            next(count)

    taking = threading.Thread(target=take)
    taking.start()
    work()
    done.set()
    taking.join()
    return next(count)


def test_other_threads_run_while_a_large_leaf_is_checksummed():
    array = np.ones(2**26, np.float32)
    assert turns(lambda: checksums({"": array})) > 20  # at most 5 if it held the GIL


@pytest.mark.slow
def test_memory_does_not_grow_with_each_checkpoint(tmp_path):
    state, _ = make()

    def megabytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    with opened(tmp_path / "c", keep=1) as checkpoints:
        for number in range(80):
            if number == 20:
                before = megabytes()
            checkpoints.save(state._replace(step=jnp.int32(number)), make_config(), None)
    assert megabytes() - before < 10


def test_what_is_not_there_is_one_clear_line(tmp_path):
    with opened(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.find("latest")
    save_all(tmp_path / "c", make()[0], [5])
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match=r"'7' does not exist; there are latest and \[5\]"):
            checkpoints.find("7")
        with pytest.raises(CheckpointError, match="no best checkpoint without a validation split"):
            checkpoints.find("best")
    save_all(tmp_path / "rated", make()[0], [5], nlls=[1.0])
    with (
        opened(tmp_path / "rated", read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"'7' does not exist; there are latest, best and \[5\]"),
    ):
        checkpoints.find("7")
