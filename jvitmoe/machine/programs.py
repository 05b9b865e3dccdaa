"""What a compiled program costs, read from XLA: memory, FLOPs, and the collectives of its HLO text."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
Axes = Mapping[str, int]  # name -> devices along it, as `Mesh.shape`
BITS = {"pred": 8, "s4": 4, "u4": 4}  # of element types whose name does not end with them
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str  # one of KINDS
    axis: str  # the axes of the mesh whose devices take part, joined by "+"
    arrays: int  # that it takes at once
    bytes: int  # of the whole arrays on one device: summed, gathered or exchanged
    times: int  # how often a step runs it: layers, if it is in the loop over layers
    place: str  # "step", "loop", or "some" if it runs only in some steps, such as those that pull


class Argument(NamedTuple):
    """One array that a program takes, on one device."""

    name: str  # such as before.params['head']['kernel']
    bytes: int
    padded: int  # as it lies in memory: a TPU fills tiles, such as 8 x 128 numbers


class _Operation(NamedTuple):
    name: str
    shape: str
    kind: str
    rest: str  # operands and attributes


def for_reading(lowered: Any) -> Any:
    """Returns the compiled program of `jit(...).lower(...)`, to be read and not run. XLA's optimisations, which decide
    its text, FLOPs and memory, are done; code generation is fast and poor."""
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return lowered.compile({option: value for option, value in fast.items() if is_known(option, value)})


@functools.cache
def is_known(option: str, value: bool | int | str = True) -> bool:
    """True if the installed jaxlib has this option. An unknown option makes every compilation fail."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def planned_bytes(compiled: Any) -> int:
    """Returns the memory of a program on one device: arguments, results that do not replace them, and temporaries."""
    plan = compiled.memory_analysis()
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return int(kept + plan.temp_size_in_bytes)


def collectives(text: str, axes: Axes) -> list[Collective]:
    """Returns the collectives over several devices in the HLO text of a program. `axes` is the shape of its mesh."""
    computations, entry = _parse(text)
    return list(_walk(computations, entry, axes, 1, "step", set()))


def reduced_bytes(text: str, axes: Axes) -> int:
    """Returns the bytes that a device reduces in a step, pulls included. Raises ValueError for other collectives."""
    found = collectives(text, axes)
    if other := next((one.kind for one in found if one.kind != "all-reduce"), ""):
        raise ValueError(f"the program holds an {other}")
    return sum(one.bytes * one.times for one in found)


def arguments(text: str) -> list[Argument]:
    """Returns the arrays that a program takes, from its HLO text."""
    computations, entry = _parse(text)
    return [
        Argument(name[1].replace("\\'", "'"), size_of(one.shape), _padded(one.shape))
        for one in computations[entry]
        if one.kind == "parameter" and (name := re.search(r'op_name="([^"]*)"', one.rest))
    ]


def _padded(shape: str) -> int:
    """Returns the bytes of an array with its tiles filled: of "f32[3,100]{1,0:T(8,128)}" those of f32[8,128]."""
    layout = re.search(r"\[([\d,]*)\]\{([\d,]*):T\(([\d,]+)\)", shape)
    if not layout:
        return size_of(shape)
    dims, order, tile = ([int(n) for n in part.split(",") if n] for part in layout.groups())
    lengths = [dims[n] for n in reversed(order)]
    lengths = [1] * (len(tile) - len(lengths)) + lengths
    for n, side in enumerate(reversed(tile), 1):
        lengths[-n] = -(-lengths[-n] // side) * side
    return math.prod(lengths) * size_of(f"{shape.partition('[')[0]}[]")


def size_of(shape: str) -> int:
    """Returns the bytes of an HLO shape, such as "f32[2,3]{1,0}", without padding; of a tuple, their sum."""
    total = 0
    for kind, axes in ARRAY.findall(shape):
        bits = BITS.get(kind) or int(re.findall(r"\d+", kind)[0])
        total += math.prod(int(n) for n in axes.split(",") if n) * bits // 8
    return total


def _parse(text: str) -> tuple[dict[str, list[_Operation]], str]:
    """Returns (operations of each computation by its name, name of the one that is run)."""
    computations, entry = dict[str, list[_Operation]](), ""
    operations: list[_Operation] = []
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            operations = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := OPERATION.match(line):
            operations.append(_Operation(*found.groups()))
    return computations, entry


def _walk(
    computations: dict[str, list[_Operation]], name: str, axes: Axes, times: int, place: str, chains: set[Any]
) -> Iterator[Collective]:
    done = {}  # an asynchronous operation's start has its operands in its shape, too
    for one in computations[name]:
        if one.kind.endswith("-done"):
            done[re.split(r"[ ,)]", one.rest.lstrip("%"))[0].split("%")[-1]] = one
    for one in computations[name]:
        kind = one.kind.removesuffix("-start")
        if kind in KINDS:
            # A TPU's compiler hides one collective behind several operations, and writes it into each of them.
            if chain := re.search(r'channel_id=(\d+).*chain_id="(\d+)"', one.rest):
                hidden = (*chain.groups(), kind, tuple(ARRAY.findall(one.shape)))
                if hidden in chains:
                    continue
                chains.add(hidden)
            shape = done[one.name].shape if one.name in done else one.shape
            groups = _groups(one.rest, axes)
            if groups.shape[-1] > 1:
                size = size_of(shape) * (groups.shape[-1] if kind == "reduce-scatter" else 1)
                yield Collective(kind, _axis(groups, axes), len(ARRAY.findall(shape)), size, times, place)
        elif one.kind == "while":
            trips = int(found[1]) if (found := TRIPS.search(one.rest)) else 1
            inner = place if place == "some" else "loop"
            yield from _walk(computations, CALLED.findall(one.rest)[0], axes, times * trips, inner, chains)
        elif one.kind == "conditional":
            listed = BRANCHES.search(one.rest)
            branches = re.findall(r"[\w.\-]+", listed[1]) if listed else CALLED.findall(one.rest)
            for branch in branches:
                yield from _walk(computations, branch, axes, times, "some", chains)
        elif one.kind in ("call", "fusion", "async-start"):
            for called in CALLED.findall(one.rest):
                yield from _walk(computations, called, axes, times, place, chains)


def _groups(attributes: str, axes: Axes) -> np.ndarray:
    """Returns the devices that take part together, [groups, devices of each], from any of HLO's notations."""
    everyone = np.arange(math.prod(axes.values()))[None]
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", attributes):
        moved = [pair for pair in re.findall(r"\{(\d+), ?(\d+)\}", pairs[1]) if pair[0] != pair[1]]
        return np.array(moved, int) if moved else everyone[:, :1]
    if named := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", attributes):  # mesh['data'=1,'expert'=4] {'data'}
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        kept, names = re.findall(r"'(\w+)'", named[2]), list(sizes)
        numbers = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        order = sorted(range(len(names)), key=lambda n: names[n] in kept)  # those of a group last
        return numbers.transpose(order).reshape(-1, math.prod(sizes[name] for name in kept))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else [] for part in iota.groups())
        return np.arange(math.prod(dims)).reshape(dims).transpose(order or None).reshape(shape)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    return np.array([row.split(",") for row in re.findall(r"\{([\d,]+)\}", listed[1])], int) if listed else everyone


def _axis(groups: np.ndarray, axes: Axes) -> str:
    """Returns the axes of the mesh along which the devices of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(axes.values())), -1)
    differ = (places != places[:, :1]).any((0, 1))
    return "+".join(name for name, is_varied in zip(axes, differ, strict=True) if is_varied)
