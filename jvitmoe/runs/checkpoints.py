"""Checkpoints of a run: listing, checking, choosing and reading them. `checkpoint_writer` writes them.

`checkpoints/<step>/` holds a folder of Zarr arrays per item, and `meta/metadata`, which is JSON. Orbax writes them, but
does not read them: it fixes the kind of all checkpoints by the first folder that it finds, and each of its reads leaks
memory (TensorStore's `Spec.to_json`, 2.9 kB per array). Nor does it notice a flipped byte: `meta` holds the CRC-32 of
each leaf, and every read compares it.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from jvitmoe.errors import one_line
from jvitmoe.runs import arrays
from jvitmoe.runs.arrays import Arrays, CheckpointError
from jvitmoe.runs.files import checksum
from jvitmoe.runtime import devices
from jvitmoe.settings import LARGEST

META = Path("meta", "metadata")
# Fields of the training state that are saved; the step is the name of the folder.
ITEMS = ("params", "opt_state", "ema")
PACKAGES = ("jvitmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
DROPOUT_BITS = 16  # random bits per entry (`models.layers.dropout`); checkpoints without this number had 32
State = Any  # `training.state.TrainState`, a NamedTuple with `step` and the fields of ITEMS
Meta = dict[str, Any]


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


def items(state: State) -> dict[str, Any]:
    """Returns name -> tree of what a checkpoint holds, besides `meta`."""
    return {name: tree for name in ITEMS if (tree := getattr(state, name)) is not None}


class Saved(NamedTuple):
    """A checkpoint as `Checkpoints.read` returns it, on the host; `ema` is None where none is kept."""

    step: int
    meta: Meta
    params: Arrays
    ema: Arrays | None


class Checkpoints:
    """The `checkpoints/` folder of a run, which this class only reads.

    Args:
        directory: the folder.
        shared: if all processes call the same methods, and agree on what they find; otherwise each is on its own.
    """

    def __init__(self, directory: Path, shared: bool = True) -> None:
        self.directory, self._shared = directory.absolute(), shared
        self._checked: dict[int, Meta | str] = {}  # by step: meta of a sound checkpoint, or the fault of a damaged one

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, sound or not, ascending; the same in all processes. Raises
        CheckpointError where the folder cannot be listed."""
        steps = list_steps(self.directory)
        if not self._shared:
            return steps
        count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
        listed = np.resize(np.array(steps, np.int32), count)
        return np.asarray(multihost_utils.broadcast_one_to_all(listed)).tolist() if count else []

    def check(self, step: int) -> str | None:
        """Returns what is wrong with a checkpoint, or None. Reads it whole and compares every value's checksum."""
        if step not in self._checked:
            self._read_and_check(step)
        checked = self._checked[step]
        return checked if isinstance(checked, str) else None

    def find(self, which: str) -> int:
        """Returns the step of "latest", "best" (least validation NLL) or a number. Raises CheckpointError.

        Latest and best are the sound ones, with a warning for each damaged one. Chooses again if another process
        deletes checkpoints meanwhile.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory} holds no checkpoint; train first")
        if which in map(str, steps):
            return int(which)
        if which not in ("latest", "best"):
            names = "latest" if self._best(steps) is None else "latest, best"
            raise CheckpointError(f"checkpoint {which!r} does not exist; there are {names} and {steps}")
        sound = (step for step in reversed(steps) if self.check(step) is None)
        chosen = next(sound, None) if which == "latest" else self._best(steps)
        passed_over = [step for step in reversed(steps) if which == "best" or chosen is None or step > chosen]
        damaged = [step for step in passed_over if isinstance(self._checked.get(step), str)]
        if deleted := set(damaged) - set(self.steps()):
            for step in deleted:
                del self._checked[step]
            return self.find(which)
        for step in damaged:
            self._warn(step)
        if len(damaged) == len(steps):
            raise self._none_sound(steps)
        if chosen is None:
            raise CheckpointError("there is no best checkpoint without a validation split; set --checkpoint=latest")
        return chosen

    def read(self, which: str) -> Saved:
        """Returns the verified parameters, EMA and meta of the checkpoint that `find` chooses; chooses again if another
        process deletes it meanwhile. Raises CheckpointError."""
        step = self.find(which)
        trees = self._read_and_check(step, ("params", "ema"))
        if isinstance(meta := self._checked[step], dict):
            return Saved(step, meta, trees["params"], trees.get("ema"))
        del self._checked[step]
        steps = self.steps()
        if step not in steps and which != str(step):
            return self.read(which)
        raise CheckpointError(
            f"checkpoint {step} in {self.directory} cannot be read: {meta}; "
            f"choose another with --checkpoint, there are {steps}"
        )

    def restore(self, abstract: State) -> tuple[State, Meta] | None:
        """Returns (state, meta) of the newest checkpoint that is sound, or None if there is no checkpoint at all.

        Warns once for each newer checkpoint that was skipped, with the reason. Raises CheckpointError if there are
        checkpoints and none is sound, so that a run never starts afresh by accident.

        Args:
            abstract: shapes, dtypes and shardings to restore to, on any number of devices.
        """
        wanted, steps = items(abstract), self.steps()

        def placed(trees: dict[str, Arrays]) -> dict[str, Any]:
            return {name: arrays.to_devices(trees.pop(name, {}), tree) for name, tree in wanted.items()}

        for step in reversed(steps):
            trees = self._read_and_check(step, wanted, placed)
            if isinstance(meta := self._checked[step], dict):
                number = devices.to_devices(np.array(step, np.int32), abstract.step.sharding)
                return abstract._replace(step=number, **trees), meta
            self._warn(step)
        if steps:
            raise self._none_sound(steps)
        return None

    def _best(self, steps: Sequence[int]) -> int | None:
        """Returns the step of least finite validation NLL among the sound ones that have one; of equals, the newest."""
        metas: dict[int, Any] = {step: self._checked[step] for step in steps if self.check(step) is None}
        rated = [step for step, meta in metas.items() if meta["nll"] is not None and math.isfinite(meta["nll"])]
        return min(rated, key=lambda step: (metas[step]["nll"], -step), default=None)

    def _read_and_check(
        self, step: int, names: Iterable[str] | None = None, use: Callable[[dict[str, Arrays]], Any] = lambda x: x
    ) -> Any:
        """Reads items of a checkpoint (all by default), notes in `_checked` whether all processes find it sound, and
        returns what `use` makes of the items."""
        result: Any = {}
        try:
            trees, meta = self._read(step, names)
            result, self._checked[step] = use(trees), meta
        except JaxRuntimeError:  # of the devices, such as too little memory: no fault of the checkpoint
            raise
        except Exception as error:  # damage raises errors of any type
            self._checked[step] = one_line(error)
        if not self._shared:
            return result
        sound_P = multihost_utils.process_allgather(np.array(isinstance(self._checked[step], dict)))
        if isinstance(self._checked[step], dict) and not sound_P.all():
            self._checked[step] = f"process {int(np.argmin(sound_P))} cannot read it"
        return result

    def _read(self, step: int, names: Iterable[str] | None) -> tuple[dict[str, Arrays], Meta]:
        """Returns (item -> arrays, meta), verified, of the items in `names` that the checkpoint has. Raises errors of
        any type for a damaged one."""
        folder = self.directory / str(step)
        meta = json.loads((folder / META).read_bytes())
        if meta.pop("checksum", None) != checksum(meta):
            raise ValueError("its meta does not match its checksum")
        if meta["step"] != step:
            raise ValueError(f"it is the checkpoint of step {meta['step']}")
        kept = meta["checksums"]
        return {name: arrays.read(folder / name, kept[name]) for name in (names or kept) if name in kept}, meta

    def _warn(self, step: int) -> None:
        warnings.warn(f"checkpoint {step} skipped: {self._checked[step]}", RuntimeWarning, stacklevel=3)

    def _none_sound(self, steps: Sequence[int]) -> CheckpointError:
        return CheckpointError(
            f"none of the checkpoints {list(steps)} in {self.directory} can be read; "
            "restore them from a copy, or move the folder away to start afresh"
        )
