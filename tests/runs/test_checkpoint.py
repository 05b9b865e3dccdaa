"""Checkpoints restore bit for bit, on any number of devices, and damage is noticed, named and walked around."""

import contextlib
import functools
import gc
import itertools
import json
import math
import os
import shutil
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jvitmoe import config as config_lib
from jvitmoe import rules
from jvitmoe.config import Config, ModelConfig, RoutingConfig, TrainConfig
from jvitmoe.errors import UserError
from jvitmoe.experts.params import from_dict
from jvitmoe.machine import memory
from jvitmoe.machine.devices import make_mesh
from jvitmoe.runs import checkpoints as checkpoints_lib
from jvitmoe.runs import safe_io
from jvitmoe.runs.checkpoint_writer import CheckpointWriter
from jvitmoe.runs.checkpoints import CheckpointError, Checkpoints, list_steps
from jvitmoe.training import build
from jvitmoe.training.state import OptState, TrainState, abstract_state, make_state


def make_config(devices: int = 1, shard: str = "none") -> Config:
    # Hidden layers wide enough for a file that is changed to be one of values.
    model = ModelConfig(width=8, hidden=1024, depth=2, heads=2)
    train = TrainConfig(devices=devices, batch_size=24, seed=3, shard=shard)
    return rules.check(Config(model=model, routing=RoutingConfig(experts=2), train=train))


@functools.cache
def make(devices: int = 1, shard: str = "none"):
    config = make_config(devices, shard)
    plan = build.plan_for(config, make_mesh(config.train), config.train.batch_size)
    return make_state(plan), abstract_state(plan)


@contextlib.contextmanager
def opened(folder, keep=10):
    checkpoints = CheckpointWriter(folder, keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def restore(folder, abstract):
    with opened(folder) as checkpoints:
        return checkpoints.restore(abstract)


def at(state: TrainState, number: int) -> TrainState:
    return state._replace(step=jnp.int32(number), params=jax.tree.map(lambda x: x + number, state.params))


def save_all(folder, state, numbers, nlls=None, keep=10):
    with opened(folder, keep) as checkpoints:
        for number, nll in zip(numbers, nlls or [None] * len(numbers), strict=True):
            checkpoints.save(at(state, number), make_config(), nll)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints 1 and 2, for tests that only read them."""
    folder = tmp_path_factory.mktemp("two") / "c"
    save_all(folder, make()[0], [1, 2])
    return folder


@pytest.fixture
def copy(two, tmp_path):
    return shutil.copytree(two, tmp_path / "c")


def test_a_reader_waits_for_no_other_process_and_reads_no_moments(two, monkeypatch):
    state, _ = make()
    for name in ("broadcast_one_to_all", "process_allgather", "sync_global_devices"):
        monkeypatch.setattr(multihost_utils, name, lambda *_: pytest.fail("it waits for other processes"))
    read, places = checkpoints_lib._read, []
    monkeypatch.setattr(checkpoints_lib, "_read", lambda folder, *how: places.append(folder.name) or read(folder, *how))
    found = Checkpoints(two).read("latest")
    assert (found.step, found.meta["step"], found.ema, places) == (2, 2, None, ["params"])
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(found.params))
    chex.assert_trees_all_equal(from_dict(found.params), jax.device_get(at(state, 2).params))
    assert Checkpoints(two).check(2)["step"] == 2


def test_a_device_without_memory_is_no_damage(two, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(ocp.Checkpointer, "restore", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        Checkpoints(two).restore(make()[1])


def passed_over(folder, says=""):
    """Checks that all ways to read name checkpoint 2 and use another."""
    for read in (Checkpoints(folder).read, lambda which: Checkpoints(folder).restore(make()[1])[1]):
        with pytest.warns(RuntimeWarning, match=f"^checkpoint 2 skipped: .*{says}.*$"):
            read("latest")


PLACES = "meta/metadata", "_CHECKPOINT_METADATA", "params/_METADATA", "params/trunk.norm.scale/.zarray"


@pytest.mark.parametrize("place", PLACES)
def test_a_pipe_or_a_link_in_a_checkpoint_is_damage_and_nobody_reads_it(copy, place):
    for make_other in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path = copy / "2" / place
        path.unlink()
        make_other(path)
        passed_over(copy, f"{path.name} is no regular file")


@pytest.mark.parametrize("place", [*PLACES, "params/trunk.norm.scale/0", "opt_state/*norm.scale/0"])
def test_a_file_of_a_tebibyte_is_damage_and_nobody_reads_it(copy, place):
    """It takes no room on the disk: all of it is a hole."""
    os.truncate(next((copy / "2").glob(place)), 2**40)
    passed_over(copy, "1,099,511,627,776 bytes")


def edit_array(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_meta(checkpoint, **fields):
    """Edits it with a checksum that fits."""
    path = checkpoint / "meta" / "metadata"
    meta = json.loads(path.read_text()) | fields
    del meta["checksum"]
    path.write_text(json.dumps(meta | {"checksum": safe_io.checksum(meta)}))


def test_a_file_larger_than_the_memory_is_damage_also_where_all_claims_agree(copy):
    size = 2 * memory.installed()
    os.truncate(copy / "2" / "params/trunk.norm.scale/0", size)
    edit_array(copy / "2" / "params/trunk.norm.scale/.zarray", shape=[size // 4], chunks=[size // 4])
    fingerprints = json.loads((copy / "2/meta/metadata").read_text())["fingerprints"]
    fingerprints |= {"params.trunk.norm.scale": f"float32[{size // 4}] 0"}
    edit_meta(copy / "2", bytes=2 * size, fingerprints=fingerprints)
    passed_over(copy, f"more than {size // 2:,}")


@pytest.mark.parametrize("field", ["shape", "chunks"])
def test_an_array_that_claims_more_than_its_files_hold_is_damage_and_no_abort(copy, field):
    edit_array(copy / "2" / "params/trunk.norm.scale/.zarray", **{field: [10**10]})
    passed_over(copy, "its arrays claim 40,000")


@pytest.mark.parametrize(
    ("leaf", "fields"),
    [
        *(("trunk.norm.scale", {"dtype": dtype}) for dtype in ("<i4", ">f4", "<f2")),
        ("experts.mlp.up", {"shape": [2, 2, 1024, 8], "chunks": [2, 2, 1024, 8]}),  # of [2, 2, 8, 1024]
        ("experts.mlp.up", {"order": "F"}),
    ],
)
def test_an_array_of_another_dtype_or_shape_is_damage_also_where_its_bytes_are_the_same(copy, leaf, fields):
    edit_array(copy / "2" / "params" / leaf / ".zarray", **fields)
    with pytest.raises(CheckpointError):
        Checkpoints(copy).check(2)
    passed_over(copy)


OTHERS = [("nll", "x"), ("bytes", None), ("bytes", "x"), ("config", None), ("config", {"model": {"width": "8"}})]
OTHERS += itertools.product(("versions", "files", "fingerprints"), (None, [1], {"a": 1}))


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_a_meta_with_other_types_is_damage_even_where_its_checksum_fits(copy, name, value):
    edit_meta(copy / "2", **{name: value})
    with pytest.warns(RuntimeWarning, match="checkpoint 2 skipped"):
        assert Checkpoints(copy).read("latest").step == 1
    with pytest.raises(CheckpointError):
        Checkpoints(copy).read("best")


def test_a_save_that_a_lost_process_ends_is_told_from_a_full_disk(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("cannot wait for all") from cause

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    cause = jax.errors.JaxRuntimeError("UNAVAILABLE: process 1 is lost")
    with pytest.raises(jax.errors.JaxRuntimeError, match="process 1 is lost"):
        save_all(tmp_path / "c", make()[0], [1])
    cause = None
    with pytest.raises(CheckpointError, match=r"1 cannot be written to .*; make room"):
        save_all(tmp_path / "c", make()[0], [1])


def change_a_copy(params, device):
    """Changes one value of an array in one device only, as failing memory does."""
    array = params.trunk["head"]["logits"]["bias"]
    copies = [shard.data for shard in array.addressable_shards]
    copies[device] = copies[device].at[0].add(1e-6)
    params.trunk["head"]["logits"]["bias"] = jax.make_array_from_single_device_arrays(
        array.shape, array.sharding, copies
    )


def test_a_copy_that_changes_in_one_of_several_devices_is_not_saved_and_after_a_restore_is_damage(
    tmp_path, monkeypatch
):
    state, abstract = make(2)
    where = "params.trunk.head.logits.bias on device 1 of process 0 is not equal to that on device 0 of process 0"
    with opened(tmp_path / "c") as checkpoints:
        for number in (1, 2):
            checkpoints.save(at(state, number), make_config(2), None)
        changed = at(state, 3)
        change_a_copy(changed.params, 1)
        with pytest.raises(CheckpointError, match=rf"^{where} at step 3 \(1 of \d+ arrays differ\)"):
            checkpoints.save(changed, make_config(2), None)
    assert list_steps(tmp_path / "c") == [1, 2]

    def read(folder, *how):
        tree = as_before(folder, *how)
        if folder.parts[-2:] == ("2", "params"):
            change_a_copy(tree, 1)
        return tree

    as_before = checkpoints_lib._read
    monkeypatch.setattr(checkpoints_lib, "_read", read)
    with pytest.warns(RuntimeWarning, match=f"checkpoint 2 skipped: {where}"):
        assert Checkpoints(tmp_path / "c").restore(abstract)[1]["step"] == 1


def test_what_is_restored_is_what_was_saved_bit_for_bit_also_by_orbax_itself(two):
    """The folders are Orbax's own checkpoints: programs that know nothing of jvitmoe read them."""
    state, abstract = make()
    restored, meta = Checkpoints(two).restore(abstract)
    chex.assert_trees_all_equal(restored, at(state, 2))
    assert meta["step"] == 2
    assert meta["config"]["train"]["seed"] == 3
    assert {"jax", "flax", "orbax-checkpoint"} <= meta["versions"].keys()
    with ocp.PyTreeCheckpointer() as reader:
        how = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), state.params._asdict())
        params = reader.restore(two / "1" / "params", restore_args=how)
    chex.assert_trees_all_equal(from_dict(params), jax.device_get(at(state, 1).params))


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
@pytest.mark.parametrize(
    ("saved_on", "read_on"), [((4, "parameters"), (2, "optimizer")), ((1, "none"), (4, "parameters"))]
)
def test_any_number_of_devices_reads_any_checkpoint(tmp_path, saved_on, read_on):
    state, _ = make(*saved_on)
    save_all(tmp_path / "c", state, [1])
    _, abstract = make(*read_on)
    restored, _ = restore(tmp_path / "c", abstract)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(at(state, 1)))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)


def test_the_best_is_kept_besides_the_newest_also_across_starts(tmp_path):
    (state, abstract), keep = make(), 2
    nlls = [math.nan, 0.1, 0.4, 0.3, None]  # one that is not finite is never the best
    save_all(tmp_path / "c", state, [1, 2, 3], nlls[:3], keep)
    with opened(tmp_path / "c", keep) as checkpoints:
        checkpoints.restore(abstract)
        for number in (4, 5):
            checkpoints.save(at(state, number), make_config(), nlls[number - 1])
    reader = Checkpoints(tmp_path / "c")
    assert reader.steps() == [2, 4, 5]
    assert os.listdir(tmp_path) == ["c"]
    assert sorted(os.listdir(tmp_path / "c")) == sorted(map(str, reader.steps()))
    assert [reader.read(which).step for which in ("best", "latest", "2")] == [2, 5, 2]


def test_no_older_checkpoint_goes_before_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    state, _ = make()
    seen = []
    with opened(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(at(state, 1), make_config(), None)
        checkpoints._finish_write()
        monkeypatch.setattr(os, "fsync", lambda number: seen.append(list_steps(tmp_path / "c")))
        checkpoints.save(at(state, 2), make_config(), None)
    assert seen
    assert all(steps == [1] for steps in seen)
    assert list_steps(tmp_path / "c") == [2]


def test_damaged_checkpoints_count_for_nothing_and_are_moved_aside(tmp_path):
    state, abstract = make()
    save_all(tmp_path / "c", state, [1, 2, 3], [0.2, 0.1, 0.3])
    DAMAGES["flipped"](tmp_path / "c" / "3")  # the newest
    DAMAGES["cut meta"](tmp_path / "c" / "2")  # the best
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [Checkpoints(tmp_path / "c").read(which).step for which in ("latest", "best")] == [1, 1]
    assert sorted({str(w.message)[:22] for w in caught}) == ["checkpoint 2 skipped: ", "checkpoint 3 skipped: "]
    with opened(tmp_path / "c", keep=1) as checkpoints:
        with pytest.warns(RuntimeWarning, match="checkpoint [23] skipped"):
            assert checkpoints.restore(abstract)[1]["step"] == 1
        for number in (2, 3):
            checkpoints.save(at(state, number), make_config(), 0.5)
    assert Checkpoints(tmp_path / "c").steps() == [1, 3]  # 1 is the best, 3 the newest
    restored, meta = restore(tmp_path / "c", abstract)
    assert meta["step"] == 3
    chex.assert_trees_all_equal(restored, at(state, 3))
    assert len(list(tmp_path.glob("damaged-checkpoint-[23]-*"))) == 2


def largest(folder):
    """Returns the largest file of the parameters, which holds values."""
    files = (path for path in (folder / "params").rglob("*") if path.is_file() and not path.name.startswith("."))
    return max(files, key=lambda path: path.stat().st_size)


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_seed(folder):
    path = next(path for path in (folder / "meta").iterdir() if path.is_file() and "seed" in path.read_text())
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))


DAMAGES = {
    "flipped": lambda folder: flip_byte(largest(folder)),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "copied in part": lambda folder: [p.unlink() for p in sorted(p for p in folder.rglob("*") if p.is_file())[::2]],
    "cut data": lambda folder: os.truncate(largest(folder), largest(folder).stat().st_size // 2),
    "cut meta": lambda folder: os.truncate(folder / "meta" / "metadata", 20),
    "no array metadata": lambda folder: next((folder / "params").rglob(".zarray")).unlink(),
    "no item": lambda folder: shutil.rmtree(folder / "opt_state"),
    "edited meta": other_seed,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_and_never_a_fresh_start(
    copy, tmp_path, damage, tally
):
    state, abstract = make()
    DAMAGES[damage](copy / "2")
    shutil.copytree(copy / "2", tmp_path / "alone" / "2")
    with pytest.warns(RuntimeWarning, match="checkpoint 2 skipped: ") as caught:
        restored, meta = restore(copy, abstract)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert meta["step"] == 1
    chex.assert_trees_all_equal(restored, at(state, 1))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[2\]") as caught:
        restore(tmp_path / "alone", abstract)
    assert "\n" not in str(caught.value)
    tally("damaged checkpoints named and passed over", 2)


@pytest.mark.filterwarnings("ignore:coroutine 'ArrayHandler.metadata' was never awaited")  # by Orbax, after an error
def test_a_flipped_bit_anywhere_never_gives_other_values(tmp_path, tally):
    """A small state, because what depends on a file depends on its kind."""
    random, noticed = np.random.default_rng(0), 0
    place = NamedSharding(make_mesh(TrainConfig(devices=1)), PartitionSpec())
    params = {"matrix": random.normal(size=(64, 64)).astype("f"), "vector": random.normal(size=5).astype("f")}
    moments = OptState({"mu": jax.tree.map(np.square, params), "count": np.int32(7)}, None)
    state = jax.device_put(TrainState(np.int32(1), params, moments), place)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state, make_config(), None)
    paths = [p for p in sorted((tmp_path / "c").rglob("*")) if p.is_file() and p.stat().st_size] * 9
    for path in paths:
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[random.integers(len(sound))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            restored, _ = Checkpoints(tmp_path / "c").restore(abstract)
            chex.assert_trees_all_equal(restored, state)
        except CheckpointError:
            noticed += 1
        path.write_bytes(sound)
    gc.collect()  # so that Orbax's warning comes in this test
    assert len(paths) > 100
    assert noticed > 50
    tally("bits flipped in checkpoints without one wrong value", len(paths))
    tally("of these noticed, the others where nothing depends on them", noticed)


def test_a_checkpoint_of_another_version_and_of_another_model_say_so(copy):
    _, abstract = make()
    shutil.rmtree(copy / "2")

    def changed(**leaves):
        return abstract._replace(params=abstract.params._replace(trunk=abstract.params.trunk | leaves))

    for wrong, says in (
        (abstract._replace(ema=abstract.params), "it holds opt_state, params, but the run has ema, opt_state, params"),
        (changed(more=abstract.params.trunk["cls"]), "more"),
        (changed(cls=abstract.params.trunk["head"]["logits"]["bias"]), "shape"),
    ):
        with pytest.raises(CheckpointError, match=says):
            restore(copy, wrong)
    path = copy / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({name: meta[name] for name in meta if name != "fingerprints"}))
    for read in (lambda: restore(copy, abstract), lambda: Checkpoints(copy).read("latest")):
        with pytest.raises(CheckpointError, match="1: ValueError: it was written by another version of jvitmoe; train"):
            read()


def test_a_checkpoint_of_another_run_counts_for_nothing_and_is_named_with_the_setting_that_differs(tmp_path):
    """It is newer, and rated better, than those of the run, of which one has a setting that may change on resuming."""
    (state, abstract), own, other = make(), make_config(), make_config()
    own.train.log_every, other.train.seed = 7, 4
    with opened(tmp_path / "checkpoints") as checkpoints:
        for number, config in enumerate((make_config(), other, own, other), 1):
            checkpoints.save(at(state, number), config, 1 / number)
    (tmp_path / "config.json").write_text(config_lib.dumps(own))
    reader, named = Checkpoints(tmp_path / "checkpoints"), "it is of another run: train.seed is 4, and 3 in config.json"
    for which in ("latest", "best"):
        with pytest.warns(RuntimeWarning, match=f"checkpoint [24] skipped: ValueError: {named}$"):
            assert reader.read(which).step == 3
    with pytest.raises(CheckpointError, match=rf"\(4: ValueError: {named}\); restore"):
        reader.read("4")
    assert reader.check(4)["step"] == 4  # it is sound
    with opened(tmp_path / "checkpoints") as checkpoints:
        with pytest.warns(RuntimeWarning, match=f"checkpoint [24] skipped: ValueError: {named}$"):
            restored, meta = checkpoints.restore(abstract)
        assert meta["step"] == 3
        chex.assert_trees_all_equal(restored, at(state, 3))
    assert reader.steps() == [1, 3]
    assert len(list(tmp_path.glob("damaged-checkpoint-[24]-*"))) == 2


def test_foreign_folders_cost_no_checkpoint(tmp_path):
    """Older than all checkpoints, in between, and newer."""
    state, abstract = make()
    save_all(tmp_path / "c", state, [10, 20], nlls=[0.1, 0.2])
    foreign = {"0": "meta/metadata", "15": "params", "60": "default", "70": "meta/metadata"}
    for name, inside in foreign.items():
        (tmp_path / "c" / name / inside).mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert [Checkpoints(tmp_path / "c").read(which).step for which in ("latest", "best")] == [20, 10]
        for name in foreign:
            with pytest.raises(CheckpointError):
                Checkpoints(tmp_path / "c").check(int(name))
        with opened(tmp_path / "c", keep=1) as checkpoints:
            assert checkpoints.restore(abstract)[1]["step"] == 20
            checkpoints.save(at(state, 30), make_config(), 0.3)
    assert Checkpoints(tmp_path / "c").steps() == [10, 30]
    for name, inside in foreign.items():  # none is ever deleted
        assert len(list(tmp_path.glob(f"damaged-checkpoint-{name}-*/{inside}"))) == 1


@pytest.mark.parametrize("cause", [None, jax.errors.JaxRuntimeError("INTERNAL: a device has failed")])
def test_nothing_of_a_save_that_fails_is_left_in_the_folder(tmp_path, monkeypatch, cause):
    """Also where a device has failed, and where a thread of the write goes on for a moment."""

    def fail(*_, **__):
        raise ValueError("the write has failed") from cause

    save_all(tmp_path / "c", make()[0], [1])
    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with opened(tmp_path / "c") as checkpoints:
        with pytest.raises((CheckpointError, jax.errors.JaxRuntimeError)):
            checkpoints.save(at(make()[0], 2), make_config(), None)
        (tmp_path / "c" / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert os.listdir(tmp_path / "c") == ["1"]


@pytest.mark.parametrize("name", ["deleted", "10", "3.orbax-checkpoint-tmp"])
def test_a_link_among_the_checkpoints_is_refused_and_what_it_leads_to_is_left(tmp_path, name):
    for folder in (tmp_path / "c", tmp_path / "outside"):
        folder.mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    (tmp_path / "c" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"^{tmp_path / 'c' / name} is a link"):
        CheckpointWriter(tmp_path / "c", 1)
    assert (tmp_path / "outside" / "file").read_text() == "mine"


def test_only_a_step_number_as_it_is_written_names_a_checkpoint(tmp_path):
    save_all(tmp_path / "c", make()[0], [5])
    for name in ("²", "٣", "007", "-1", "1e3", "1_0", "99999999999", "4.part2", "x", "9" * 200):
        (tmp_path / "c" / name).mkdir()
    assert list_steps(tmp_path / "c") == [5]
    for name in ("²", "٣", "007"):
        with pytest.raises(CheckpointError, match="does not exist"):
            Checkpoints(tmp_path / "c").read(name)
    assert restore(tmp_path / "c", make()[1])[1]["step"] == 5


@pytest.mark.parametrize(("which", "late"), [("latest", "_meta"), ("best", "_meta"), ("best", "_read_to_host")])
def test_a_reader_chooses_again_where_the_trainer_deletes_what_it_chose(tmp_path, monkeypatch, which, late):
    state, _ = make()
    reader, count = Checkpoints(tmp_path / "c"), itertools.count()
    with opened(tmp_path / "c", keep=1) as trainer:
        trainer.save(at(state, 1), make_config(), 0.5)
        trainer._finish_write()
        read = getattr(reader, late)

        def read_late(*arguments):
            if next(count) == 0:
                trainer.save(at(state, 2), make_config(), 0.4)
                trainer._finish_write()  # deletes checkpoint 1
                assert trainer.steps() == [2]
            return read(*arguments)

        monkeypatch.setattr(reader, late, read_late)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saved = reader.read(which)
    assert saved.step == saved.meta["step"] == 2
    chex.assert_trees_all_equal(from_dict(saved.params), jax.device_get(at(state, 2).params))


def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
@pytest.mark.long
def test_memory_does_not_grow_with_each_checkpoint(tmp_path):
    state, _ = make()
    with opened(tmp_path / "c", keep=1) as checkpoints:
        for number in range(80):
            if number == 20:
                before = megabytes()
            checkpoints.save(state._replace(step=jnp.int32(number)), make_config(), None)
    assert megabytes() - before < 10


def test_what_is_not_there_is_refused(two, tmp_path):
    assert restore(tmp_path / "c", make()[1]) is None
    for folder, which in ((tmp_path / "c", "latest"), (two, "7"), (two, "best")):
        with pytest.raises(CheckpointError, match=r"no checkpoint|'7' does not exist|no best checkpoint"):
            Checkpoints(folder).read(which)
