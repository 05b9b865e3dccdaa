"""Checkpoints of a run; the only file that knows Orbax.

Orbax writes asynchronously and renames when done, so a killed write leaves nothing that counts. It does not notice a
flipped byte, names damaged folders as the latest step, and deletes old checkpoints by what it remembers of them. So
every leaf's CRC-32 is kept in `meta` and verified, restoring walks back to the newest checkpoint that verifies, and
what is kept is decided here: nothing is deleted before the new checkpoint has been read back from the disk.
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
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jvitmoe import config as config_lib
from jvitmoe.config import Config, UserError, one_line
from jvitmoe.state import TrainState

DELETED = ".deleted"
PACKAGES = ("jvitmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class CheckpointError(UserError):
    """No checkpoint that was asked for can be read; the message names the folder, the reason and the remedy."""


def versions() -> dict[str, str]:
    """Returns package -> installed version, for everything that shapes a run's numbers."""
    return {name: metadata.version(name) for name in PACKAGES}


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
        self._writing: int | None = None  # the step whose write nobody has waited for yet
        self._broken = False  # whether a write has failed, and was told of
        self._found: dict[int, dict[str, Any] | str] = {}  # by step: meta of a sound checkpoint, or what is wrong
        try:
            if not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    self._clear()
            options = ocp.CheckpointManagerOptions(read_only=read_only, create=False)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be used: {one_line(error)}; let it be read") from error

    def steps(self) -> list[int]:
        """Returns the steps that have a folder, ascending, sound or not; the same in all processes."""
        try:
            steps = sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())
        except FileNotFoundError:
            steps = []
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be listed: {one_line(error)}; let it be read") from error
        if jax.process_count() > 1:
            count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
            listed = np.resize(np.array(steps or [0], np.int32), count)
            steps = [int(step) for step in multihost_utils.broadcast_one_to_all(listed)] if count else []
        return steps

    def save(self, state: TrainState, config: Config, nll: float | None) -> None:
        """Starts writing the state; returns once the arrays are copied, so that they may be donated.

        Waits for the write before, reads it back, and only then deletes what is no longer kept.

        Args:
            state: the whole training state.
            config: the run's config, for commands that have only the folder.
            nll: validation NLL, which the best checkpoint is chosen by; None without a validation split.

        Raises CheckpointError when the previous write failed or this one does, and when processes hold different
        replicas.
        """
        self._settle()
        step = int(state.step)
        # True copies: on a CPU an asynchronous writer would otherwise read buffers that the next step overwrites.
        # Of several processes each gathers them whole, so that the checksums are of the same bytes on any mesh.
        items = {name: jax.tree.map(_gather, tree) for name, tree in _items(state).items()}
        checksums = {name: _checksums(tree) for name, tree in items.items()}
        if jax.process_count() > 1:
            _compare_replicas(step, _items(state), checksums)
        meta = {
            "step": step,
            "config": config_lib.to_dict(config),
            "versions": versions(),
            "nll": nll,
            "checksums": checksums,
        }
        self._found.pop(step, None)
        try:
            if jax.process_index() == 0:
                _try_to_write(self.directory)
            self._set_aside(step)
            # Forced, because Orbax silently saves nothing where a later step has a folder, be it a damaged one.
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    meta=ocp.args.JsonSave(meta | {"checksum": _json_checksum(meta)}),
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                ),
                force=True,
            )
        except Exception as error:  # OSError, or what TensorStore makes of one
            raise self._failed(step, error) from error
        self._writing = step

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
                trees, self._found[step] = self._read(step, items)
            except Exception as error:  # Orbax raises anything at all here, a bare Exception included
                self._found[step] = one_line(error)
            if (meta := self._agreed(step)) is not None:
                if not self._read_only and len(steps) > self._keep:
                    self._delete_old()  # a kill may have come between the last save and this
                return TrainState(_scalar(step, abstract.step.sharding), **trees), meta
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
        """Returns the step meant by "latest", "best" (least validation NLL) or a number.

        Latest and best are of the sound ones; each one passed over is warned of. Raises CheckpointError.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory} holds no checkpoint; train first")
        if which == "latest":
            for step in reversed(steps):
                if self.check(step) is None:
                    return step
                self._warn(step)
            raise self._none_sound(steps)
        if which == "best":
            for step in steps:
                if self.check(step):
                    self._warn(step)
            best = self._best(steps)
            if best is None:
                raise CheckpointError("there is no best checkpoint without a validation split; set --checkpoint=latest")
            return best
        if not which.isdecimal() or int(which) not in steps:
            names = "latest" if self._best(steps) is None else "latest, best"
            raise CheckpointError(f"checkpoint {which!r} does not exist; there are {names} and {steps}")
        return int(which)

    def read_meta(self, step: int) -> dict[str, Any]:
        """Returns the verified meta of one checkpoint. Raises CheckpointError."""
        return self._read_or_fail(step, {})[1]

    def read_params(self, step: int, abstract: TrainState) -> tuple[Any, Any]:
        """Returns the verified (params, ema) of one checkpoint, shaped and sharded as asked; ema is None where none is
        kept. Raises CheckpointError."""
        items = {name: tree for name, tree in _items(abstract).items() if name in ("params", "ema")}
        trees = self._read_or_fail(step, items)[0]
        return trees["params"], trees.get("ema")

    def close(self) -> None:
        """Waits for the last write, reads it back, and deletes what is no longer kept. Raises CheckpointError when the
        write failed: Orbax tells of that only here."""
        try:
            self._settle()
        finally:
            try:
                self._manager.close()
            except Exception:
                if not self._broken:  # Orbax tells of one failed write more than once
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
            with contextlib.suppress(OSError):  # Orbax may still be writing there; the next start clears the rest
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
            if path.suffix == DELETED or ".orbax-checkpoint-tmp" in path.name:
                _remove(path)

    def _read_or_fail(self, step: int, items: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return self._read(step, items)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} cannot be read: {one_line(error)}; "
                f"choose another with --checkpoint, there are {self.steps()}"
            ) from error

    def _read(self, step: int, items: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (name -> tree, meta), verified: of the items asked for, as they are asked for; or of all, on the host
        and as plain dicts. Raises anything at all where they are damaged."""
        (meta,) = self._restore(step, {"meta": ocp.args.JsonRestore()}).values()
        meta = dict(meta)
        if meta.pop("checksum", None) != _json_checksum(meta):
            raise ValueError("its meta does not match its checksum")
        if meta["step"] != step:
            raise ValueError(f"it is the checkpoint of step {meta['step']}")
        names = list(meta["checksums"]) if items is None else list(items)
        if missing := [name for name in names if name not in meta["checksums"]]:
            raise ValueError(f"it holds no {', '.join(missing)}")
        wanted = {name: ocp.args.StandardRestore(items[name] if items else None) for name in names}
        trees = self._restore(step, wanted) if wanted else {}
        for name in names:
            found, expected = _checksums(trees[name]), meta["checksums"][name]
            plain = {_plain(leaf): value for leaf, value in found.items()}
            wrong = [leaf for leaf in expected if plain.get(_plain(leaf)) != expected[leaf]]
            if wrong or len(found) != len(expected):
                first = wrong[0] if wrong else " holds more than was saved, which"
                raise ValueError(f"{name}{first} does not match its checksum ({len(wrong)} of {len(expected)} leaves)")
        return trees, meta

    def _restore(self, step: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {name: restored[name] for name in arguments}

    def _set_aside(self, step: int) -> None:
        """Moves away a folder of this very step: it was skipped as damaged, and Orbax would not save over it."""
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


def _items(state: TrainState) -> dict[str, Any]:
    """Returns name -> tree of what a checkpoint holds: everything but the step, which is its name."""
    return {name: tree for name, tree in state._asdict().items() if name != "step" and tree is not None}


def _plain(leaf: str) -> str:
    """Returns a leaf's path with no trace of the containers: Orbax gives named tuples back as dicts."""
    return "/".join(filter(None, re.split(r"[\[\]'.]+", leaf)))


def _flush(folder: Path) -> None:
    """Returns once the disk holds all of the folder, and its name: renaming alone survives no power cut."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _try_to_write(folder: Path) -> None:
    """Raises OSError where nothing can be made in the folder: Orbax would wait for minutes for what cannot come."""
    path = folder / f"trial{DELETED}"
    path.mkdir(exist_ok=True)
    path.rmdir()


def _remove(path: Path) -> None:
    """Deletes a folder; of a link the link alone, so that nothing outside a run folder is ever deleted."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _checksums(tree: Any) -> dict[str, str]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{zlib.crc32(np.ascontiguousarray(_gather(leaf)).tobytes()):08x}"
        for path, leaf in leaves
    }


def _compare_replicas(step: int, items: Mapping[str, Any], checksums: Mapping[str, Mapping[str, str]]) -> None:
    """Raises CheckpointError, in all processes, where processes that hold the same part of an array differ in it.

    Args:
        step: of the state.
        items: name -> tree, on the devices.
        checksums: name -> leaf -> checksum of this process's copy; right for a leaf that every process holds whole.
    """
    leaves = {
        name + jax.tree_util.keystr(path): (leaf, checksums[name][jax.tree_util.keystr(path)])
        for name, tree in items.items()
        for path, leaf in jax.tree.flatten_with_path(tree)[0]
    }
    local_N = []
    for leaf, checksum in leaves.values():
        if not leaf.is_fully_replicated:
            shards = {str(shard.index): shard.data for shard in leaf.addressable_shards}
            checksum = str(_checksums(shards))
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


def _scalar(number: int, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback((), sharding, lambda _: np.int32(number))


def _gather(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """Returns a copy of the whole leaf on the host, wherever its parts lie."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)


def _json_checksum(meta: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"
