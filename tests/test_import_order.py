"""Each room imports only rooms above it, and the model only jax, flax, numpy and jaxtyping."""

import ast
import pathlib
import sys

import pytest

import xcomp_jax

ROOT = pathlib.Path(xcomp_jax.__file__).parent
ORDER = """
chips files inputs config progress sharding hosts workdir
data.batch data.container data.video data.prompt data.store data.mixture data.processes data.spools data.shards data.check data.blend data.packing data.pipeline
model.kernels model.attention model.norm model.rope model.vision model.internvideo2 model.merge model.lp_comp model.decoder model.vlm
inside qc_comp encode generate chat rounds report official layouts config_json weights reader answers tasks optim checkpoint metrics cost forecast plan_table
steps absent programs accounts fits train predecode ask evaluate lmms_tasks lmms_plugin export comparison parity_tower parity_frames parity world films findings needles plan
bench_load bench_data bench_parts bench_profile bench bench_scaling bench_qc bench_evaluate gpu_check miniature measures study demo draw
""".split()  # noqa: E501
FILES = {
  ".".join(f.relative_to(ROOT).with_suffix("").parts): f
  for f in ROOT.rglob("*.py")
  if f.name != "__init__.py"
}


def imported(file, everywhere):
  """Modules that a file imports: all, or only those outside functions."""
  tree = ast.parse(file.read_text())
  inner = {
    n
    for f in ast.walk(tree)
    if isinstance(f, (ast.FunctionDef, ast.Lambda))
    for n in ast.walk(f)
    if n is not f
  }
  for node in ast.walk(tree):
    if everywhere or node not in inner:
      if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
      elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{name.name}" for name in node.names)


def test_every_file_has_its_place():
  assert sorted(FILES) == sorted(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_upwards(name):
  above = ORDER[: ORDER.index(name)]
  for module in imported(FILES[name], everywhere=True):
    if module.startswith("xcomp_jax."):
      inside = module.removeprefix("xcomp_jax.")
      assert any(inside == a or inside.startswith(f"{a}.") for a in above), (
        f"{name} imports {module}, which is not above it"
      )


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("model.")])
def test_the_model_needs_only_jax_flax_and_numpy(name):
  allowed = {"jax", "flax", "numpy", "jaxtyping", "xcomp_jax", *sys.stdlib_module_names}
  assert {m.split(".")[0] for m in imported(FILES[name], everywhere=False)} <= allowed
