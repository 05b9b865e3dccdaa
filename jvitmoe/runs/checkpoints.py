"""Checkpoints of a run: Orbax writes them, TensorStore reads them back; the only file that knows either.

`checkpoints/<step>/` holds one folder per item, as Orbax lays it out: Zarr arrays, and `meta/metadata`, which is JSON.
Orbax writes asynchronously and renames a checkpoint when it is complete, so a killed write leaves nothing that counts.
Reads do not go through Orbax: it fixes the kind of all checkpoints by the first folder that it finds, and each of its
reads leaks memory (TensorStore's `Spec.to_json`, 2.9 kB per array). It does not notice a flipped byte either: `meta`
keeps the CRC-32 of each leaf, and every read compares it. No older checkpoint is deleted before the new one has been
read back from the disk.
"""

import contextlib
import json
import os
import re
import shutil
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.errors import UserError, one_line
from jvitmoe.runs.files import checksum as checksum_of_json
from jvitmoe.settings import LARGEST

META = Path("meta", "metadata")
ITEMS = ("params", "opt_state", "ema", "skipped")  # fields of the training state that are saved; the step is the name
DELETED, PART = ".deleted", ".orbax-checkpoint-tmp"  # in the names of folders that are being deleted and written
PACKAGES = ("jvitmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
State = Any  # `training.state.TrainState`, a NamedTuple with `step` and the fields of ITEMS
Arrays = dict[str, np.ndarray]  # dotted path of a leaf ("blocks.mlp.up") -> its value on the host


class CheckpointError(UserError):
    """No checkpoint that was asked for can be read; the message names the folder, the reason and the remedy."""


def versions() -> dict[str, str]:
    """Returns package -> installed version, for everything that shapes a run's numbers."""
    return {name: metadata.version(name) for name in PACKAGES}


def list_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, sound or not, ascending. An entry is a checkpoint if its name
    is a step number as `str` writes it. Raises CheckpointError where the folder cannot be listed."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {one_line(error)}; let it be read") from error
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,9}", name) and int(name) <= LARGEST)


class Saved(NamedTuple):
    """A checkpoint as `Checkpoints.read` returns it, on the host; `ema` is None where none is kept."""

    step: int
    meta: dict[str, Any]
    params: Arrays
    ema: Arrays | None


class Checkpoints:
    """The `checkpoints/` folder of a run: items params, opt_state, ema, skipped (if kept) and meta (JSON).

    Of several processes all must call the same methods, and process 0 alone deletes.

    Args:
        directory: made if absent, unless read_only.
        keep: newest sound checkpoints kept; the sound one of least validation NLL is kept besides.
        read_only: never writes or deletes, so several readers may share a folder.

    Raises CheckpointError where the folder cannot be made or listed.
    """

    def __init__(self, directory: Path, keep: int = 1, read_only: bool = False) -> None:
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._read_only = read_only
        self._writing: int | None = None  # the step that is being written
        self._broken = False  # whether a write has failed and was reported
        self._found: dict[int, dict[str, Any] | str] = {}  # by step: meta of a sound checkpoint, or what is wrong
        try:
            if not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    self._clear()
                self._manager = _make_manager(self.directory)
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be used: {one_line(error)}; let it be read") from error

    def steps(self) -> list[int]:
        """Returns the steps that have a folder, ascending, sound or not; the same in all processes."""
        steps = list_steps(self.directory)
        if jax.process_count() > 1:
            count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
            listed = np.resize(np.array(steps or [0], np.int32), count)
            steps = [int(step) for step in multihost_utils.broadcast_one_to_all(listed)] if count else []
        return steps

    def save(self, state: State, config: Config, nll: float | None, files: Mapping[str, str] | None = None) -> None:
        """Starts writing the state; returns once the arrays are copied, so that they may be donated.

        Waits for the write before, reads it back, and only then deletes what is no longer kept.

        Args:
            state: the whole training state.
            config: the run's config, for commands that have only the folder.
            nll: validation NLL, which the best checkpoint is chosen by; None without a validation split.
            files: name -> checksum of other files of the run folder as they are now.

        Raises CheckpointError when the previous write failed or this one does, and when processes hold different
        replicas.
        """
        self._settle()
        step = int(state.step)
        # True copies: the writer would otherwise read buffers that the next step overwrites.
        # All processes gather whole arrays and process 0 writes them, so the bytes are the same on any mesh.
        items = {name: jax.tree.map(_gather, tree) for name, tree in _items(state).items()}
        found = {name: checksums(_flatten(tree)) for name, tree in items.items()}
        if jax.process_count() > 1:
            _compare_replicas(step, _items(state), found)
        meta = {
            "step": step,
            "config": config_lib.to_dict(config),
            "versions": versions(),
            "nll": nll,
            "files": dict(files or {}),
            "checksums": found,
        }
        self._found.pop(step, None)
        try:
            if jax.process_index() == 0:
                _try_to_write(self.directory)
            self._set_aside(step)
            # Forced, because Orbax saves nothing, without a word, where a later step has a folder.
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    meta=ocp.args.JsonSave(meta | {"checksum": checksum_of_json(meta)}),
                    **{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()},
                ),
                force=True,
            )
        except Exception as error:  # OSError, or what TensorStore makes of one
            raise self._failed(step, error) from error
        self._writing = step

    def restore(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """Returns (state, meta) of the newest checkpoint that verifies, or None where there is no checkpoint at all.

        Warns once for each newer checkpoint that was skipped, with the reason. Raises CheckpointError when there are
        checkpoints and none verifies: a run never starts afresh by accident.

        Args:
            abstract: shapes, dtypes and shardings to restore to, on any number of devices.
        """
        items, steps = _items(abstract), self.steps()
        for step in reversed(steps):
            trees: dict[str, Any] = {}
            try:
                arrays, meta = self._read(step, list(items))
                trees = {name: place(arrays.pop(name, {}), tree) for name, tree in items.items()}
                self._found[step] = meta
            except Exception as error:  # damage raises anything at all
                self._found[step] = one_line(error)
            if (agreed := self._agreed(step)) is not None:
                if not self._read_only and len(steps) > self._keep:
                    self._delete_old()  # a kill may have come between the last save and this
                return abstract._replace(step=_put(np.array(step, np.int32), abstract.step.sharding), **trees), agreed
            self._warn(step)
        if steps:
            raise self._none_sound(steps)
        return None

    def check(self, step: int) -> str | None:
        """Returns what is wrong with a checkpoint, or None: all of it is read, every value against its checksum."""
        if step not in self._found:
            try:
                _, self._found[step] = self._read(step, None)
            except Exception as error:
                self._found[step] = one_line(error)
            self._agreed(step)
        found = self._found[step]
        return found if isinstance(found, str) else None

    def find(self, which: str) -> int:
        """Returns the step of "latest", "best" (least validation NLL) or a number.

        Latest and best are chosen from the sound ones, with a warning for each damaged one that was passed over, and
        chosen again where another process deletes checkpoints meanwhile. Raises CheckpointError.
        """
        while True:
            steps = self.steps()
            if not steps:
                raise CheckpointError(f"{self.directory} holds no checkpoint; train first")
            if which not in ("latest", "best"):
                if which not in map(str, steps):
                    names = "latest" if self._best(steps) is None else "latest, best"
                    raise CheckpointError(f"checkpoint {which!r} does not exist; there are {names} and {steps}")
                return int(which)
            chosen, damaged = None, []
            for step in reversed(steps):
                if self.check(step):
                    damaged.append(step)
                elif which == "latest":
                    chosen = step
                    break
            if which == "best":
                chosen = self._best(steps)
            if gone := set(damaged) - set(self.steps()):
                for step in gone:
                    del self._found[step]
                continue
            for step in damaged:
                self._warn(step)
            if chosen is not None:
                return chosen
            if len(damaged) == len(steps):
                raise self._none_sound(steps)
            raise CheckpointError("there is no best checkpoint without a validation split; set --checkpoint=latest")

    def read(self, which: str) -> Saved:
        """Returns the verified parameters, EMA and meta of the checkpoint that `find` chooses, and chooses again where
        another process deletes it meanwhile. Raises CheckpointError."""
        while True:
            step = self.find(which)
            arrays: dict[str, Arrays] = {}
            try:
                arrays, self._found[step] = self._read(step, ("params", "ema"))
            except Exception as error:
                self._found[step] = one_line(error)
            if (meta := self._agreed(step)) is not None:
                return Saved(step, meta, arrays["params"], arrays.get("ema"))
            wrong, there = self._found.pop(step), self.steps()
            if step in there or which == str(step):
                raise CheckpointError(
                    f"checkpoint {step} in {self.directory} cannot be read: {wrong}; "
                    f"choose another with --checkpoint, there are {there}"
                )

    def close(self) -> None:
        """Waits for the last write, reads it back, and deletes what is no longer kept. Raises CheckpointError when the
        write failed: Orbax reports that only here."""
        if self._read_only:
            return
        try:
            self._settle()
        finally:
            try:
                self._manager.close()
            except Exception:
                if not self._broken:  # Orbax reports one failed write more than once
                    raise

    def _settle(self) -> None:
        step, self._writing = self._writing, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                _flush(self.directory / str(step))
        except Exception as error:
            raise self._failed(step, error) from error
        if wrong := self.check(step):
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is not what was written ({wrong}); the disk may be failing: "
                "older checkpoints were left as they are; set --workdir to another disk, or try again"
            )
        self._delete_old()

    def _delete_old(self) -> None:
        """Deletes the sound checkpoints that are neither the best nor among the newest. Damaged ones are no help to a
        run and may be one to a person: they stay."""
        steps = self.steps()
        sound = [step for step in steps if self.check(step) is None]
        for step in set(sound[: -self._keep]) - {self._best(sound)}:
            del self._found[step]
            if jax.process_index() == 0:
                path = self.directory / str(step)
                try:
                    gone = path.rename(path.with_suffix(DELETED))  # at once, so that a kill leaves no half of it
                    _remove(gone)
                except OSError as error:
                    raise CheckpointError(f"{path} cannot be deleted: {one_line(error)}; let it be written") from error
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("old checkpoints are deleted")

    def _best(self, steps: Sequence[int]) -> int | None:
        """Returns the step of least validation NLL among the sound ones that have one; of equals, the newest."""
        for step in steps:
            self.check(step)
        metas = {step: meta for step in steps if isinstance(meta := self._found[step], dict)}
        rated = [step for step, meta in metas.items() if meta["nll"] is not None]
        return min(rated, key=lambda step: (metas[step]["nll"], -step), default=None)

    def _agreed(self, step: int) -> dict[str, Any] | None:
        """Returns the meta of a checkpoint that every process has found sound, otherwise None."""
        found = self._found[step]
        if jax.process_count() > 1:
            sound_P = multihost_utils.process_allgather(np.array(not isinstance(found, str)))
            if not isinstance(found, str) and not sound_P.all():
                self._found[step] = f"process {int(np.argmin(sound_P))} cannot read it"
        found = self._found[step]
        return None if isinstance(found, str) else found

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        """Returns the error of a write that failed, with its remains cleared away."""
        self._broken = True
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # arrays may still be written there; the next start clears the rest
                self._clear()
        return CheckpointError(
            f"checkpoint {step} cannot be written to {self.directory}: {one_line(error)}; "
            "older ones are as they were; make room or let the folder be written, and start again"
        )

    def _warn(self, step: int) -> None:
        warnings.warn(f"checkpoint {step} skipped: {self._found[step]}", RuntimeWarning, stacklevel=3)

    def _none_sound(self, steps: Sequence[int]) -> CheckpointError:
        return CheckpointError(
            f"none of the checkpoints {list(steps)} in {self.directory} can be read; "
            "restore them from a copy, or move the folder away to start afresh"
        )

    def _clear(self) -> None:
        """Deletes what killed writes and killed deletions have left."""
        for path in self.directory.iterdir():
            if path.suffix == DELETED or PART in path.name:
                _remove(path)

    def _read(self, step: int, names: Iterable[str] | None = None) -> tuple[dict[str, Arrays], dict[str, Any]]:
        """Returns (item -> arrays, meta), verified: of the items named that it has, or of all. Raises anything at all
        where they are damaged. Every judgement of a checkpoint is made here."""
        folder = self.directory / str(step)
        meta = json.loads((folder / META).read_bytes())
        if meta.pop("checksum", None) != checksum_of_json(meta):
            raise ValueError("its meta does not match its checksum")
        if meta["step"] != step:
            raise ValueError(f"it is the checkpoint of step {meta['step']}")
        kept = meta["checksums"]
        return {name: _read_arrays(folder / name, kept[name]) for name in names or kept if name in kept}, meta

    def _set_aside(self, step: int) -> None:
        """Moves away a folder of this step: it was skipped as damaged, and Orbax would not save over it."""
        folder = self.directory / str(step)
        there = folder.exists()
        if jax.process_count() > 1:
            there = bool(multihost_utils.broadcast_one_to_all(np.array(there)))
        if there:
            if jax.process_index() == 0:
                folder.rename(self.directory.parent / f"damaged-checkpoint-{step}-{time.time_ns()}")
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("the damaged folder is away")
            self._manager.reload()


def _items(state: State) -> dict[str, Any]:
    """Returns name -> tree of what a checkpoint holds: everything but the step, which is its name."""
    return {name: tree for name in ITEMS if (tree := getattr(state, name)) is not None}


def place(arrays: Arrays, abstract: Any) -> Any:
    """Returns the arrays as a tree with the structure and shardings of `abstract`. Raises CheckpointError where they
    do not fit it."""
    wanted = {_dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(abstract)}
    for name in wanted.keys() | arrays.keys():
        form, expected = ((x[name].shape, x[name].dtype) if name in x else None for x in (arrays, wanted))
        if form != expected:
            raise CheckpointError(f"{name} is {form} in the checkpoint and {expected} in the model")
    return jax.tree.map_with_path(lambda path, leaf: _put(arrays[_dotted(path)], leaf.sharding), abstract)


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _flatten(tree: Any) -> Arrays:
    return {_dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _make_manager(folder: Path) -> ocp.CheckpointManager:
    """Returns the writer of a folder's checkpoints.

    The arrays are plain Zarr, because Orbax's default, an OCDBT database, leaks more memory at each save.
    """
    handlers: dict[str, Any] = {name: ocp.PyTreeCheckpointHandler(use_ocdbt=False) for name in ITEMS}
    handlers["meta"] = ocp.JsonCheckpointHandler()
    options = ocp.CheckpointManagerOptions(create=False)
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _try_to_write(folder: Path) -> None:
    """Raises OSError where nothing can be made in the folder: Orbax would wait for minutes for what cannot come."""
    path = folder / f"trial{DELETED}"
    path.mkdir(exist_ok=True)
    path.rmdir()


def _read_arrays(folder: Path, expected: Mapping[str, str]) -> Arrays:
    """Returns the arrays of one item. Raises ValueError where one does not match its checksum.

    Args:
        folder: of the item: Zarr arrays, in an OCDBT database up to 0.1.0.
        expected: path of each leaf -> checksum. Paths are dotted; up to 0.1.0 they were as in "[0].mu['bias']".
    """
    wanted = {".".join(filter(None, re.split(r"[\[\]'.]+", path))): checksum for path, checksum in expected.items()}
    base = {"driver": "file", "path": f"{folder}/"}
    store = {"driver": "ocdbt", "base": base} if (folder / "manifest.ocdbt").exists() else base
    context = ts.Context()
    specs = [{"driver": "zarr", "kvstore": store | {"path": f"{store.get('path', '')}{name}/"}} for name in wanted]
    stores = [ts.open(spec, context=context, open=True, read=True) for spec in specs]
    reads = [store.result().read() for store in stores]
    arrays = {name: np.asarray(read.result()) for name, read in zip(wanted, reads, strict=True)}
    found = checksums(arrays)
    if wrong := [name for name in wanted if found[name] != wanted[name]]:
        name = f"{folder.name}.{wrong[0]}"
        raise ValueError(f"{name} does not match its checksum ({len(wrong)} of {len(wanted)} leaves)")
    return arrays


def _flush(folder: Path) -> None:
    """Returns once the disk holds all of the folder, and its name: renaming alone survives no power cut."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _remove(path: Path) -> None:
    """Deletes a folder; of a link the link alone, so that nothing outside a run folder is ever deleted."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def checksums(arrays: Arrays) -> dict[str, str]:
    """Returns name -> CRC-32 of the values. Copies nothing and lets other threads run meanwhile."""
    return {
        name: f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"
        for name, array in arrays.items()
    }


def _compare_replicas(step: int, items: Mapping[str, Any], whole: Mapping[str, Mapping[str, str]]) -> None:
    """Raises CheckpointError, in all processes, where processes that hold the same part of an array differ in it.

    Args:
        step: of the state.
        items: name -> tree, on the devices.
        whole: name -> leaf -> checksum of this process's copy; right for a leaf that every process holds whole.
    """
    leaves = {
        f"{name}.{_dotted(path)}": (leaf, whole[name][_dotted(path)])
        for name, tree in items.items()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    local_N = []
    for leaf, checksum in leaves.values():
        if not leaf.is_fully_replicated:
            shards = {str(shard.index): np.asarray(shard.data) for shard in leaf.addressable_shards}
            checksum = str(sorted(checksums(shards).items()))
        local_N.append(zlib.crc32(checksum.encode()))
    local_PN = multihost_utils.process_allgather(np.array(local_N, np.uint32))
    wrong = []
    for (name, (leaf, _)), local_P in zip(leaves.items(), local_PN.T, strict=True):
        parts: dict[int, set[str]] = {}  # by process: which parts of the array it holds
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            parts.setdefault(device.process_index, set()).add(str(index))
        for part in {frozenset(indices) for indices in parts.values()}:
            holders = sorted(process for process in parts if parts[process] == part)
            common = Counter(local_P[holders].tolist()).most_common(1)[0][0]
            right = next(process for process in holders if local_P[process] == common)
            wrong += [(process, name, right) for process in holders if local_P[process] != common]
    if wrong:
        process, name, right = wrong[0]
        differs = CheckpointError(
            f"{name} of process {process} is not equal to that of process {right} at step {step} "
            f"({len(wrong)} of {len(leaves)} arrays differ); the memory or a device of one of them may be failing; "
            "this checkpoint was not written; the same command, without that machine, goes on from the one before"
        )
        differs.known = True
        raise differs


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _gather(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """Returns a copy of the whole leaf on the host, wherever its parts lie."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)
