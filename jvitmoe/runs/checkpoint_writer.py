"""Writing checkpoints with Orbax, and deleting old ones.

Orbax writes asynchronously and renames a checkpoint when it is complete, so a killed write leaves no folder named by a
step. No older checkpoint is deleted before the new one has been read back from the disk.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.errors import one_line
from jvitmoe.runs import arrays, replicas
from jvitmoe.runs.arrays import CheckpointError
from jvitmoe.runs.checkpoints import DROPOUT_BITS, ITEMS, Checkpoints, Meta, State, items, versions
from jvitmoe.runs.files import checksum
from jvitmoe.runtime import processes

DELETED, UNFINISHED = ".deleted", ".orbax-checkpoint-tmp"  # in names of folders that are being deleted and written


class CheckpointWriter(Checkpoints):
    """The `checkpoints/` folder of a run that trains. All processes must call the same methods; process 0 deletes.

    Args:
        directory: made if absent.
        keep: newest sound checkpoints kept, besides those of skipped steps; the newest of all and the sound one of
            least validation NLL are kept too.

    Raises CheckpointError where the folder cannot be made or listed.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        super().__init__(directory)
        self._keep = keep
        self._writing: int | None = None  # the step that is being written
        self._write_failed = False
        # Plain Zarr, because Orbax's default, an OCDBT database, leaks more memory at each save. Compression would save
        # 8 % of the space, and reading back would take 2.5 times as long. The arrays need no second copy: see `save`.
        numpy = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, numpy))
        handlers: dict[str, Any] = {
            name: ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
            for name in ITEMS
        }
        handlers["meta"] = ocp.JsonCheckpointHandler()
        options = ocp.CheckpointManagerOptions(create=False)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if processes.is_first():
                self._delete_remains()
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
            # Its thread would ask JAX whether an older step is the last one, and reset what `processes.stops_at` asked.
            self._manager.reached_preemption = lambda step: False
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be used: {one_line(error)}; make it readable") from error

    def restore(self, abstract: State) -> tuple[State, Meta] | None:
        """As `Checkpoints.restore`; then deletes what a run that was killed had no time to delete."""
        if restored := super().restore(abstract):
            self._delete_old()
        return restored

    def save(
        self,
        state: State,
        config: Config,
        nll: float | None,
        files: Mapping[str, str] | None = None,
        skipped: int = 0,
    ) -> None:
        """Starts to write the state; returns when the arrays are copied, so that they may be donated. First waits for
        the previous write, reads it back, and deletes what is no longer kept.

        Args:
            state: the whole training state.
            config: the run's config, for commands that have only the folder.
            nll: validation NLL, to choose the best checkpoint; None without a validation split.
            files: name -> checksum of other files of the run folder at this step.
            skipped: steps in a row up to this one that were skipped. Above 0 it replaces no other checkpoint.

        Raises CheckpointError when this write or the previous one fails, and when replicas of processes differ.
        """
        self._finish_write()
        step = int(state.step)
        # True copies: the writer would otherwise read buffers that the next step overwrites.
        # All processes gather whole arrays and process 0 writes them, so the bytes are the same on any mesh.
        trees = {name: jax.tree.map(arrays.to_host, tree) for name, tree in items(state).items()}
        sums = {name: arrays.checksums(arrays.flatten(tree)) for name, tree in trees.items()}
        replicas.compare(step, items(state), sums)
        meta = {
            "step": step,
            "config": config_lib.to_dict(config),
            "versions": versions(),
            "dropout_bits": DROPOUT_BITS,
            "nll": nll,
            "skipped": skipped,
            "files": dict(files or {}),
            "checksums": sums,
        }
        self._checked.pop(step, None)
        try:
            if processes.is_first():  # raises OSError at once if the disk is full; Orbax would wait for minutes
                trial = self.directory / f"trial{DELETED}"
                trial.mkdir(exist_ok=True)
                trial.rmdir()
            self._move_damaged(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    meta=ocp.args.JsonSave(meta | {"checksum": checksum(meta)}),
                    **{name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()},
                ),
                force=True,  # otherwise Orbax silently saves nothing if there is a folder of a later step
            )
        except Exception as error:  # OSError, or TensorStore's error for it
            raise self._write_error(step, error) from error
        self._writing = step

    def close(self) -> None:
        """Waits for the last write, reads it back, and deletes what is no longer kept. Raises CheckpointError when the
        write failed: Orbax reports that only here."""
        try:
            self._finish_write()
        finally:
            try:
                self._manager.close()
            except Exception:
                if not self._write_failed:  # Orbax reports one failed write more than once
                    raise

    def _finish_write(self) -> None:
        step, self._writing = self._writing, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
            if processes.is_first():
                _flush(self.directory / str(step))
        except Exception as error:
            raise self._write_error(step, error) from error
        if fault := self.check(step):
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is not what was written ({fault}); the disk may be failing: "
                "older checkpoints were left as they are; set --workdir to another disk, or try again"
            )
        self._delete_old()

    def _write_error(self, step: int, error: BaseException) -> CheckpointError:
        """Returns the error of a failed write, after deleting what the write left."""
        self._write_failed = True
        if processes.is_first():
            with contextlib.suppress(OSError):  # arrays may still be written there; the next start deletes the rest
                self._delete_remains()
        return CheckpointError(
            f"checkpoint {step} cannot be written to {self.directory}: {one_line(error)}; "
            "older ones are as they were; make room or let the folder be written, and start again"
        )

    def _move_damaged(self, step: int) -> None:
        """Moves away a folder of this step, which was skipped as damaged: Orbax would not save over it."""
        folder = self.directory / str(step)
        # Only process 0 looks: a network disk may hide the new checkpoint for a minute where one looked before.
        if not processes.broadcast_from_first(processes.is_first() and folder.exists()):
            return
        if processes.is_first():
            folder.rename(self.directory.parent / f"damaged-checkpoint-{step}-{time.time_ns()}")
        processes.barrier()
        self._manager.reload()

    def _delete_old(self) -> None:
        """Deletes the sound checkpoints that are neither the best nor among the newest; those of skipped steps count
        only as the newest of all. Damaged ones stay, because a person may still need them."""
        steps = self.steps()
        if len(steps) <= self._keep:
            return
        sound: dict[int, Any] = {step: self._checked[step] for step in steps if self.check(step) is None}
        trained = [step for step, meta in sound.items() if not meta.get("skipped")]  # older versions did not write it
        for step in sound.keys() - {*trained[-self._keep :], max(sound, default=0), self._best(steps)}:
            del self._checked[step]
            if processes.is_first():
                path = self.directory / str(step)
                try:
                    _delete(path.rename(path.with_suffix(DELETED)))  # renamed first: a kill leaves no half of it
                except OSError as error:
                    raise CheckpointError(f"{path} cannot be deleted: {one_line(error)}; make it writable") from error
        processes.barrier()

    def _delete_remains(self) -> None:
        """Deletes the remains of killed writes and killed deletions."""
        for path in self.directory.iterdir():
            if path.suffix == DELETED or UNFINISHED in path.name:
                _delete(path)


def _flush(folder: Path) -> None:
    """Returns once the disk holds all of the folder and its name: without this, a power cut may undo the rename."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _delete(path: Path) -> None:
    """Deletes a folder; of a link only the link, so that nothing outside a run folder is ever deleted."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)
