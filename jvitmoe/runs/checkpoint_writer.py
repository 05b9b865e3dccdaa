"""Writes the checkpoints of a run that trains: Orbax writes them, and `checkpoints` reads them."""

import contextlib
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.errors import one_line
from jvitmoe.machine import processes
from jvitmoe.runs import fingerprint, safe_io
from jvitmoe.runs.checkpoints import CheckpointError, Checkpoints, Meta, State, rated, saved_trees, versions

DELETED, UNFINISHED = "deleted", ".orbax-checkpoint-tmp"  # in names of folders that are being deleted and written


class CheckpointWriter(Checkpoints):
    """The `checkpoints/` folder of a run that trains. All processes must call the same methods.

    Orbax writes asynchronously and renames a checkpoint when it is complete, so a killed write leaves no folder named
    by a step. Only then does it move older ones away, each at once, so a killed deletion leaves none either.

    Args:
        directory: made if absent.
        keep: newest checkpoints kept, besides the one of least validation NLL.

    Raises UserError where the folder cannot be made or listed, or contains a link.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        super().__init__(directory)
        self._kept_nlls: dict[int, Any] = {}
        self._writing: int | None = None  # the step that is being written
        policies = [ocp.checkpoint_managers.LatestN(keep), _Best(self._kept_nlls)]
        options = ocp.CheckpointManagerOptions(
            create=False,
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # reads no metrics: there are none
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            todelete_subdir=DELETED,
            # With asynchronous creation, a full disk would be noticed only after minutes.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, post_finalization_callback=self._flush
            ),
        )
        # Plain Zarr: with Orbax's default, an OCDBT database, each save leaks three times as much memory.
        arrays = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.PyTreeSave, arrays)
        registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            safe_io.refuse_links(self.directory)
            self._delete()
            self._manager = _Manager(self.directory, options=options, handler_registry=registry)
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be used: {one_line(error)}; make it readable") from error

    def restore(self, abstract: State) -> tuple[State, Meta] | None:
        """As `Checkpoints.restore`; then moves damaged checkpoints out of the folder: Orbax would not save over them,
        and would count them as the newest."""
        if (restored := super().restore(abstract)) is None:
            return None
        step, faults = restored[1]["step"], dict[int, str]()
        self._kept_nlls |= self._nlls((s for s in self.steps() if s <= step), faults)
        if processes.is_first():
            for damaged in [s for s in self.steps() if s > step or s in faults]:
                path = self.directory.parent / f"damaged-checkpoint-{damaged}-{time.time_ns()}"
                with safe_io.writing(path):
                    (self.directory / str(damaged)).rename(path)
        processes.barrier()
        self._manager.reload()
        return restored

    def save(self, state: State, config: Config, nll: float | None, others: Mapping[str, str] | None = None) -> None:
        """Starts to write the whole state; returns when its arrays may be donated. First waits for the previous write.

        Args:
            config: the run's config, for commands that have only the folder.
            nll: validation NLL, to choose the best checkpoint; None without a validation split.
            others: name -> checksum of other files of the run folder at this step.

        Raises CheckpointError when this write or the previous one fails, and when devices hold unequal copies.
        """
        self._finish_write()
        step, trees = int(state.step), saved_trees(state)
        found, unequal = fingerprint.of_devices(trees)
        if unequal:
            fault = f"{unequal[0]} at step {step} ({len(unequal)} of {len(found)} arrays differ), so it was not saved"
            remedy = "a device or its memory may be failing; the same command, without that device, goes on"
            processes.all_raise(CheckpointError(f"{fault}; {remedy}"))  # all have found the same
        meta = {"step": step, "config": config_lib.to_dict(config), "versions": versions(), "nll": nll}
        meta |= {"files": dict(others or {}), "fingerprints": found}
        meta["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        meta["checksum"] = safe_io.checksum(meta)
        self._kept_nlls[step] = nll
        parts = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        with self._naming_failures(step):
            self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **parts), force=True)
        self._writing = step

    def close(self) -> None:
        """Waits for the last write, and deletes what failed ones have left. Raises CheckpointError when the last one
        failed: Orbax reports that only here."""
        try:
            self._finish_write()
        finally:
            with contextlib.suppress(Exception):  # Orbax reports a failed write again
                self._manager.close()
            self._delete_unfinished()  # nothing writes any more, so what a write has left is of one that failed

    def _finish_write(self) -> None:
        step, self._writing = self._writing, None
        if step is not None:
            with self._naming_failures(step):
                self._manager.wait_until_finished()
                self._delete()

    @contextlib.contextmanager
    def _naming_failures(self, step: int) -> Iterator[None]:
        """Raises CheckpointError for a failed write, after deleting what it left."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises ValueError for what the disk refuses
            if isinstance(error.__cause__, JaxRuntimeError):  # of a device, or of a process that is lost
                raise error.__cause__ from None
            if any(frame.f_globals is vars(multihost_utils) for frame, _ in traceback.walk_tb(error.__traceback__)):
                raise  # of a process that it waits for: JAX raises ValueError, too
            self._delete_unfinished()
            raise CheckpointError(
                f"checkpoint {step} cannot be written to {self.directory}: {one_line(error)}; "
                f"older ones are as they were; {safe_io.remedy_of(error)}, and start again"
            ) from error

    def _delete(self) -> None:
        """Deletes the checkpoints that Orbax has moved away."""
        if processes.is_first() and (self.directory / DELETED).exists():
            shutil.rmtree(self.directory / DELETED)

    def _delete_unfinished(self) -> None:
        for path in self.directory.glob(f"*{UNFINISHED}*") if processes.is_first() else ():
            shutil.rmtree(path, ignore_errors=True)

    def _flush(self) -> None:
        """Returns once the disk holds the JSON files, before they are renamed with their folder: a power cut must not
        take what replaces older checkpoints. TensorStore does so for arrays."""
        for path in self.directory.glob(f"*{UNFINISHED}*/*/*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: its thread would ask JAX about an older step, which undoes what `Stop.asked` has asked."""
        return False


class _Best:
    """Keeps the checkpoint of least validation NLL. Orbax's `BestN` reads it from a file without a checksum."""

    def __init__(self, nlls: Mapping[int, Any]) -> None:
        self._nlls = nlls

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        steps = [info.step for info in checkpoints]
        best = rated({step: self._nlls.get(step) for step in steps})[:1]
        return [step in best for step in steps]
