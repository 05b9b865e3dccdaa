"""Reads the checkpoints of a run: Orbax reads them, and a fingerprint tells whether they are sound.
`checkpoint_writer` writes them.

`checkpoints/<step>/` holds a folder of Zarr arrays for each field of the training state, and `meta/metadata`, which is
JSON: config, validation NLL, versions, checksums of other files of the run folder, size and fingerprints of all arrays.
Every read compares them, because Orbax does not notice a flipped bit. Each process writes and reads only its own parts
of an array, so a state may be larger than the memory of a host.
"""

import json
import math
import operator
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from jvitmoe import config as config_lib
from jvitmoe import rules
from jvitmoe.config import LARGEST
from jvitmoe.data import sources
from jvitmoe.errors import UserError, first_few, one_line
from jvitmoe.machine import devices, memory
from jvitmoe.runs import fingerprint, safe_io

PACKAGES = ("jvitmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
State = Any  # `training.state.TrainState`: a NamedTuple of `step` and trees of arrays, or None
Meta = dict[str, Any]


class CheckpointError(UserError):
    """No requested checkpoint can be read, or one cannot be written; names the folder, the reason and the remedy."""


class Saved(NamedTuple):
    """A checkpoint as `Checkpoints.read` returns it: nested dicts of NumPy arrays; `ema` is None where none is kept."""

    step: int
    meta: Meta
    params: Any  # those of `experts.params.Params`
    ema: Any


def versions() -> dict[str, str]:
    """Returns package -> installed version, for every package that affects a run's numbers."""
    return {name: metadata.version(name) for name in PACKAGES}


def list_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, sound or not, ascending. An entry is a checkpoint if its name
    is a step number as `str` writes it. Raises CheckpointError where the folder cannot be listed."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {one_line(error)}; make it readable") from error
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,9}", name) and int(name) <= LARGEST)


class Checkpoints:
    """The `checkpoints/` folder of a run, which this class only reads."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(os.path.realpath(directory))  # TensorStore takes no `..`

    def steps(self) -> list[int]:
        return list_steps(self.directory)

    def check(self, step: int) -> Meta:
        """Returns the meta of a checkpoint, of any run, after reading all of it. Raises CheckpointError."""
        try:
            return self._read_to_host(self._meta(step)).meta
        except Exception as error:  # damage raises errors of any type
            raise CheckpointError(one_line(error)) from error

    def difference(self, meta: Meta) -> str:
        """Returns how the settings of a checkpoint differ from those in the config.json beside the folder; "" if they
        do not, or if there is none. Raises UserError where that cannot be read."""
        path = self.directory.parent / safe_io.CONFIG
        if (text := safe_io.read_bytes(path)) is None:
            return ""
        changed = sources.differences(config_lib.from_dict(meta["config"]), config_lib.loads(text, str(path)))
        if "train.epochs" in changed and operator.lt(*changed["train.epochs"]):
            del changed["train.epochs"]  # of a run that is trained longer
        listed = first_few([f"{name} is {own!r}, and {runs!r} in {path.name}" for name, (own, runs) in changed.items()])
        return listed and f"it is of another run: {listed}"

    def read(self, which: str | int) -> Saved:
        """Returns the checkpoint "latest", "best" (least validation NLL) or of a step, without optimiser state.

        Latest and best are the sound ones of this run (`difference`), with a warning for each other one that is passed
        over. Chooses again where a run that trains deletes checkpoints meanwhile. Raises CheckpointError, and UserError
        where the names of the classes beside the folder are not those of the checkpoint.
        """
        which = str(which)  # from Python a step may be a number
        steps, faults, found = self.steps(), dict[int, str](), None
        if not steps:
            raise CheckpointError(f"{self.directory} holds no checkpoint; train first")
        if which not in ("latest", "best", *map(str, steps)):
            raise CheckpointError(f"checkpoint {which!r} does not exist; it must be latest, best or one of {steps}")
        newest_first = [int(which)] if which.isdigit() else steps[::-1]
        for step in rated(self._nlls(steps, faults)) if which == "best" else newest_first:
            try:
                found = self._read_to_host(self._meta_of_run(step), ("params", "ema"))
                break
            except Exception as error:  # damage raises errors of any type
                faults[step] = one_line(error)
        if not which.isdigit() and faults.keys() - set(self.steps()):
            return self.read(which)
        if found is None and faults:
            raise self._unreadable(faults)
        if found is None:
            raise CheckpointError("there is no best checkpoint without a validation split; set --checkpoint=latest")
        _warn(faults)
        kept = {name: text for name, text in found.meta["files"].items() if name == safe_io.CLASSES}
        safe_io.compare(self.directory.parent, found.step, kept)
        return found

    def restore(self, abstract: State) -> tuple[State, Meta] | None:
        """Returns (state, meta) of the newest sound checkpoint of this run, or None if there is no checkpoint at all.

        All processes must call it. Warns of each newer checkpoint that was skipped, with the reason. Raises
        CheckpointError if none is sound, so that a run never starts afresh by accident.

        Args:
            abstract: shapes, dtypes and shardings to restore to, on any number of devices.
        """
        faults, step = dict[int, str](), LARGEST + 1
        while True:
            newest = np.int32(max((s for s in self.steps() if s < step), default=-1))
            step = int(multihost_utils.broadcast_one_to_all(newest))  # processes may not see the same on a disk
            if step < 0 and faults:
                raise self._unreadable(faults)
            if step < 0:
                return None
            try:
                trees, meta = self._restore(step, saved_trees(abstract))
            except ValueError as error:
                faults[step] = str(error)
                continue
            _warn(faults)
            number = devices.to_devices(np.array(step, np.int32), abstract.step.sharding)
            return abstract._replace(step=number, **trees), meta

    def _restore(self, step: int, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], Meta]:
        """Returns (item -> tree on the devices, meta). Raises ValueError, in all processes, where one finds damage."""
        fault, trees, meta = "", dict[str, Any](), Meta()
        try:
            meta = self._meta_of_run(step)
            if _items(meta) != sorted(wanted):
                raise ValueError(f"it holds {', '.join(_items(meta))}, but the run has {', '.join(sorted(wanted))}")
            place = self.directory / str(step)
            trees = {name: _read(place / name, _of_item(meta, name), tree) for name, tree in wanted.items()}
        except JaxRuntimeError:  # of the devices, such as too little memory: no fault of the checkpoint
            raise
        except Exception as error:  # damage raises errors of any type
            fault = one_line(error)
        failed_P = multihost_utils.process_allgather(np.array(bool(fault)))
        if failed_P.any():
            raise ValueError(fault or f"process {int(np.argmax(failed_P))} cannot read it")
        found, unequal = fingerprint.of_devices(trees)
        if unequal:
            raise ValueError(unequal[0])
        _compare(meta["fingerprints"], found)
        return trees, meta

    def _meta(self, step: int) -> Meta:
        """Returns the JSON of a checkpoint. Raises errors of any type where it is damaged."""
        sizes = safe_io.sizes_below(self.directory / str(step))  # raises for what Orbax might wait for
        meta = json.loads(safe_io.read_bytes(self.directory / str(step) / "meta" / "metadata") or b"")
        if not any(leaf.startswith(("params.trunk.", "params.experts.")) for leaf in meta.get("fingerprints", ())):
            raise ValueError("it was written by another version of jvitmoe; train again")
        if meta.pop("checksum", None) != safe_io.checksum(meta):
            raise ValueError("its meta does not match its checksum")
        if meta["step"] != step:
            raise ValueError(f"it is the checkpoint of step {meta['step']}")
        rules.check(config_lib.from_dict(meta["config"]))
        if not all(isinstance(text, str) for n in ("versions", "files", "fingerprints") for text in meta[n].values()):
            raise ValueError("its versions, checksums and fingerprints are not all texts")
        math.isfinite(meta["nll"] or 0)  # raises for what is no number
        # TensorStore reads a file whole, and aborts without the memory for it.
        most = min(max(meta["bytes"], safe_io.MOST_BYTES), memory.installed())
        if large := [f"{path.name} has {size:,} bytes" for path, size in sizes.items() if size > most]:
            raise ValueError(f"{large[0]}, which is more than {most:,}")
        return meta

    def _meta_of_run(self, step: int) -> Meta:
        """As `_meta`; also raises where the checkpoint is one of another run."""
        meta = self._meta(step)
        if difference := self.difference(meta):
            raise ValueError(difference)
        return meta

    def _read_to_host(self, meta: Meta, names: Sequence[str] = ()) -> Saved:
        """Returns a checkpoint after verifying the items `names`, by default all. Raises errors of any type."""
        step, trees = meta["step"], dict[str, Any]()
        for name in [item for item in _items(meta) if not names or item in names]:
            expected = _of_item(meta, name)
            trees[name] = _read(self.directory / str(step) / name, expected)
            _compare(expected, fingerprint.of_host({name: trees[name]}))
        return Saved(step, meta, trees["params"], trees.get("ema"))

    def _nlls(self, steps: Iterable[int], faults: dict[int, str]) -> dict[int, Any]:
        """Returns step -> validation NLL; enters into `faults` what is wrong with other checkpoints."""
        nlls = {}
        for step in steps:
            try:
                nlls[step] = self._meta_of_run(step)["nll"]
            except Exception as error:  # damage raises errors of any type
                faults[step] = one_line(error)
        return nlls

    def _unreadable(self, faults: Mapping[int, str]) -> CheckpointError:
        return CheckpointError(
            f"none of the checkpoints {sorted(faults)} in {self.directory} can be read ({max(faults)}: "
            f"{faults[max(faults)]}); restore them from a copy, or train in a new --workdir"
        )


def saved_trees(state: State) -> dict[str, Any]:
    """Returns name -> tree of what is saved: all that has arrays. The step is the name of the folder."""
    return {name: tree for name, tree in state._asdict().items() if name != "step" and jax.tree.leaves(tree)}


def _items(meta: Meta) -> list[str]:
    return sorted({leaf.partition(".")[0] for leaf in meta["fingerprints"]})


def _of_item(meta: Meta, name: str) -> dict[str, str]:
    """Returns leaf -> fingerprint of the arrays of one item."""
    return {leaf: text for leaf, text in meta["fingerprints"].items() if leaf.startswith(f"{name}.")}


def rated(nlls: Mapping[int, Any]) -> list[int]:
    """Returns the steps that have a finite NLL, the least first; of equals, the newest first."""
    finite = [step for step, nll in nlls.items() if nll is not None and math.isfinite(nll)]
    return sorted(finite, key=lambda step: (nlls[step], -step))


def _read(folder: Path, fingerprints: Mapping[str, str], abstract: Any = None) -> Any:
    """Returns one item with the structure, dtypes and shardings of `abstract`, or as nested dicts and lists of NumPy
    arrays. Waits for no other process. Raises errors of any type where it is damaged, as where dtypes and shapes are
    not those of the fingerprints; the sums are for the caller to compare."""
    alone = ocp.options.MultiprocessingOptions(jax.process_index(), {jax.process_index()})
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        stored = reader.metadata(folder).item_metadata.tree
        needed = sum(
            max(map(math.prod, (leaf.shape, leaf.storage.chunk_shape))) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(stored)
        )
        if needed > (there := sum(safe_io.sizes_below(folder).values())):  # TensorStore aborts without the memory
            raise ValueError(f"its arrays claim {needed:,} bytes, and its files have {there:,}")
        kinds = {leaf: text.rpartition(" ")[0] for leaf, text in fingerprints.items()}
        _compare(kinds, fingerprint.kinds({folder.name: stored}))
        how = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), stored)
        if abstract is not None:
            how = ocp.checkpoint_utils.construct_restore_args(abstract)
        return reader.restore(folder, args=ocp.args.PyTreeRestore(abstract, how))


def _compare(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises ValueError where an array does not have its fingerprint."""
    if wrong := sorted(name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)):
        raise ValueError(f"{wrong[0]} does not match its fingerprint ({len(wrong)} of {len(expected)} arrays)")


def _warn(faults: Mapping[int, str]) -> None:
    for step in sorted(faults, reverse=True):
        warnings.warn(f"checkpoint {step} skipped: {faults[step]}", RuntimeWarning, stacklevel=3)
