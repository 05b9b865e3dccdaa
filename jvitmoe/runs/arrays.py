"""Arrays of a checkpoint: from the devices to named arrays on the host, their checksums, reading, and back."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils

from jvitmoe.errors import UserError
from jvitmoe.runs.files import crc32
from jvitmoe.runtime import devices

Arrays = dict[str, np.ndarray]  # dotted path of a leaf ("blocks.mlp.up") -> its value on the host


class CheckpointError(UserError):
    """No requested checkpoint can be read, or one cannot be written; names the folder, the reason and the remedy."""


def flatten(tree: Any) -> dict[str, Any]:
    """Returns dotted path -> leaf."""
    return {_dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def to_host(leaf: jax.Array) -> np.ndarray:
    """Returns a copy of the whole leaf, also if its shards are on the devices of several processes."""
    if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        return np.array(multihost_utils.process_allgather(leaf, tiled=True))
    return np.array(leaf)


def to_devices(arrays: Arrays, abstract: Any) -> Any:
    """Returns the arrays as a tree with the structure and shardings of `abstract`. Raises CheckpointError where a name,
    shape or dtype differs."""
    wanted = flatten(abstract)
    for name in wanted.keys() | arrays.keys():
        form, expected = ((x[name].shape, x[name].dtype) if name in x else None for x in (arrays, wanted))
        if form != expected:
            raise CheckpointError(f"{name} is {form} in the checkpoint and {expected} in the model")
    return jax.tree.map_with_path(lambda path, leaf: devices.to_devices(arrays[_dotted(path)], leaf.sharding), abstract)


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns name -> CRC-32 of the values. Copies no array, and other threads run meanwhile."""
    return {name: crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data) for name, array in arrays.items()}


def read(folder: Path, expected: Mapping[str, str]) -> Arrays:
    """Returns the arrays of one item of a checkpoint. Raises ValueError where one does not match its checksum.

    Args:
        folder: of the item: Zarr arrays; in version 0.1.0 inside an OCDBT database.
        expected: path of each leaf -> checksum. Paths are dotted; in version 0.1.0 they were like "[0].mu['bias']".
    """
    wanted = {".".join(filter(None, re.split(r"[\[\]'.]+", path))): checksum for path, checksum in expected.items()}
    base = {"driver": "file", "path": f"{folder}/"}
    store = {"driver": "ocdbt", "base": base} if (folder / "manifest.ocdbt").exists() else base
    context = ts.Context()
    specs = [{"driver": "zarr", "kvstore": store | {"path": f"{store.get('path', '')}{name}/"}} for name in wanted]
    stores = [ts.open(spec, context=context, open=True, read=True) for spec in specs]
    reads = [store.result().read() for store in stores]
    arrays = {name: np.asarray(read.result()) for name, read in zip(wanted, reads, strict=True)}
    actual = checksums(arrays)
    if wrong := [name for name in wanted if actual[name] != wanted[name]]:
        name = f"{folder.name}.{wrong[0]}"
        raise ValueError(f"{name} does not match its checksum ({len(wrong)} of {len(wanted)} leaves)")
    return arrays
