"""The pod-scale plan: what it reads in compiled programs, its arithmetic, and its page."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gendiff import devices, distributed, training

PLAN = Path(__file__).parents[2] / "tpu" / "plan.py"
spec = importlib.util.spec_from_file_location("tpu_plan", PLAN)
assert spec is not None
assert spec.loader is not None
plan = importlib.util.module_from_spec(spec)
sys.modules["tpu_plan"] = plan
spec.loader.exec_module(plan)

Collective, Failed, Measured, Program = plan.Collective, plan.Failed, plan.Measured, plan.Program

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
    assert plan.collectives(HLO, 8) == [
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
    assert plan.groups(f"%a = f32[] all-reduce(%p), channel_id=1, replica_groups={spelling}, to_apply=%sum") == wanted


def lower(fsdp: bool) -> tuple[plan.Trained, jax.sharding.Mesh]:
    """A small training whose task draws from a pool."""
    pool = plan.of((4096, 256))

    def task(context):
        loss = lambda theta, key, x: jnp.sum(jnp.tanh(x @ theta["w"]) ** 2)
        return training.Task(loss, lambda key: training.minibatch(key, context, 64))

    settings = training.Settings(10, clip=None)
    mesh = distributed.make_mesh()
    return plan.Trained(task, {"w": plan.of((256, 256))}, pool, settings), mesh


def test_training_has_one_all_reduce():
    given, mesh = lower(False)
    result = plan.measured(given.lower(mesh).compile(), mesh)
    assert [(each.kind, each.looped) for each in result.collectives] == [("all-reduce", True)]
    weights = 4 * 256 * 256
    assert weights <= result.collectives[0].size <= weights + 64  # and the loss
    assert plan.unexpected("training", result.collectives, mesh.size) == ""
    pool, states = 4 * 4096 * 256, 5 * weights
    assert pool + states <= result.arguments <= pool + states + 1024
    assert result.flops >= 4 * 8 * 256 * 256  # two products of 8 rows each device
    assert result.memory == result.arguments + result.temporaries + result.outputs


def test_costs_of_a_step_on_a_given_batch_leave_out_the_pool():
    given, mesh = lower(False)
    step = given.step(mesh).compile()
    assert (
        plan.measured(given.lower(mesh).compile(), mesh, costs=step).accessed == step.cost_analysis()["bytes accessed"]
    )
    assert step.memory_analysis().argument_size_in_bytes < 4 * 4096 * 256


def test_a_sharded_state_takes_less_of_each_device():
    given, mesh = lower(True)
    sharded, whole = (plan.measured(given.lower(mesh, fsdp).compile(), mesh) for fsdp in (True, False))
    pool = 4 * 4096 * 256
    assert sharded.arguments - pool < 0.2 * (whole.arguments - pool)
    assert "all-gather" in [each.kind for each in sharded.collectives]


def test_runs_side_by_side_and_samples_need_no_collective():
    mesh = devices.runs_mesh()

    def task(own):
        loss = lambda theta, key, x: jnp.sum((theta["w"] - own["goal"] * x) ** 2)
        return training.Task(loss, lambda key: jax.random.normal(key, (16, 4)))

    own = {"goal": plan.NUMBER}
    runs = plan.SideBySide(task, {"w": plan.of((4,))}, own, True, training.Settings(10, every=5, clip=None))
    for lowered in (runs.lower(mesh, 11), runs.step(mesh, 11)):
        assert plan.collectives(lowered.compile().as_text(), 8) == []
    assert devices.padded_runs(mesh, 11) == 16
    # Devices that share the batches of runs have one all-reduce, of those of a run alone.
    shared = distributed.make_mesh(jax.devices(), 2)
    result = plan.measured(runs.lower(shared, 2).compile(), shared)
    assert [(each.kind, each.group) for each in result.collectives] == [("all-reduce", 4)]
    assert plan.unexpected("replicas", result.collectives, 8, result.data) == ""
    assert runs.mesh(jax.devices(), 11).shape == mesh.shape, "cores do not share batches"
    given = plan.shaped(plan.of((16,)), distributed.replicated(mesh))
    samples = jax.jit(lambda x: distributed.chunked(jnp.sin, x, 2, mesh)).lower(given).compile()
    assert plan.unexpected("sampling", plan.measured(samples, mesh).collectives, 8) == ""


def test_unexpected_collectives():
    reduce, gather, scatter = (Collective(kind, 8) for kind in ("all-reduce", "all-gather", "reduce-scatter"))
    assert plan.unexpected("training", (reduce,), 8) == ""
    assert plan.unexpected("training", (), 1) == ""
    assert plan.unexpected("training", (), 8) == "expected one all-reduce, given none"
    assert plan.unexpected("training", (reduce, reduce), 8) == "expected one all-reduce, given 2 all-reduce (16 B)"
    pieces = [Collective("all-reduce", size * 10**6) for size in (96, 114, 5)]
    assert plan.unexpected("training", tuple(pieces[:2]), 8) == ""
    assert "given 3 all-reduce (215 MB)" in plan.unexpected("training", tuple(pieces), 8)
    assert "given 1 all-gather" in plan.unexpected("training", (gather,), 8)
    assert plan.unexpected("sharded", (gather, scatter, reduce), 8) == ""
    assert "given 1 all-reduce" in plan.unexpected("sharded", (reduce,), 8)
    assert plan.unexpected("sharded", (reduce, reduce), 64) == ""
    permute = Collective("collective-permute", 8)
    assert "1 collective-permute" in plan.unexpected("sharded", (gather, scatter, permute), 64)
    assert plan.unexpected("replicas", (gather,), 8) == "expected no collective, given 1 all-gather (8 B)"
    once = Collective("all-reduce", 4)
    assert plan.unexpected("training", (reduce, once), 8) == ""
    assert "given 2 all-reduce" in plan.unexpected("training", (reduce, once._replace(looped=True)), 8)
    within = reduce._replace(group=4)
    assert plan.unexpected("replicas", (within,), 8, 4) == ""
    assert plan.unexpected("training", (within,), 8, 4) == ""
    assert "expected collectives of 4 devices each, given 1 all-reduce (8 B) of others" in (
        plan.unexpected("replicas", (reduce,), 8, 4)
    )


CHIP = plan.Chip(100.0, 1000.0, 10.0, 40.0)


def result(flops=200.0, accessed=10.0, given=(), **rest):
    return Measured(300.0, 200.0, 100.0, flops, accessed, given, 1.0, **rest)


def test_roofline():
    alone = plan.predict(result(), CHIP, 1)
    assert (alone.compute, alone.memory, alone.links, alone.step, alone.bound) == (2.0, 1.0, 0.0, 2.0, "compute")
    many = plan.predict(result(accessed=50.0, given=(Collective("all-reduce", 80, True),)), CHIP, 4)
    assert many.memory == 5.0
    assert many.links == pytest.approx(80 * 2 * 0.75 / 20)  # half of both directions
    assert many.step == pytest.approx(5.0 + 6.0)
    assert many.bound == "links"
    kinds = ("all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    each = [plan.link_seconds((Collective(kind, 80),), 4, CHIP) for kind in kinds]
    assert each == pytest.approx([3.0, 3.0, 3.0, 4.0])
    assert plan.link_seconds((Collective("all-gather", 80, group=2),), 4, CHIP) == pytest.approx(2.0)
    # Gathering and scattering cost what an all-reduce does.
    assert each[0] + each[1] == pytest.approx(plan.link_seconds((Collective("all-reduce", 80),), 4, CHIP))


def test_whole_and_efficiency():
    train = Program("training", "", 64, "points", 1000, lambda mesh, batch: None)
    assert plan.whole(train, result(), CHIP, 1, 64) == pytest.approx(2000.0)
    sample = train._replace(kind="sampling", chunk=8, divides=False)
    given = result(flops=250.0, setup_flops=50.0)
    assert plan.whole(sample, given, CHIP, 2, 64) == pytest.approx(4 * (1000 * 2.0 + 0.5))  # 4 chunks of 16
    assert plan.whole(sample, given, CHIP, 2, 65) == pytest.approx(5 * (1000 * 2.0 + 0.5))
    last = result(given=(Collective("all-gather", 80),))
    assert plan.whole(sample, last, CHIP, 4, 64) == pytest.approx(2 * 1000 * 2.0 + 3.0)  # once, not in each step
    assert plan.efficiency(8.0, 2.0, 4) == 1.0
    assert plan.efficiency(8.0, 4.0, 4) == 0.5


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
    assert plan.quantity(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(2e-6, "2 µs"), (0.25, "250 ms"), (90, "1.5 min"), (172800, "2 d")])
def test_duration(seconds, text):
    assert plan.duration(seconds) == text


def test_reason():
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\nUsed 20.10G of 15.75G hbm. Exceeded hbm capacity"
    assert plan.reason(message) == "out of memory: 20.10GiB of 15.75GiB"
    assert plan.reason("\n first \n second") == "first"
    assert plan.reason("") == "no message"


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
    assert "- a.b sampler on v5e-8, 64 samples: expected no collective, given 1 all-reduce (80 B)" in text
    assert "2 of 5 programs" in text
    assert "Not compiled yet, of a.b: `base` on v5p-128; `sampler` on v5e-1, v5e-256, v5p-128." in text
    rows = [line for line in text.splitlines() if line.startswith(("| base", "| sampler"))]
    assert len(rows) == 5
    assert len({line.count("|") for line in rows}) == 1
    assert "{" not in text


def test_programs_of_every_experiment_are_as_large_as_their_presets():
    with plan.as_on_tpus():
        assert jax.default_backend() == "tpu"
    for experiment in ("genneg.checkerboard", "censoring.mnist"):
        for program in plan.EXPERIMENTS[experiment]().values():
            assert program.batch > 0
            assert program.steps > 0
            assert program.kind in ("training", "sharded", "replicas", "sampling")


def test_without_libtpu_there_is_one_clear_error():
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("libtpu is installed")
    command = [sys.executable, "-m", "tpu.plan", "--experiment", "genneg.checkerboard"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PLAN.parents[1])
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: libtpu: expected TPU's compiler, given none: pip install -e '.[tpu]' (on x86 Linux)"
    ]


@pytest.mark.slow
def test_a_training_compiled_for_tpus():
    pytest.importorskip("libtpu")
    found = plan.measure("genneg.checkerboard", "base", "v5e-8", 1000, 300.0)
    assert isinstance(found, Measured)
    assert [each.kind for each in found.collectives] == ["all-reduce"]
    assert found.memory < 100e6
