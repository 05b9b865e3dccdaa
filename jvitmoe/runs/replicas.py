"""Whether the processes of a run hold equal copies of the training state."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jvitmoe.runs.arrays import CheckpointError, checksums, flatten


def compare(step: int, items: Mapping[str, Any], whole: Mapping[str, Mapping[str, str]]) -> None:
    """Raises CheckpointError, in all processes, where the copies of a shard on several processes differ.

    Args:
        step: of the state.
        items: name -> tree, on the devices.
        whole: name -> leaf -> checksum of this process's whole copy.
    """
    if jax.process_count() == 1:
        return
    names, local_N = [], []  # of the N shards of all arrays; the checksum is 0 where this process has no copy
    for item, tree in items.items():
        for name, leaf in flatten(tree).items():
            shards = {str(shard.index): shard.data for shard in leaf.addressable_shards}
            for index in sorted({str(index) for index in leaf.sharding.devices_indices_map(leaf.shape).values()}):
                names.append(f"{item}.{name}")
                if index not in shards:
                    local_N.append(0)
                    continue
                copied = leaf.is_fully_replicated
                crc = whole[item][name] if copied else checksums({"": np.asarray(shards[index])})[""]
                local_N.append(int(crc, 16) or 1)
    local_PN = multihost_utils.process_allgather(np.array(local_N, np.uint32))
    wrong = []  # (process, array, a process that agrees with most)
    for name, local_P in zip(names, local_PN.T, strict=True):
        holders = np.flatnonzero(local_P)
        common, _ = Counter(local_P[holders].tolist()).most_common(1)[0]
        right = int(np.argmax(local_P == common))
        wrong += [(int(process), name, right) for process in holders if local_P[process] != common]
    if wrong:
        process, name, right = wrong[0]
        error = CheckpointError(
            f"{name} of process {process} is not equal to that of process {right} at step {step} "
            f"({len(wrong)} of {len(names)} arrays differ); the memory or a device of one of them may be failing; "
            "this checkpoint was not written; the same command, without that machine, goes on from the one before"
        )
        error.known = True
        raise error
