"""The pod-scale plan: what it reads in compiled programs, its arithmetic, and its page."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.lab import programs
from experiments.lab.programs import Program, abstract, of
from gendiff import devices, distributed, training
from gendiff.training import Training
from tpu import hlo, plan, roofline, slices, units
from tpu.hlo import Collective, Failed, Measured

ROOT = Path(__file__).parents[2]
HLO = """\
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %all-reduce.3 = (f32[]{:T(128)}, /*index=1*/bf16[512,2]{1,0:T(8,128)(2,1)S(1)}) all-reduce(%x, %y), to_apply=%sum
  %fusion.1 = f32[8]{0} fusion(%x), calls=%all-reduce-scatter.fused, metadata={op_name="a all-reduce(b)"}
}

%fused.1 (p: f32[8]) -> f32[32] {
  ROOT %all-gather.5 = f32[32]{0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="0"}
}

%fused.2 (p: f32[8]) -> f32[32] {
  ROOT %all-gather.6 = f32[32]{0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.fused (p: f32[64]) -> f32[8] {
  %all-reduce.9 = f32[64]{0} all-reduce(%p), to_apply=%sum
  ROOT %slice = f32[8]{0} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={8}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %all-gather-start = (f32[8]{0:T(128)}, f32[64]{0:T(128)}) all-gather-start(%p), dimensions={0}
  %all-gather-done = f32[64]{0:T(128)} all-gather-done(%all-gather-start)
  %reduce-scatter.1 = f32[8]{0} reduce-scatter(%q), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%sum
  %permute = (u8[16]{0}, u8[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%r)
  %done = u8[16]{0} collective-permute-done(%permute)
  %all-reduce-start.2 = pred[10]{0} all-reduce-start(%s), to_apply=%sum
  %while = (s32[], f32[64,64]) while(%v), condition=%at_end, body=%body
  ROOT %all-to-all = (f32[2]{0}, f32[2]{0}) all-to-all(%t, %u), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}
"""


def test_collectives_of_a_text():
    assert hlo.collectives(HLO, 8) == [
        Collective("all-reduce", 4 + 2048, True),
        Collective("all-gather", 128),  # one, in two steps
        Collective("reduce-scatter", 256, True),
        Collective("all-gather", 256),
        Collective("reduce-scatter", 64, group=2),
        Collective("collective-permute", 16),
        Collective("all-reduce", 10),
        Collective("all-to-all", 16, group=4),
    ]


@pytest.mark.parametrize(
    ("spelling", "wanted"),
    [
        ("{}", None),
        ("{{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("{{0},{1}}", [[0], [1]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['replica'=2,'data'=4] {'data'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['replica'=2,'data'=4] {'replica'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['replica'=2,'data'=4] {'replica','data'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_in_every_spelling(spelling, wanted):
    assert hlo.groups(f"%a = f32[] all-reduce(%p), channel_id=1, replica_groups={spelling}, to_apply=%sum") == wanted


def task(context):
    loss = lambda theta, key, x: jnp.sum(jnp.tanh(x @ theta["w"]) ** 2)
    return training.Task(loss, lambda key: training.minibatch(key, context, 64))


def small(fully_sharded: bool = False) -> Program:
    """A small training whose task draws from a pool."""
    settings, host = training.Settings(10, clip=None), training.Host(fully_sharded=fully_sharded)
    make = lambda key, weights, pool: Training(key, {"w": weights}, task, pool, settings, host)
    shapes = programs.KEY, of((256, 256)), of((4096, 256))
    return programs.trained("small", "rows", 64, lambda batch: abstract(make, *shapes), pool=True)


def measured(program: Program) -> Measured:
    """The small training on all devices."""
    mesh = distributed.make_mesh()
    return hlo.measured(program.lower(mesh, 64).compile(), mesh)


def test_training_has_one_all_reduce():
    program, count = small(), jax.device_count()
    result = measured(program)
    assert program.kind == "training"
    assert [(each.kind, each.looped) for each in result.collectives] == [("all-reduce", True)]
    weights = 4 * 256 * 256
    assert weights <= result.collectives[0].size <= weights + 64  # and the loss
    assert hlo.unexpected("training", result.collectives, count) == ""
    pool, states = 4 * 4096 * 256, 5 * weights
    assert pool + states <= result.arguments <= pool + states + 1024
    assert result.flops >= 4 * 8 * 256 * 256  # two products of 8 rows each device
    assert result.memory == result.arguments + result.temporaries + result.outputs


def test_costs_of_a_step_on_a_given_batch_leave_out_the_pool():
    program, mesh = small(), distributed.make_mesh()
    step = program.costs(mesh, 64).compile()
    found = hlo.measured(program.lower(mesh, 64).compile(), mesh, costs=step)
    assert found.accessed == step.cost_analysis()["bytes accessed"]
    assert step.memory_analysis().argument_size_in_bytes < 4 * 4096 * 256


def test_a_sharded_state_takes_less_of_each_device():
    assert small(True).kind == "sharded"
    sharded, replicated = measured(small(True)), measured(small())
    pool = 4 * 4096 * 256
    assert sharded.arguments - pool < 0.2 * (replicated.arguments - pool)
    assert "all-gather" in [each.kind for each in sharded.collectives]


def side_by_side(runs: int) -> Program:
    """Small trainings, each towards a goal of its own."""

    def task(own):
        loss = lambda theta, key, x: jnp.sum((theta["w"] - own["goal"] * x) ** 2)
        return training.Task(loss, lambda key: jax.random.normal(key, (16, 4)))

    settings = training.Settings(10, every=5, clip=None)
    make = lambda key, weights, goals: Training(
        training.keys(key, runs), {"w": weights}, task, {"goal": goals}, settings, own=True
    )
    shapes = programs.KEY, of((runs, 4)), of((runs,))
    return programs.side_by_side("small", abstract(make, *shapes))


def test_runs_side_by_side_and_samples_need_no_collective():
    mesh, program = devices.runs_mesh(), side_by_side(11)
    assert (program.kind, program.batch, program.steps) == ("replicas", 11, 10)
    for lowered in (program.lower(mesh, 11), program.costs(mesh, 11)):
        assert hlo.collectives(lowered.compile().as_text(), 8) == []
    assert devices.padded_runs(mesh, 11) == 16
    # Devices that share the batches of runs have one all-reduce, of those of a run alone.
    shared = distributed.make_mesh(jax.devices(), 2)
    result = hlo.measured(side_by_side(2).lower(shared, 2).compile(), shared)
    assert [(each.kind, each.group) for each in result.collectives] == [("all-reduce", 4)]
    assert hlo.unexpected("replicas", result.collectives, 8, result.data) == ""
    assert program.on(jax.devices(), 11).shape == mesh.shape, "cores do not share batches"
    draw = jax.jit(
        lambda scale, mesh, x: distributed.chunked(lambda x: jnp.sin(scale * x), x, 2, mesh), static_argnums=(0, 1)
    )
    samples = programs.sampler("sines", 16, 1, 2, draw, lambda n: ((2.0,), (of((n,)),)))
    assert (samples.kind, samples.divides, samples.chunk) == ("sampling", False, 2)
    assert hlo.unexpected("sampling", hlo.measured(samples.lower(mesh, 16).compile(), mesh).collectives, 8) == ""


def test_unexpected_collectives():
    reduce, gather, scatter = (Collective(kind, 8) for kind in ("all-reduce", "all-gather", "reduce-scatter"))
    assert hlo.unexpected("training", (reduce,), 8) == ""
    assert hlo.unexpected("training", (), 1) == ""
    assert hlo.unexpected("training", (), 8) == "must have one all-reduce, got none"
    assert hlo.unexpected("training", (reduce, reduce), 8) == "must have one all-reduce, got 2 all-reduce (16 B)"
    pieces = [Collective("all-reduce", size * 10**6) for size in (96, 114, 5)]
    assert hlo.unexpected("training", tuple(pieces[:2]), 8) == ""
    assert "got 3 all-reduce (215 MB)" in hlo.unexpected("training", tuple(pieces), 8)
    assert "got 1 all-gather" in hlo.unexpected("training", (gather,), 8)
    assert hlo.unexpected("sharded", (gather, scatter, reduce), 8) == ""
    assert "got 1 all-reduce" in hlo.unexpected("sharded", (reduce,), 8)
    assert hlo.unexpected("sharded", (reduce, reduce), 64) == ""
    permute = Collective("collective-permute", 8)
    assert "1 collective-permute" in hlo.unexpected("sharded", (gather, scatter, permute), 64)
    assert hlo.unexpected("replicas", (gather,), 8) == "must have no collective, got 1 all-gather (8 B)"
    once = Collective("all-reduce", 4)
    assert hlo.unexpected("training", (reduce, once), 8) == ""
    assert "got 2 all-reduce" in hlo.unexpected("training", (reduce, once._replace(looped=True)), 8)
    within = reduce._replace(group=4)
    assert hlo.unexpected("replicas", (within,), 8, 4) == ""
    assert hlo.unexpected("training", (within,), 8, 4) == ""
    assert "must have collectives of 4 devices, got 1 all-reduce (8 B) of others" in (
        hlo.unexpected("replicas", (reduce,), 8, 4)
    )


CHIP = slices.Chip(100.0, 1000.0, 10.0, 40.0)


def result(flops=200.0, accessed=10.0, given=(), **rest):
    return Measured(300.0, 200.0, 100.0, flops, accessed, given, 1.0, **rest)


def test_roofline():
    alone = roofline.predict(result(), CHIP, 1)
    assert (alone.compute, alone.memory, alone.links, alone.step, alone.bound) == (2.0, 1.0, 0.0, 2.0, "compute")
    many = roofline.predict(result(accessed=50.0, given=(Collective("all-reduce", 80, True),)), CHIP, 4)
    assert many.memory == 5.0
    assert many.links == pytest.approx(80 * 2 * 0.75 / 20)  # half of both directions
    assert many.step == pytest.approx(5.0 + 6.0)
    assert many.bound == "links"
    kinds = ("all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    each = [roofline.link_seconds((Collective(kind, 80),), 4, CHIP) for kind in kinds]
    assert each == pytest.approx([3.0, 3.0, 3.0, 4.0])
    assert roofline.link_seconds((Collective("all-gather", 80, group=2),), 4, CHIP) == pytest.approx(2.0)
    # Gathering and scattering cost what an all-reduce does.
    assert each[0] + each[1] == pytest.approx(roofline.link_seconds((Collective("all-reduce", 80),), 4, CHIP))


def test_total_and_efficiency():
    train = Program("training", "", 64, "points", 1000, lambda mesh, batch: None)
    assert roofline.total(train, result(), CHIP, 1, 64) == pytest.approx(2000.0)
    sample = train._replace(kind="sampling", chunk=8, divides=False)
    given = result(flops=250.0, setup_flops=50.0)
    assert roofline.total(sample, given, CHIP, 2, 64) == pytest.approx(4 * (1000 * 2.0 + 0.5))  # 4 chunks of 16
    assert roofline.total(sample, given, CHIP, 2, 65) == pytest.approx(5 * (1000 * 2.0 + 0.5))
    last = result(given=(Collective("all-gather", 80),))
    assert roofline.total(sample, last, CHIP, 4, 64) == pytest.approx(2 * 1000 * 2.0 + 3.0)  # once, not in each step
    assert roofline.efficiency(8.0, 2.0, 4) == 1.0
    assert roofline.efficiency(8.0, 4.0, 4) == 0.5


def test_programs_are_those_of_tpus():
    assert plan.EXPERIMENTS["genneg.traffic"]()["sampler"].chunk == 1024, "a CPU takes 64 samples at a time"


def test_batches_that_devices_do_not_divide_are_rounded_up_beside():
    train = Program("training", "", 1000, "points", 1000, lambda mesh, batch: None)
    assert plan.batches(train, 8) == [1000]
    assert plan.batches(train, 256) == [1000, 1024]
    assert plan.batches(train._replace(divides=False), 256) == [1000]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 "), (999.7, "1 k"), (1234, "1.23 k"), (2.5e9, "2.5 G"), (3e13, "30 T"), (12, "12 ")]
)
def test_quantity(value, text):
    assert units.quantity(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(2e-6, "2 µs"), (0.25, "250 ms"), (90, "1.5 min"), (172800, "2 d")])
def test_duration(seconds, text):
    assert units.duration(seconds) == text


def test_reason():
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\nUsed 20.10G of 15.75G hbm. Exceeded hbm capacity"
    assert hlo.reason(message) == "out of memory: 20.10GiB of 15.75GiB"
    assert hlo.reason("\n first \n second") == "first"
    assert hlo.reason("") == "no message"


def test_page(monkeypatch):
    programs = {
        "base": Program("training", "baseline", 1000, "points", 100, lambda mesh, batch: None),
        "sampler": Program("sampling", "Heun", 64, "samples", 18, lambda mesh, batch: None, False, 64),
    }
    monkeypatch.setattr(plan, "EXPERIMENTS", {"a.b": lambda: programs})
    reduce = (Collective("all-reduce", 80),)
    entries = [
        plan.Entry("a.b", "base", "v5e-1", 1000, result()),
        plan.Entry("a.b", "base", "v5e-8", 1000, result(flops=25.0, accessed=1.25, given=reduce)),
        plan.Entry("a.b", "base", "v5e-256", 1000, Failed("batch: expected a multiple of 256")),
        plan.Entry("a.b", "base", "v5e-256", 1024, result(given=reduce)._replace(temporaries=17e9)),
        plan.Entry("a.b", "sampler", "v5e-8", 64, result(given=reduce)),
    ]
    text = plan.page(entries, "jax 1, libtpu 2")
    assert "jax 1, libtpu 2" in text
    assert "**Nothing was executed**" in text
    assert "1,024 points (rounded up)" in text
    assert "| **no** |" in text
    assert "- a.b base on v5e-256, 1,000 points: batch: expected a multiple of 256" in text
    assert "- a.b base on v5e-256, 1,024 points: 17 GB do not fit" in text
    assert "- a.b sampler on v5e-8, 64 samples: must have no collective, got 1 all-reduce (80 B)" in text
    assert "2 of 5 programs" in text
    assert "Not compiled yet, of a.b: `base` on v5p-128; `sampler` on v5e-1, v5e-256, v5p-128." in text
    rows = [line for line in text.splitlines() if line.startswith(("| base", "| sampler"))]
    assert len(rows) == 5
    assert len({line.count("|") for line in rows}) == 1
    assert "{" not in text


def test_programs_of_every_experiment_are_as_large_as_their_presets():
    with plan.as_on_tpus():
        assert jax.default_backend() == "tpu"
    for experiment in plan.EXPERIMENTS:
        for program in plan.EXPERIMENTS[experiment]().values():
            assert program.batch > 0
            assert program.steps > 0
            assert program.kind in ("training", "sharded", "replicas", "sampling")


def test_stored_results_are_of_the_plan():
    stored = json.loads((ROOT / "tpu" / "plan.json").read_text())
    asked = plan.asked(plan.arguments().parse_args([]))
    assert set(stored) <= {" ".join(map(str, parts)) for parts in asked}


def test_without_libtpu_there_is_one_clear_error():
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("libtpu is installed")
    command = [sys.executable, "-m", "tpu.plan", "--experiment", "genneg.checkerboard"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: libtpu, TPU's compiler, must be installed, got none: pip install -e '.[tpu]' (on x86 Linux)"
    ]


@pytest.mark.slow
def test_a_training_compiled_for_tpus():
    pytest.importorskip("libtpu")
    found = plan.measure("genneg.checkerboard", "base", "v5e-8", 1000, 300.0)
    assert isinstance(found, Measured)
    assert [each.kind for each in found.collectives] == ["all-reduce"]
    assert found.memory < 100e6
