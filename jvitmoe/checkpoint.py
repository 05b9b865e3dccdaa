"""Checkpoints of a run; the only file that knows TensorStore.

`checkpoints/<step>/` holds one folder per item, an OCDBT database of Zarr arrays, and `meta/metadata`, which is JSON.
Orbax uses the same layout, so checkpoints that Orbax wrote are read too. Orbax itself is not used, because it leaks
memory at each save and each read: it calls TensorStore's `Spec.to_json`, which leaks 0.2 to 3 kB a call (0.1.86).

A checkpoint is written beside its final name, flushed to the disk and then renamed, so a killed write leaves nothing
that counts. TensorStore does not notice every flipped bit: `meta` keeps the CRC-32 of each leaf, and every read
compares it. No older checkpoint is deleted before the new one has been read back.
"""

import contextlib
import json
import os
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils

from jvitmoe import config as config_lib
from jvitmoe.config import LARGEST, Config, UserError, one_line
from jvitmoe.state import TrainState

META = Path("meta", "metadata")
DELETED, PART = ".deleted", ".part"  # suffixes of folders that are being deleted and written
PACKAGES = ("jvitmoe", "jax", "jaxlib", "flax", "optax", "tensorstore", "numpy")

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
        self._writing: tuple[int, Future[None] | None] | None = None  # the step that is being written
        self._writer = ThreadPoolExecutor(1)
        self._found: dict[int, dict[str, Any] | str] = {}  # by step: meta of a sound checkpoint, or what is wrong
        try:
            if not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    self._clear()
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

    def save(
        self, state: TrainState, config: Config, nll: float | None, files: Mapping[str, str] | None = None
    ) -> None:
        """Starts writing the state; returns once the arrays are copied, so that they may be donated.

        Waits for the write before, reads it back, and only then deletes what is no longer kept.

        Args:
            state: the whole training state.
            config: the run's config, for commands that have only the folder.
            nll: validation NLL, which the best checkpoint is chosen by; None without a validation split.
            files: name -> checksum of other files of the run folder as they are now.

        Raises CheckpointError when the previous write failed or this one does.
        """
        self._settle()
        step = int(state.step)
        # True copies: the writer would otherwise read buffers that the next step overwrites.
        # All processes gather whole arrays and process 0 writes them, so the bytes are the same on any mesh.
        items = {
            name: {_dotted(path): _gather(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
            for name, tree in _items(state).items()
        }
        self._found.pop(step, None)
        future = None
        try:
            self._set_aside(step)
            if jax.process_index() == 0:
                meta = {
                    "step": step,
                    "config": config_lib.to_dict(config),
                    "versions": versions(),
                    "nll": nll,
                    "files": dict(files or {}),
                    "checksums": {name: checksums(arrays) for name, arrays in items.items()},
                }
                part = self.directory / f"{step}{PART}"
                part.mkdir()  # here, so that a folder that may not be written is an error at once
                future = self._writer.submit(_write, part, items, meta)
        except Exception as error:
            raise self._failed(step, error) from error
        self._writing = step, future

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
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
                return TrainState(_put(np.array(step, np.int32), abstract.step.sharding), **trees), agreed
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
                    raise CheckpointError(f"checkpoint {which!r} does not exist; there are latest, best and {steps}")
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
        write failed."""
        try:
            self._settle()
        finally:
            self._writer.shutdown()

    def _settle(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        step, future = writing
        try:
            if future:
                future.result()
        except Exception as error:  # OSError, or the ValueError that TensorStore makes of one
            raise self._failed(step, error) from error
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the checkpoint is written")
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
            if path.suffix in (DELETED, PART) or ".orbax-checkpoint-tmp" in path.name:
                _remove(path)

    def _read(self, step: int, names: Iterable[str] | None = None) -> tuple[dict[str, Arrays], dict[str, Any]]:
        """Returns (item -> arrays, meta), verified: of the items named that it has, or of all. Raises anything at all
        where they are damaged. Every judgement of a checkpoint is made here."""
        folder = self.directory / str(step)
        meta = json.loads((folder / META).read_bytes())
        if meta.pop("checksum", None) != config_lib.checksum(meta):
            raise ValueError("its meta does not match its checksum")
        if meta["step"] != step:
            raise ValueError(f"it is the checkpoint of step {meta['step']}")
        kept = meta["checksums"]
        return {name: _read_arrays(folder / name, kept[name]) for name in names or kept if name in kept}, meta

    def _set_aside(self, step: int) -> None:
        """Moves away a folder of this very step: it was skipped as damaged."""
        folder = self.directory / str(step)
        there = folder.exists()
        if jax.process_count() > 1:
            there = bool(multihost_utils.broadcast_one_to_all(np.array(there)))
        if there:
            if jax.process_index() == 0:
                folder.rename(self.directory.parent / f"damaged-checkpoint-{step}-{time.time_ns()}")
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("the damaged folder is away")


def _items(state: TrainState) -> dict[str, Any]:
    """Returns name -> tree of what a checkpoint holds: everything but the step, which is its name."""
    return {name: tree for name, tree in state._asdict().items() if name != "step" and tree is not None}


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


def _spec(folder: Path, name: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder}/"}
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}


def _write(part: Path, items: Mapping[str, Arrays], meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint as `part` and renames it; returns once it would survive a power cut."""
    for item, arrays in items.items():
        context, compressed = ts.Context(), {"metadata": {"compressor": {"id": "zstd", "level": 1}}}
        stores = [
            ts.open(_spec(part / item, name) | compressed, context=context, create=True, dtype=x.dtype, shape=x.shape)
            for name, x in arrays.items()
        ]
        writes = [
            store.result().write(x, can_reference_source_data_indefinitely=True)
            for store, x in zip(stores, arrays.values(), strict=True)
        ]
        for write in writes:
            write.result()
    (part / META).parent.mkdir()
    (part / META).write_text(json.dumps({**meta, "checksum": config_lib.checksum(meta)}))
    _flush([*part.rglob("*"), part])
    part.rename(part.with_suffix(""))
    _flush([part.parent])


def _read_arrays(folder: Path, expected: Mapping[str, str]) -> Arrays:
    """Returns the arrays of one item. Raises ValueError where one does not match its checksum.

    Args:
        folder: of the item.
        expected: path of each leaf -> checksum. Paths are dotted; up to 0.1.0 they were as in "[0].mu['bias']".
    """
    wanted = {".".join(filter(None, re.split(r"[\[\]'.]+", path))): checksum for path, checksum in expected.items()}
    context = ts.Context()
    stores = [ts.open(_spec(folder, name), context=context, open=True, read=True) for name in wanted]
    reads = [store.result().read() for store in stores]
    arrays = {name: np.asarray(read.result()) for name, read in zip(wanted, reads, strict=True)}
    found = checksums(arrays)
    if wrong := [name for name in wanted if found[name] != wanted[name]]:
        name = f"{folder.name}.{wrong[0]}"
        raise ValueError(f"{name} does not match its checksum ({len(wrong)} of {len(wanted)} leaves)")
    return arrays


def _flush(paths: Iterable[Path]) -> None:
    """Returns once the disk holds these files and folders."""
    for path in paths:
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
        name: f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8)):08x}"
        for name, array in arrays.items()
    }


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _gather(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """Returns a copy of the whole leaf on the host, wherever its parts lie."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)
