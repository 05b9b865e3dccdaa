"""Checkpoints of a run; the only file that knows Orbax.

Orbax writes asynchronously and renames when done, so a killed write leaves nothing that counts. It does not notice a
flipped byte, names damaged folders as the latest step, and with `best_fn` alone deletes the newest. So every leaf's
CRC-32 is kept in `meta` and verified, and restoring walks back to the newest checkpoint that verifies.
"""

import json
import time
import warnings
import zlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jvitmoe import config as config_lib
from jvitmoe.config import Config, UserError
from jvitmoe.state import TrainState

PACKAGES = ("jvitmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class CheckpointError(UserError):
    """No checkpoint that was asked for can be read; the message names the folder, the reason and the remedy."""


def versions() -> dict[str, str]:
    """Returns package -> installed version, for everything that shapes a run's numbers."""
    return {name: metadata.version(name) for name in PACKAGES}


class Checkpoints:
    """The `checkpoints/` folder of a run: items params, opt_state, ema (if kept) and meta (JSON).

    Args:
        directory: made if absent, unless read_only.
        keep: newest checkpoints kept; the one of least validation NLL is kept besides.
        best: whether saves carry a validation NLL to choose by.
        read_only: never writes or deletes, so several readers may share a folder.
    """

    def __init__(self, directory: Path, keep: int = 1, best: bool = True, read_only: bool = False) -> None:
        self.directory = Path(directory).absolute()
        latest = checkpoint_managers.LatestN(keep)
        least_nll = checkpoint_managers.BestN(
            get_metric_fn=_nll, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=_nll if best else None,
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, least_nll]),
                read_only=read_only,
                create=not read_only,
            ),
        )

    def steps(self) -> list[int]:
        """Returns the steps that have a folder, ascending, sound or not."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config: Config, nll: float | None) -> None:
        """Starts writing the state; returns once the arrays are copied, so that they may be donated.

        Args:
            state: the whole training state.
            config: the run's config, for commands that have only the folder.
            nll: validation NLL, which the best checkpoint is chosen by; None without a validation split.

        Raises CheckpointError when the previous write failed or this one is refused.
        """
        step = int(state.step)
        # True copies: on a CPU an asynchronous writer would otherwise read buffers that the next step overwrites.
        # Of several processes each gathers them whole, so that the checksums are of the same bytes on any mesh.
        items = {name: jax.tree.map(_gather, tree) for name, tree in _items(state).items()}
        meta = {
            "step": step,
            "config": config_lib.to_dict(config),
            "versions": versions(),
            "nll": nll,
            "checksums": {name: _checksums(tree) for name, tree in items.items()},
        }
        self._set_aside(step)
        try:
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    meta=ocp.args.JsonSave(meta | {"checksum": _json_checksum(meta)}),
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                ),
                metrics=None if nll is None else {"nll": nll},
            )
        except OSError as error:
            raise CheckpointError(f"checkpoint {step} cannot be written to {self.directory}: {error}") from error
        if not saved:
            raise CheckpointError(f"checkpoint {step} was refused by Orbax in {self.directory}; move the folder away")

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns (state, meta) of the newest checkpoint that verifies, or None where there is no checkpoint at all.

        Warns once for each newer checkpoint that was skipped, with the reason. Raises CheckpointError when there are
        checkpoints and none verifies: a run never starts afresh by accident.

        Args:
            abstract: shapes, dtypes and shardings to restore to, on any number of devices.
        """
        items, steps = _items(abstract), self.steps()
        for step in reversed(steps):
            try:
                trees, meta = self._read(step, items)
            except Exception as error:  # Orbax raises anything at all here, a bare Exception included
                warnings.warn(f"checkpoint {step} skipped: {_one_line(error)}", RuntimeWarning, stacklevel=2)
                continue
            return TrainState(_scalar(step, abstract.step.sharding), **trees), meta
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self.directory} can be read; "
                "restore them from a copy, or move the folder away to start afresh"
            )
        return None

    def find(self, which: str) -> int:
        """Returns the step meant by "latest", "best" (least validation NLL) or a number. Raises CheckpointError."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory} holds no checkpoint; train first")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            if best is None:
                raise CheckpointError("there is no best checkpoint without a validation split; set --checkpoint=latest")
            return best
        if not which.isdigit() or int(which) not in steps:
            raise CheckpointError(f"checkpoint {which!r} does not exist; there are latest, best and {steps}")
        return int(which)

    def read_meta(self, step: int) -> dict[str, Any]:
        """Returns the verified meta of one checkpoint. Raises CheckpointError."""
        return self._read_or_fail(step, {})[1]

    def read_params(self, step: int, abstract: TrainState) -> tuple[Any, Any]:
        """Returns the verified (params, ema) of one checkpoint, shaped and sharded as asked; ema is None where none is
        kept. Raises CheckpointError."""
        items = {name: tree for name, tree in _items(abstract).items() if name != "opt_state"}
        trees = self._read_or_fail(step, items)[0]
        return trees["params"], trees.get("ema")

    def close(self) -> None:
        """Waits for the last write. Raises CheckpointError when it failed: Orbax tells of that only here."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise CheckpointError(f"the last checkpoint in {self.directory} failed: {_one_line(error)}") from error
        finally:
            self._manager.close()

    def _read_or_fail(self, step: int, items: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return self._read(step, items)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} cannot be read: {_one_line(error)}; "
                f"choose another with --checkpoint, there are {self.steps()}"
            ) from error

    def _read(self, step: int, items: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **arguments))
        meta = dict(restored["meta"])
        if meta.pop("checksum", None) != _json_checksum(meta):
            raise ValueError("its meta does not match its checksum")
        for name in items:
            found, expected = _checksums(restored[name]), meta["checksums"][name]
            wrong = [leaf for leaf in expected if found.get(leaf) != expected[leaf]]
            if wrong:
                raise ValueError(
                    f"{name}{wrong[0]} does not match its checksum ({len(wrong)} of {len(expected)} leaves)"
                )
        return {name: restored[name] for name in items}, meta

    def _set_aside(self, step: int) -> None:
        """Moves away a folder of this very step: it was skipped as damaged, and Orbax would silently not save."""
        folder = self.directory / str(step)
        if folder.exists():
            self._manager.wait_until_finished()
            multihost_utils.sync_global_devices("all processes have seen the damaged folder")
            if jax.process_index() == 0:
                folder.rename(self.directory.parent / f"damaged-checkpoint-{step}-{time.time_ns()}")
            multihost_utils.sync_global_devices("the damaged folder is away")
            self._manager.reload()


def _items(state: TrainState) -> dict[str, Any]:
    """Returns name -> tree of what a checkpoint holds: everything but the step, which is its name."""
    return {name: tree for name, tree in state._asdict().items() if name != "step" and tree is not None}


def _nll(metrics: Mapping[str, float]) -> float:
    return metrics["nll"]


def _checksums(tree: Any) -> dict[str, str]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{zlib.crc32(np.ascontiguousarray(_gather(leaf)).tobytes()):08x}"
        for path, leaf in leaves
    }


def _scalar(number: int, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback((), sharding, lambda _: np.int32(number))


def _gather(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """Returns a copy of the whole leaf on the host, wherever its parts lie."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)


def _json_checksum(meta: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
