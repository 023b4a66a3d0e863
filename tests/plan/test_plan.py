"""plan.py and programs.py: the account of a run agrees with what the run allocates, and says what
is wrong.
"""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from gradient import abstract_step
from jax.sharding import NamedSharding, PartitionSpec
from lengths import mixture

from xcomp_jax.bench import parts
from xcomp_jax.checkpoints import tensor_names
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.config import ConfigError
from xcomp_jax.config_io import from_command_line
from xcomp_jax.data import blend
from xcomp_jax.data.batch import Length, Shape, fake_batch
from xcomp_jax.parallel.mesh import batch_sharding, make_mesh, path_name
from xcomp_jax.plan import accounts, describe, plan, programs
from xcomp_jax.training import costs, forecast, optim, prepare, steps


def paper(*extra):
  return from_command_line(["plan", "--config=configs/sct.py", *extra])


@pytest.fixture(scope="module")
def small(tiny_run, tmp_path_factory):
  """Gives a plan of the two-layer test model on the 8 devices that are here, and what was said of
  its programs.
  """
  config = tiny_run(tmp_path_factory.mktemp("plan"))
  # soonest compiled
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="einsum"))
  made = programs.make(config, None)
  said = []
  return made, plan.account_programs(made, programs.NAMES, said.append), "\n".join(said)


def accounted(name, shape, **values):
  """An account in which all that is not given is nothing."""
  nothing = {
    "layers": 2,
    "of": 2,
    "memory": {},
    "model": 0.0,
    "executed": 0.0,
    "in_kernels": 0.0,
    "not_counted": [],
    "kernels": {},
    "hbm": 0.0,
    "collectives": {},
    "problem": None,
    "compile_s": 9.0,
  }
  return accounts.ProgramAccount(name=name, shape=shape, **(nothing | values))


def row_of(rows, name):
  return next(row for row in rows if row.name == name)


def here(tree):
  """Bytes of arrays on one device."""
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_every_program_is_accounted_for_and_said(small):
  _, rows, said = small
  assert [row.name for row in rows] == list(programs.NAMES)
  assert all(f"\n{describe.TITLES[name]}" in said for name in programs.NAMES)
  assert (
    "8 x cpu, mesh {'data': 1, 'fsdp': 8" in said
    and "8 rows of up to 2 samples, 16 frames, 160 tokens" in said
  )
  assert "tower with merging, 2 clips of 4 frames a device" in said
  # nothing is known of a CPU's memory
  assert "not known: no figures for cpu" in said and "fits" not in said
  assert all(row.memory["temporaries"] > 0 and row.hbm > 0 and not row.not_counted for row in rows)
  sent = row_of(rows, "gradient").collectives
  assert sent["all-gather"][1] > 0 and sent["all-reduce"][1] > 0
  assert row_of(rows, "tower").collectives == {}  # no device waits for another


def test_memory_is_what_a_run_allocates(small):
  made, rows, _ = small
  tx = optim.optimizer(made.config.optim, 1000)
  with jax.set_mesh(made.mesh):
    _, wanted = steps.abstract_state(made.config, made.full, tx, made.mesh)
    state = steps.init_state(made.config, made.full, tx, wanted)
    sums = steps.zero_sums(state.trained, made.mesh)
    functions = steps.compiled_steps(made.full, state, sums, made.mesh)
    tower = functions.tower(state)
    clips = steps.place_clips(np.zeros((8 * 2, 4, 48, 48, 3), np.uint8), made.mesh)
  spec = programs.batch_of(made, made.full, made.shapes[0])
  batch = steps.place_rows(fake_batch(spec, made.full.llm.vocab_size), made.mesh)
  memory = row_of(rows, "gradient").memory
  assert memory["parameters"] == here((state.trained, state.frozen))
  assert memory["optimizer state"] == here(state.opt) and memory["gradients"] == here(sums)
  # one is copied while another is computed on
  assert memory["batch"] == memory["other batches"] == here(batch)
  during = row_of(rows, "tower").memory
  assert {
    kind: during[kind] for kind in ("parameters", "optimizer state", "gradients")
  }.items() <= memory.items()
  assert during["tower"] == here(tower) and during["clips"] == during["next clips"] == here(clips)
  assert during["features"] == here(batch.visual)  # of the one micro-batch of a step


def test_features_of_a_whole_step_wait_for_their_micro_batches(small):
  made, _, _ = small
  longer = dataclasses.replace(made, steps=[*made.steps, made.steps[0] * 3])
  assert programs.waiting(longer, made.full) == 3 * programs.waiting(made, made.full)
  _, _, beside = programs.trace_program(longer, made.full, "gradient", made.shapes[0])
  assert beside["other batches"] == programs.waiting(longer, made.full)


def test_operations_are_those_of_the_step_that_runs(small):
  made, rows, _ = small
  step, arguments = abstract_step(
    made.config, made.full, programs.batch_of(made, made.full, made.shapes[0])
  )
  row = row_of(rows, "gradient")
  with programs.inside(made):
    assert row.executed == parts.flops(step, *arguments)
  assert 0 < row.model < row.executed  # masked halves and recomputation


@pytest.mark.parametrize("name", ["apply", "tower"])
def test_what_a_program_is_given_has_the_size_that_the_compiler_sees(small, name):
  made, _, _ = small
  with programs.inside(made):
    traced, given, _ = programs.trace_program(made, made.full, name, None)
    compiled = traced.lower().compile()
  assert compiled.memory_analysis().argument_size_in_bytes == sum(given.values())


def test_a_tower_that_is_trained_is_a_part_of_the_gradient(tiny_run, tmp_path):
  made = programs.make(tiny_run(tmp_path, train={"vision": True}), None)
  with programs.inside(made):
    program, given, beside = programs.trace_program(made, made.full, "gradient", made.shapes[0])
    frozen = programs.trace_program(
      programs.make(tiny_run(tmp_path), None), made.full, "gradient", made.shapes[0]
    )
    computed = accounts.executed_flops(made.full, program.jaxpr).total
  # clips of a row, and their places
  assert given["batch"] - frozen[1]["batch"] == 4 * (4 * 48 * 48 * 3 + 4)
  assert computed > accounts.executed_flops(made.full, frozen[0].jaxpr).total
  assert programs.waiting(made, made.full) == 0 and beside["other batches"] == given["batch"]


def test_fewer_layers_give_state_and_operations_of_all_and_say_that_the_rest_is_extrapolated(
  tiny_run, tmp_path
):
  config = tiny_run(tmp_path, lp_comp={"schedule": (8, 1), "keep": "suffix", "group": 16})
  whole, part = programs.make(config, None), programs.make(config, None, layers=1)
  assert part.layers == 1 and part.full == whole.full
  a, b = (accounts.account_program(made, "gradient", made.shapes[0]) for made in (whole, part))
  for kind in ("parameters", "optimizer state", "gradients", "batch", "other batches"):
    assert a.memory[kind] == b.memory[kind]
  assert (a.model, a.executed, a.in_kernels) == (b.model, b.executed, b.in_kernels)
  assert (b.layers, b.of) == (1, 2)
  assert b.memory["temporaries"] == pytest.approx(a.memory["temporaries"], rel=0.5)
  sent = [sum(size for _, size in row.collectives.values()) for row in (a, b)]
  assert sent[1] == pytest.approx(sent[0], rel=0.5)
  assert "EXTRAPOLATED to 2 layers from 1" in describe.describe_program(part, b)
  assert "EXTRAPOLATED" not in describe.describe_program(whole, a)


def test_released_sizes_are_known_without_a_network():
  def resolve(name):
    pytest.fail(f"asked for {name}")

  for variant, billions in (("", 1.838), (":7b", 7.923)):  # FACTS.md 11
    config = from_command_line(["plan", f"--config=configs/sct.py{variant}"])
    cfg = programs.model_sizes(config, resolve=resolve)
    numbers = sum(math.prod(e.shape) for e in tensor_names.names(cfg))
    assert round(numbers / 1e9, 3) == billions


def test_without_data_a_sample_fills_a_row_of_every_row_group():
  made = programs.make(paper(), None)
  assert dict(made.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
  assert made.shapes == (Shape(rows=8, samples=1, prefix=16, frames=1024, text=512),) and [
    len(step) for step in made.steps
  ] == [4]
  made = programs.make(paper("--config.mesh.context=2"), None, frames=4096, text=600)
  assert made.mesh.shape["fsdp"] == 4 and made.shapes == (
    Shape(rows=4, samples=1, prefix=16, frames=4096, text=600),
  )
  made = programs.make(paper("--config.data.shapes=((8,4,1024,512),(16,1,8,256))"), None)
  assert made.shapes == (
    Shape(rows=8, samples=4, prefix=16, frames=1024, text=512),
    Shape(rows=16, samples=1, prefix=16, frames=8, text=256),
  )
  assert programs.asked_programs(made, ("gradient", "apply", "prefill")) == [
    *(("gradient", shape) for shape in made.shapes),
    ("apply", None),
    ("prefill", Shape(rows=8, samples=1, prefix=16, frames=1024, text=512)),
  ]


def test_lengths_choose_mesh_and_shapes():
  config, lengths = paper("--config.mesh.fsdp=4"), mixture(200)
  made = programs.make(config, None, lengths=lengths)
  chosen = forecast.schedule_run(config, made.full, lengths, jax.devices())
  assert made.shapes == chosen.shapes and tuple(made.mesh.shape.values()) == chosen.mesh == (
    1,
    4,
    1,
    2,
  )
  assert sorted(
    i for step in made.steps for micro in step for row in micro.rows for i in row
  ) == sorted(i for step in blend.order(range(200), 32, config.seed, 0) for i in step)
  with pytest.raises(ConfigError, match="an epoch reads only 20 samples"):
    programs.make(config, None, lengths=lengths[:20])


def test_seconds_of_a_step_are_those_of_its_programs():
  config = paper("--config.train.batch_size=6", "--config.model.clips_per_chunk=4")
  lengths = np.array([[1024, 8, 14, 500], [64, 8, 14, 100], [1, 1, 14, 50]] * 2)
  shape = Shape(rows=2, samples=4, prefix=16, frames=1024, text=1024)
  named = dataclasses.replace(
    config, data=dataclasses.replace(config.data, shapes=((2, 4, 1024, 1024),))
  )
  chips = forecast.chips("v5e", 2)
  made = programs.make(named, jax.devices()[:2], lengths=lengths, like=chips)
  assert (
    dict(made.mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1, "context": 1}
    and len(made.steps[0]) == 2
  )
  # half a second on each of two devices, if a sample fills each row
  kernels = 0.5 * 2 * 197e12
  gradient = accounted(
    "gradient", shape, seconds={"compute": 2.0, "memory": 0.3}, in_kernels=kernels
  )
  apply = accounted("apply", None, seconds={"compute": 0.1, "memory": 0.3})
  tower = accounted("tower", None, seconds={"compute": 0.8, "memory": 0.3}, memory={"tower": 0.0})
  rows = [gradient, apply, tower]
  words = "\n".join(describe.step_lines(made, rows))
  assert "not counted" not in words
  some = [dataclasses.replace(row, not_counted=["attention in kernels"]) for row in rows]
  assert "not counted in these seconds: attention in kernels;" in "\n".join(
    describe.step_lines(made, some)
  )
  attention = (
    sum(max(made.costs.attention[list(row)].sum() for row in micro.rows) for micro in made.steps[0])
    / costs.PICO
  )
  found = re.search(
    r"2.00 x 2 rows of .*on features at least ([\d.]+) s.*on frames at least ([\d.]+) s",
    words,
    re.S,
  )
  features, frames = map(float, found.groups())
  assert features == pytest.approx(2 * (2.0 - 0.5) + attention + 0.3, abs=2e-3)
  # 272 clips are 136 of a device, 34 calls of four; two images are one, for a device, and take a
  # ninth of a clip or less.
  assert frames - features == pytest.approx(34 * 0.8, rel=0.02) and "35.0 calls" in words
  assert words.endswith("compiled in 27 s in all")
  assert describe.step_lines(made, rows[1:]) == []


def replicated_where(state, mesh, pattern):
  """The state with arrays whose names match on every device."""

  def one(path, leaf):
    found = re.search(pattern, path_name(path))
    at = NamedSharding(mesh, PartitionSpec()) if found else leaf.sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

  return jax.tree_util.tree_map_with_path(one, state)


@pytest.mark.parametrize("pattern", ["llm/embed/embedding$", "llm/layers/0/down/kernel$"])
def test_a_large_array_that_is_not_split_is_named_and_nothing_else(pattern):
  made = programs.make(paper("--config.mesh.tensor=2"), None)
  _, _, state, sums = programs.abstract_training(made, made.full)
  assert plan.unsplit(state, made.mesh) == plan.unsplit(sums, made.mesh) == {}
  found = plan.unsplit(replicated_where(state, made.mesh, pattern), made.mesh)
  # and both moments
  assert len(found) == 3 and all(re.search(pattern, name) for name in found)
  for name, words in found.items():
    assert re.match(
      rf"{name} \[\d+, 1536\] takes .* on every device, and would take .* if fsdp = 4 split it",
      words,
    )


def test_an_axis_left_out_of_a_rule_is_named():
  made = programs.make(paper("--config.mesh.tensor=2"), None)
  at = NamedSharding(made.mesh, PartitionSpec("fsdp"))
  large = jax.ShapeDtypeStruct((4096, 4096), np.dtype(np.float32), sharding=at)
  found = plan.unsplit({"kernel": large}, made.mesh)
  assert list(found) == ["kernel"] and "if tensor = 2 split it" in found["kernel"]
  small = jax.ShapeDtypeStruct((1024, 1024), np.dtype(np.float32), sharding=at)
  assert plan.unsplit({"kernel": small}, made.mesh) == {}  # 1 MiB on a device
  odd = jax.ShapeDtypeStruct((4100, 4097), np.dtype(np.float32), sharding=at)
  assert plan.unsplit({"kernel": odd}, made.mesh) == {}  # 1,025 rows on a device


def test_a_mesh_that_splits_too_little_is_refused_before_anything_is_compiled():
  made = programs.make(paper("--config.mesh.context=1"), jax.devices()[:6])
  with pytest.raises(plan.PlanError) as caught:
    plan.account_programs(
      made,
      ("gradient",),
      say=lambda text: None,
      account=lambda *_: pytest.fail("compiled before it was refused"),
    )
  where = caught.value.fields["where"]
  assert where[0] == "trained/projector/fc1/kernel" and "grads/projector/fc1/kernel" in where
  words = str(caught.value)
  assert words.count("split it; give it a rule") == plan.SHOWN
  assert isinstance(caught.value, ValueError)  # so the command ends with it in one line
  assert f"; and {len(where) - plan.SHOWN} more. fsdp = 6 can't split most arrays" in words


def test_what_does_not_fit_is_refused_with_remedies_in_numbers(small, tiny_run, tmp_path):
  made, rows, _ = small
  config = tiny_run(tmp_path, mesh={"data": 8, "fsdp": 1, "tensor": 1, "context": 1})
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=False))
  sizes = {row.name: describe.bytes_needed(row, rows) for row in rows}
  assert sizes["gradient"] == sum(row_of(rows, "gradient").memory.values()) + sum(
    row_of(rows, name).memory["program"] for name in ("tower", "apply", "evaluation")
  )

  def words(name, size, like=made.device, **changes):
    device = dataclasses.replace(like, hbm=size)
    mesh = make_mesh(config.mesh)
    given = dataclasses.replace(made, config=config, mesh=mesh, device=device, **changes)
    found = describe.problems(given, [row_of(rows, name)])
    assert all(whose == name for whose, _ in found)
    return [words for _, words in found]

  row = row_of(rows, "gradient")
  size = describe.bytes_needed(row)
  (found,) = words("gradient", size - 1e4)
  assert (
    f"gradient step does not fit: needs {describe.size_text(size)} per device, cpu has" in found
  )
  for remedy in (
    "mesh.fsdp=-1",
    "remat=True",
    "at most 8 frames, by predecode",
    "param_dtype=bfloat16",
    "16 devices",
  ):
    assert remedy in found, remedy
  assert found.count("fits") + found.count("not enough alone") == 5
  (found,) = words("gradient", size - 1e4, lengths=[Length(8, 4, 14, 9)])
  assert "--config.data.frames_per_device=8, or such config.data.shapes" in found
  (found,) = words("tower", 1e4)
  assert "--config.model.clips_per_chunk=1" in found and "predecode --features" in found
  assert words("gradient", size + 1) == []
  (found,) = words("prefill", 1e4)
  assert (
    "--select 8, which keeps half of these frames" in found and "devices of this kind" not in found
  )
  assert "--clips-per-chunk 1 (estimated)" in words("encode", 1e4)[0]
  (found,) = words(
    "prefill",
    1e4,
    dataclasses.replace(made.device, kind="NVIDIA H100 80GB HBM3", reserve=0.25 * size),
  )
  assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9, of which JAX takes 0.75" in found


def test_a_program_that_the_compiler_refuses_is_accounted_for(small):
  made, _, _ = small
  refusal = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(2.50G) exceeds available HBM (1.75G)."
  )
  for name, shape in programs.asked_programs(made, ("gradient", "tower")):
    row = accounts.account_program(made, name, shape, lambda *_: (refusal, 1.0))
    assert row.memory["temporaries"] == pytest.approx(2.5 * 2**30, rel=1e-3)
    assert "exceeds available HBM" in describe.describe_program(made, row)
    ((whose, words),) = describe.problems(made, [row])
    assert whose == name and "does not fit" in words


@pytest.mark.parametrize(
  "argv, words",
  [
    (["--config=configs/sct.py", "--layers", "99"], "--layers 99: the model has 28"),
    (
      ["--config=configs/sct.py", "--frames", "12"],
      "--frames 12: must be 1, or a multiple of the 8",
    ),
    (["--config=configs/sct.py", "--config.mesh.tensor=3"], "does not divide the 8 devices"),
    (
      ["--config=configs/sct.py", "--config.model.remta=True"],
      "did you mean config.model.remat",
    ),
    (["--config=configs/sct.py", "--topolgy=v5e:4x4"], "topolgy"),
    (
      ["--config=configs/sct.py", "--frames", "8", "--lengths", "x"],
      "so there can be no --lengths or --data",
    ),
    (
      ["--config=configs/sct.py", "--topology=v5e:2x2", "--lengths", "none.json"],
      "No such file or directory: 'none.json'",
    ),
    (["--config=configs/sct.py", "--data", "none"], "none"),
  ],
)
def test_errors_are_one_line(argv, words, capsys):
  with pytest.raises(SystemExit) as ended:
    plan.main(argv)
  err = capsys.readouterr().err
  assert ended.value.code == 1 and words in err.splitlines()[-1]


@pytest.mark.pure
def test_a_topology_without_the_compiler_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
  with pytest.raises(ConfigError) as caught:
    programs.topology("v5e:2x2")
  assert caught.value.fields["missing"] == "xcomp_jax[plan]"


def test_a_store_is_measured_as_training_measures_it(tiny_run, tmp_path):
  config = tiny_run(tmp_path)
  prepared = prepare.prepare_run(config, jax.devices())
  prepared.data.close()
  assert plan.stored_lengths(config, prepared.cfg, config.data.train) == [
    tuple(n) for n in prepared.lengths.tolist()
  ]


def test_a_checkpoint_directory_is_taken_before_what_is_known(tiny_run, tmp_path):
  config = tiny_run(tmp_path)
  assert programs.model_sizes(config).llm.width == 32
  with pytest.raises(CheckpointError, match="no directory"):
    programs.model_sizes(dataclasses.replace(config, init_from="./nowhere"))


def test_kinds_of_arrays_have_their_bytes(small):
  made, _, _ = small
  at = batch_sharding(made.mesh)
  assert (
    programs.bytes_held([jax.ShapeDtypeStruct((16, 3), np.dtype(np.int32), sharding=at)])
    == 2 * 3 * 4
  )


@pytest.mark.pure
def test_so_many_devices_are_named_as_are_enough():
  """Of 55 GB 50 are shared by four devices: on sixteen 5 + 50 / 4 = 17.5; on any number more than
  5.
  """
  assert (
    describe.enough(55, 50, 4, 24) == (16, 17.5)
    and describe.enough(55, 50, 4, 30) == (8, 30)
    and describe.enough(55, 50, 4, 5.1) == (8, 30)
  )
