"""What is read from compiled programs: memory, FLOPs and collectives."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from jvitmoe.machine import programs

BOTH = {"data": 2, "expert": 4}
REDUCED = "(f32[2,3]{1,0}, bf16[5]{0:T(256)(128)(2,1)}, /*index=2*/pred[])"
PROGRAM = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%layer (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%pulls (experts: f32[8]) -> f32[8] {
  ROOT %m = f32[8]{0} all-reduce(%experts), replica_groups=[2,4]<=[8], to_apply=%sum
}

%waits (experts: f32[8]) -> f32[8] {
  ROOT %same = f32[8]{0} copy(%experts)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %start = ((f32[6]{0}), f32[6]{0}) all-reduce-start(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %s = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%sum
  %moved = u8[3]{0} collective-permute(%q), source_target_pairs={{0,4},{1,5},{4,0},{5,1}}
  %here = u8[3]{0} collective-permute(%q), source_target_pairs={{0,0},{1,1}}
  %w = (s32[], f32[8]{0}) while(%t), condition=%when, body=%layer, backend_config={"known_trip_count":{"n":"12"}}
  %if = f32[8]{0} conditional(%due, %x, %x), branch_computations={%pulls, %waits}
  ROOT %done = f32[6]{0} all-reduce-done(%start)
}
"""


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("mesh['data'=2,'expert'=4] {'data'}", "data"),
        ("mesh['data'=2,'expert'=4] {'expert'}", "expert"),
        ("mesh['data'=2,'expert'=4] {'data','expert'}", "data+expert"),
        ("[1,8]<=[8]", "data+expert"),
        ("[2,4]<=[8]", "expert"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("[8,1]<=[8]", None),
        ("{{0},{1}}", None),
    ],
)
def test_collectives_are_counted_where_several_devices_take_part(groups, axis):
    operation = f"%a = {REDUCED} all-reduce(%b, %c, %d), replica_groups={groups}, to_apply=%e"
    text = f"ENTRY %main (a: f32[]) -> f32[] {{\n  {operation}\n}}\n"
    found = programs.collectives(text, BOTH)
    assert found == ([programs.Collective("all-reduce", axis, 3, 24 + 10 + 1, 1, "step")] if axis else [])
    assert programs.reduced_bytes(text, BOTH) == (35 if axis else 0)


def test_each_collective_has_its_kind_axis_size_and_place():
    found = {one.kind + one.place: one[1:] for one in programs.collectives(PROGRAM, BOTH)}
    assert found == {
        "all-reducestep": ("data+expert", 1, 24, 1, "step"),  # once, although start and done hold its arrays
        "reduce-scatterstep": ("expert", 1, 32, 1, "step"),
        "collective-permutestep": ("data", 1, 3, 1, "step"),
        "all-gatherloop": ("data", 1, 32, 12, "loop"),
        "all-reducesome": ("expert", 1, 32, 1, "some"),
    }
    with pytest.raises(ValueError, match=r"the program holds an (all-gather|reduce-scatter|collective-permute)"):
        programs.reduced_bytes(PROGRAM, BOTH)


def test_a_collective_that_several_operations_hide_is_counted_once():
    """As a TPU's compiler writes it: in the computation of each operation, with one channel and chain."""
    hidden = (
        'bf16[8,4]{1,0} all-gather(%p), channel_id=12, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="1"}'
    )
    parts = "".join(f"%part{n} (p: f32[]) -> f32[] {{\n  %g{n} = {hidden}\n}}\n\n" for n in range(3))
    calls = "".join(f"  %f{n} = bf16[8,4]{{1,0}} fusion(%p), calls=%part{n}\n" for n in range(3))
    (found,) = programs.collectives(f"{parts}ENTRY %main (p: f32[]) -> f32[] {{\n{calls}}}\n", BOTH)
    assert found == programs.Collective("all-gather", "data+expert", 1, 64, 1, "step")


@pytest.mark.parametrize(
    ("shape", "size", "padded"),
    [
        ("f32[12,12,25]{2,1,0:T(8,128)}", 14_400, 12 * 16 * 128 * 4),
        ("u8[50000,3072]{1,0:T(8,128)(4,1)}", 153_600_000, 153_600_000),
        ("bf16[300]{0:T(512)}", 600, 1024),
        ("f32[3,100]{0,1:T(8,128)}", 1200, 104 * 128 * 4),
        ("s32[]{:T(128)}", 4, 512),
        ("f32[3,100]{1,0}", 1200, 1200),
    ],
)
def test_arguments_are_named_and_measured_with_their_tiles(shape, size, padded):
    text = f"""ENTRY %main (a: f32[]) -> f32[] {{
  %p = {shape} parameter(0), sharding={{replicated}}, metadata={{op_name="before.params[\\'head\\']"}}
}}
"""
    assert programs.arguments(text) == [programs.Argument("before.params['head']", size, padded)]


def test_a_program_compiled_for_reading_says_what_the_one_that_runs_says():
    def loss(x):
        return jax.lax.psum(jnp.sum(jnp.tanh(x @ x.T) ** 2), "d")

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    summed = jax.jit(
        jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d"))
    )
    lowered = summed.lower(jax.ShapeDtypeStruct((8, 6), jnp.float32))
    quick, slow = programs.for_reading(lowered), lowered.compile()
    for found in ("flops", "bytes accessed"):
        assert quick.cost_analysis()[found] == slow.cost_analysis()[found] > 0
    assert programs.planned_bytes(quick) == programs.planned_bytes(slow) > 0
    assert programs.collectives(quick.as_text(), mesh.shape) == programs.collectives(slow.as_text(), mesh.shape)
