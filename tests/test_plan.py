"""plan.py and programs.py: the account of a run agrees with what the run allocates, and says what is wrong."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from xcomp_jax import bench_parts, optim, plan, programs, sharding, steps, weights
from xcomp_jax.config import ConfigError, from_command_line
from xcomp_jax.data.batch import fake_batch


def paper(*extra):
  return from_command_line(["plan", "--config=configs/sct.py", *extra])


SMALL = ("frames", "apply", "prefill", "tower")


@pytest.fixture(scope="module")
def small(tiny_run, tmp_path_factory):
  """A plan of the two-layer test model on the 8 devices that are here, and what was said of its programs."""
  config = tiny_run(tmp_path_factory.mktemp("plan"))
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="einsum"))  # soonest compiled
  made = programs.make(config, None)
  said = []
  return made, plan.run(made, SMALL, said.append), "\n".join(said)


def test_every_program_is_accounted_for_and_said(small):
  _, rows, said = small
  assert [row["name"] for row in rows] == list(SMALL)
  assert all(f"\n{plan.TITLES[name]}" in said for name in SMALL)
  assert "8 x cpu, mesh {'data': 1, 'fsdp': 8" in said and "8 x (16 frames, 80 + 128 text tokens)" in said
  assert "not known: no figures for cpu" in said and "fits" not in said  # nothing is known of a CPU's memory
  assert all(row["memory"]["temporaries"] > 0 and row["hbm"] > 0 and not row["not counted"] for row in rows)
  gradient = rows[0]
  assert gradient["collectives"]["all-gather"][1] > 0 and gradient["collectives"]["all-reduce"][1] > 0


def test_memory_of_the_state_is_what_a_run_allocates(small):
  made, rows, _ = small
  tx = optim.optimizer(made.config.optim, 1000)
  with jax.set_mesh(made.mesh):
    state = steps.init_state(made.config, made.full, tx, made.mesh)
    sums = steps.zero_sums(state.trained, made.mesh)
  here = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
  spec = programs.batch_of(made, made.full, "frames")
  batch = steps.place(fake_batch(spec, made.full.llm.vocab_size), made.mesh)
  memory = next(row for row in rows if row["name"] == "frames")["memory"]
  assert memory["parameters"] == here((state.trained, state.frozen))
  assert memory["optimizer state"] == here(state.opt) and memory["gradients"] == here(sums)
  assert memory["batch"] == 2 * here(batch)  # one is copied while another is computed on


def test_operations_are_those_of_the_step_that_runs(small):
  made, rows, _ = small
  step, arguments = steps.abstract_step(made.config, made.full, programs.batch_of(made, made.full, "frames"))
  row = next(row for row in rows if row["name"] == "frames")
  with programs.inside(made):
    assert row["flops"]["executed"] == bench_parts.flops(step, *arguments)
  assert 0 < row["flops"]["model"] < row["flops"]["executed"]  # padding, masked halves and recomputation


def test_the_state_that_a_program_is_given_has_the_size_that_the_compiler_sees(small):
  made, _, _ = small
  with programs.inside(made):
    traced, memory = programs.traced(made, made.full, "apply")
    compiled = traced.lower().compile()
  assert compiled.memory_analysis().argument_size_in_bytes == sum(memory.values())


def test_fewer_layers_give_state_and_operations_of_all_and_say_that_the_rest_is_extrapolated(tiny_run, tmp_path):
  config = tiny_run(tmp_path, lp_comp={"schedule": (8, 1), "keep": "suffix", "group": 16})
  whole, part = programs.make(config, None), programs.make(config, None, layers=1)
  assert part.cfg.llm.layers == part.cfg.vision.layers == 1 and part.full == whole.full
  a, b = programs.account(whole, "features"), programs.account(part, "features")
  for kind in ("parameters", "optimizer state", "gradients", "batch"):
    assert a["memory"][kind] == b["memory"][kind]
  assert a["flops"] == b["flops"] and (b["layers"], b["of"]) == (1, 2)
  assert b["memory"]["temporaries"] == pytest.approx(a["memory"]["temporaries"], rel=0.5)
  sent = lambda row: sum(size for _, size in row["collectives"].values())
  assert sent(b) == pytest.approx(sent(a), rel=0.5)
  assert "EXTRAPOLATED to 2 layers from 1" in plan.describe(part, b) and "EXTRAPOLATED" not in plan.describe(whole, a)


def test_released_sizes_are_known_without_a_network(monkeypatch):
  monkeypatch.setattr(weights, "resolve", lambda name: pytest.fail(f"asked for {name}"))
  for variant, billions in (("", 1.838), (":7b", 7.923)):  # FACTS.md 11
    cfg = programs.sizes(from_command_line(["plan", f"--config=configs/sct.py{variant}"]))
    numbers = sum(math.prod(e.shape) for e in weights.names(cfg))
    assert round(numbers / 1e9, 3) == billions


def test_the_bucket_that_takes_most_is_planned():
  config = paper()
  mesh = sharding.make_mesh(config.mesh)
  cfg = programs.sizes(config)
  bucket, rows = programs.largest(config, cfg, mesh, None, None)
  assert (bucket.frames, bucket.text, rows) == (1024, 8192, 8)
  # Eight samples of 128 frames have more tokens than one of 1,024 as long as texts are short; --config.train.batch_size
  # of 32 fills four rows of each of the 8 devices.
  bucket, rows = programs.largest(config, cfg, mesh, None, 512)
  assert (bucket.frames, rows) == (256, 32)
  assert programs.largest(config, cfg, mesh, 4096, 512)[0].frames == 4096


@pytest.mark.parametrize("replicated, axes", [("llm/embed/embedding", r"embed/embedding"), ("down/kernel", r"(down|fc2)/kernel")])
def test_a_large_array_that_is_not_split_is_refused(monkeypatch, replicated, axes):
  made = programs.make(paper("--config.mesh.tensor=2"), None)
  rules = tuple((pattern, () if pattern == axes else split) for pattern, split in sharding.PARAMETERS)
  assert rules != sharding.PARAMETERS
  monkeypatch.setattr(sharding, "PARAMETERS", rules)
  monkeypatch.setattr(programs, "account", lambda *_: pytest.fail("compiled before it was refused"))
  with pytest.raises(plan.PlanError, match=rf"{replicated} \[\d+, 1536\] takes .* on every device, and would take .* if fsdp = 4 split it"):
    plan.run(made, ("features",))


def test_an_axis_left_out_of_a_rule_is_refused_too_and_nothing_else(monkeypatch):
  made = programs.make(paper("--config.mesh.tensor=2"), None)
  fine = programs.training(made, made.full)
  assert plan.unsplit(fine[2], made.mesh) == plan.unsplit(fine[3], made.mesh) == []
  rules = tuple((p, ("embed",) if p == "embed/embedding" else axes) for p, axes in sharding.PARAMETERS)
  monkeypatch.setattr(sharding, "PARAMETERS", rules)
  words = plan.unsplit(programs.training(made, made.full)[2], made.mesh)
  assert len(words) == 3 and all("llm/embed/embedding" in w and "tensor = 2" in w for w in words)  # and both moments


def test_what_does_not_fit_is_refused_with_remedies_in_numbers(small, tiny_run, tmp_path):
  made, rows, _ = small
  config = tiny_run(tmp_path, mesh={"data": 8, "fsdp": 1, "tensor": 1, "context": 1})
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=False))
  row = next(row for row in rows if row["name"] == "frames")
  size = plan.needed(row, rows)
  tight = dataclasses.replace(made, config=config, mesh=sharding.make_mesh(config.mesh), device=dataclasses.replace(made.device, hbm=size - 1e4))
  (words,) = plan.problems(tight, [row])[:1]
  assert f"does not fit: needs {plan._size(plan.needed(row))} per device, cpu has" in words
  for remedy in ("mesh.fsdp=-1", "remat=True", "frames, by predecode", "param_dtype=bfloat16", "features instead of frames", "16 devices"):
    assert remedy in words, remedy
  assert words.count("fits") + words.count("not enough alone") >= 6 and ": nan" not in words
  assert plan.problems(dataclasses.replace(tight, device=dataclasses.replace(made.device, hbm=size + 1)), [row]) == []


def test_a_program_that_the_compiler_refuses_is_accounted_for(small, monkeypatch):
  made, _, _ = small
  refusal = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.50G) exceeds available HBM (1.75G)."
  )
  monkeypatch.setattr(programs, "compiled", lambda lowered, what, effort: (refusal, 1.0))
  row = programs.account(made, "features")
  assert row["memory"]["temporaries"] == pytest.approx(2.5 * 2**30, rel=1e-3) and "exceeds available HBM" in plan.describe(made, row)
  assert "does not fit" in plan.problems(made, [row])[0]


def test_the_command_ends_with_1_and_one_error_if_something_is_wrong(monkeypatch, capsys):
  monkeypatch.setattr(sharding, "PARAMETERS", tuple((p, () if "embedding" in p else a) for p, a in sharding.PARAMETERS))
  with pytest.raises(SystemExit) as ended:
    plan.main(["--config=configs/sct.py", "--programs", "features"])
  assert ended.value.code == 1 and "error: trained/llm/embed/embedding" in capsys.readouterr().err


@pytest.mark.parametrize(
  "argv, words",
  [
    (["--config=configs/sct.py", "--layers", "99"], "--layers 99: the model has 28"),
    (["--config=configs/sct.py", "--frames", "12"], "--frames 12: must be 1, or a multiple of the 8"),
    (["--config=configs/sct.py", "--config.mesh.tensor=3"], "does not divide the 8 devices"),
    (["--config=configs/sct.py", "--config.model.remta=True"], "did you mean config.model.remat"),
    (["--config=configs/sct.py", "--topolgy=v5e:4x4"], "topolgy"),
    (["--table", "nowhere", "--config=configs/sct.py"], "--table has cells of its own, so it takes no --config"),
  ],
)
def test_errors_are_one_line(argv, words, capsys):
  with pytest.raises(SystemExit) as ended:
    plan.main(argv)
  err = capsys.readouterr().err
  assert ended.value.code == 1 and words in err.splitlines()[-1]


def test_a_topology_without_the_compiler_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
  with pytest.raises(ConfigError, match=r"pip install 'xcomp_jax\[plan\]'"):
    programs.topology("v5e:2x2")


def test_a_table_keeps_every_finished_cell_and_goes_on_where_it_was(small, monkeypatch, tmp_path):
  made, rows, _ = small
  device = dataclasses.replace(made.device, hbm=1e9, flops=1e12, bandwidth=1e11, links=1e10)
  by_name = {row["name"]: row | {"seconds": {"compute": 2.0, "memory": 1.0}} for row in rows}
  asked = []

  def account(planned, name, known):
    if known:
      return known
    asked.append(name)
    if len(asked) == 3:
      raise KeyboardInterrupt
    return by_name[name]

  monkeypatch.setattr(plan, "CELLS", (("", "v5e:2x2", 8, "frames", ()), ("7b", "v5e:2x2", 8, "frames", ())))
  monkeypatch.setattr(programs, "make", lambda *_, **__: dataclasses.replace(made, device=device))
  monkeypatch.setattr(programs, "account", account)
  with pytest.raises(KeyboardInterrupt):
    plan.table(tmp_path, None, 0.0, lambda _: None)
  made_first = plan.table(tmp_path, None, 0.0, lambda _: None)
  assert asked == ["frames", "apply", "frames", "frames", "apply"]  # the first cell was not compiled again
  assert plan.table(tmp_path, None, 0.0, lambda _: None) == made_first and len(asked) == 5
  lines = made_first.splitlines()
  assert len(lines) == 4 and lines[2].startswith("| 2B | v5e:2x2 | 8 | frames |") and "| 2.00 s | compute |" in lines[2]
  file = next(tmp_path.glob("2B*.json"))
  kept = json.loads(file.read_text())
  kept["asked"]["jax"] = "0.0.1"  # made by another version: again
  file.write_text(json.dumps(kept))
  plan.table(tmp_path, None, 0.0, lambda _: None)
  assert asked[5:] == ["frames", "apply"]
  assert "--quick" not in made_first and "--quick" in plan.table(tmp_path, None, -1.0, lambda _: None)
  assert asked[7:] == 2 * ["frames", "apply"]  # with another effort: again


def test_a_program_that_changed_is_compiled_again(small, monkeypatch):
  made, rows, _ = small
  known = next(row for row in rows if row["name"] == "apply")
  monkeypatch.setattr(programs, "compiled", lambda lowered, what, effort: pytest.fail("compiled"))
  assert programs.account(made, "apply", known) == known
  slower = dataclasses.replace(made.config, optim=dataclasses.replace(made.config.optim, b1=0.5))
  with pytest.raises(pytest.fail.Exception, match="compiled"):
    programs.account(dataclasses.replace(made, config=slower), "apply", known)


def test_a_checkpoint_directory_is_taken_before_what_is_known(tiny_run, tmp_path):
  config = tiny_run(tmp_path)
  assert programs.sizes(config).llm.width == 32
  with pytest.raises(weights.CheckpointError, match="no directory"):
    programs.sizes(dataclasses.replace(config, init_from="./nowhere"))


def test_kinds_of_arrays_have_their_bytes(small):
  made, _, _ = small
  at = sharding.batch_sharding(made.mesh)
  assert programs.held([jax.ShapeDtypeStruct((16, 3), np.dtype(np.int32), sharding=at)]) == 2 * 3 * 4
