"""Whether the processes of a run hold equal copies of the training state."""

import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jvitmoe.runs.arrays import CheckpointError, checksums, flatten


def compare(step: int, items: Mapping[str, Any], whole: Mapping[str, Mapping[str, str]]) -> None:
    """Raises CheckpointError, in all processes, where processes that hold the same shards of an array differ in them.

    Args:
        step: of the state.
        items: name -> tree, on the devices.
        whole: name -> leaf -> checksum of this process's whole copy.
    """
    if jax.process_count() == 1:
        return
    leaves = {(item, name): leaf for item, tree in items.items() for name, leaf in flatten(tree).items()}
    local_N = []
    for (item, name), leaf in leaves.items():
        shards = {str(shard.index): np.asarray(shard.data) for shard in leaf.addressable_shards}
        known = whole[item][name] if leaf.is_fully_replicated else str(sorted(checksums(shards).items()))
        local_N.append(zlib.crc32(known.encode()))
    local_PN = multihost_utils.process_allgather(np.array(local_N, np.uint32))
    wrong = []  # (process, array, a process that holds what most hold)
    for (names, leaf), local_P in zip(leaves.items(), local_PN.T, strict=True):
        shards_of: dict[int, set[str]] = {}  # by process
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            shards_of.setdefault(device.process_index, set()).add(str(index))
        for held in {frozenset(indices) for indices in shards_of.values()}:
            holders = sorted(process for process in shards_of if shards_of[process] == held)
            common = Counter(local_P[holders].tolist()).most_common(1)[0][0]
            right = next(process for process in holders if local_P[process] == common)
            wrong += [(process, ".".join(names), right) for process in holders if local_P[process] != common]
    if wrong:
        process, name, right = wrong[0]
        error = CheckpointError(
            f"{name} of process {process} is not equal to that of process {right} at step {step} "
            f"({len(wrong)} of {len(leaves)} arrays differ); the memory or a device of one of them may be failing; "
            "this checkpoint was not written; the same command, without that machine, goes on from the one before"
        )
        error.known = True
        raise error
