"""The export command: from a run's workdir and from a plain checkpoint, in both layouts."""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints as w
from flax import nnx
from safetensors.numpy import load_file

from xcomp_jax import export
from xcomp_jax.checkpoints import loading, saving
from xcomp_jax.checkpoints.config_json import yarn_of
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.checkpoints.tuned import read_tuned
from xcomp_jax.config import ConfigError, RunConfig
from xcomp_jax.config_io import from_dict, to_dict
from xcomp_jax.data import pipeline
from xcomp_jax.inference.prepared import prepare_model
from xcomp_jax.inference.settings import AskSettings
from xcomp_jax.model import kernels
from xcomp_jax.training import checkpoint, prepare, steps

TRAINED = ("llm/", "projector/")
ASSETS = pathlib.Path(__file__).parents[2] / "assets" / "tiny"


@pytest.fixture
def base(reference, tmp_path) -> pathlib.Path:
  """A checkpoint to start from; its tower is float32, which bfloat16 can't hold."""
  return w.tiny(tmp_path / "base", w.tiny_tensors(reference))


@pytest.fixture
def run(base, tmp_path) -> pathlib.Path:
  """A workdir with checkpoints of steps 1 and 2; each step adds 1 to every trained parameter."""
  config = from_dict(
    RunConfig,
    {
      "seed": 0,
      "workdir": str(tmp_path / "run"),
      "init_from": str(base),
      "compilation_cache": None,
      "model": w.MODEL.__dict__,
      "lp_comp": {"schedule": [16, 4], "keep": "suffix", "group": 16},
      "data": {
        "train": "data",
        "weights": None,
        "heldout": None,
        "shapes": None,
        "prefix_length": 16,
        "frames_per_device": 8,
        "text_per_device": 64,
        "mask": "official",
        "threads": 1,
        "prefetch": 1,
      },
      "optim": {
        "learning_rate": 1e-5,
        "warmup": 0.03,
        "weight_decay": 0,
        "clip_norm": 1,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
      },
      "train": {
        "batch_size": 1,
        "epochs": 1,
        "steps": None,
        "vision": False,
        "projector": True,
        "llm": True,
        "projector_max_frames": None,
        "log_every": 1,
        "eval_every": 1,
        "save_every": 1,
        "keep_last": 2,
        "keep_every": None,
      },
      "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "context": 1},
      "distributed": {
        "coordinator": None,
        "processes": None,
        "process": None,
        "start_seconds": 60,
        "heartbeat_seconds": 100,
      },
    },
  )
  cfg = read_vlm_config(base, config.model, config.lp_comp)

  def is_trained(path):
    return path.startswith(TRAINED)

  def dtype(path):
    return config.model.param_dtype if is_trained(path) else config.model.dtype

  state = nnx.state(loading.load_model(base, cfg, dtype=dtype))
  data = pipeline.BatchReader([0], lambda _: None)
  manager = checkpoint.manager(config.workdir, config.train)
  for step in (1, 2):

    def add(path, x):
      return x + 1 if is_trained(checkpoint.path_name(path)) else x

    state = jax.tree_util.tree_map_with_path(add, state)
    checkpoint.save_checkpoint(
      manager,
      step,
      steps.TrainState(state, {}, {"count": np.int32(step)}),
      data,
      {"run": to_dict(config), "vlm": to_dict(cfg)},
    )
  manager.close()
  return tmp_path / "run"


def expected(base: pathlib.Path, steps: int) -> dict[str, np.ndarray]:
  """The base's tensors after that many steps of `run`."""
  tensors = load_file(base / "model.safetensors")
  for _ in range(steps):
    tensors = {
      name: t if "vision_tower" in name else t + np.float32(1) for name, t in tensors.items()
    }
  return tensors


def test_run_to_torch_keeps_what_was_not_trained_bit_by_bit(base, run, tmp_path, capsys):
  export.main(["--checkpoint", str(run), "--format=torch", "--out", str(tmp_path / "out")])
  assert "60 tensors" in capsys.readouterr().out
  w.equal(load_file(tmp_path / "out" / "model.safetensors"), expected(base, 2))
  assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_local_num_frames"] == 8
  assert read_tuned(tmp_path / "out").lp_comp.schedule == (16, 4)
  assert (tmp_path / "out" / "vocab.json").exists()
  export.main(
    ["--checkpoint", str(run), "--format=torch", "--out", str(tmp_path / "one"), "--step=1"]
  )
  w.equal(load_file(tmp_path / "one" / "model.safetensors"), expected(base, 1))


def rewrite_description(run: pathlib.Path, change) -> None:
  """Changes what the last checkpoint of a run says of its config: `change` gets that."""
  file = run / "checkpoints" / "2" / "config" / "metadata"
  saved = json.loads(file.read_text())
  change(saved)
  file.write_text(json.dumps(saved))


def test_run_of_another_version_of_the_config(base, run, tmp_path):
  def change(saved):
    saved["run"] |= {"optim": {}, "new": 1}
    saved["vlm"] |= {"new": 1}

  rewrite_description(run, change)
  export.main(["--checkpoint", str(run), "--format=torch", "--out", str(tmp_path / "out")])
  w.equal(load_file(tmp_path / "out" / "model.safetensors"), expected(base, 2))


def test_run_with_stretched_positions_says_so_in_config_json(base, run, tmp_path):
  yarn = yarn_of(4.0, 32768)

  def change(saved):
    assert saved["vlm"]["llm"]["rope_scaling"] is None
    saved["vlm"]["llm"] = {"rope_scaling": to_dict(yarn)}

  rewrite_description(run, change)
  export.main(["--checkpoint", str(run), "--format=torch", "--out", str(tmp_path / "out")])
  assert w.read_config(tmp_path / "out").llm.rope_scaling == yarn
  assert w.read_config(base).llm.rope_scaling is None


def test_run_to_orbax_to_torch(base, run, tmp_path):
  export.main(["--checkpoint", str(run), "--format=orbax", "--out", str(tmp_path / "orbax")])
  assert not list((tmp_path / "orbax").glob("*.safetensors"))
  export.main(
    ["--checkpoint", str(tmp_path / "orbax"), "--format=torch", "--out", str(tmp_path / "torch")]
  )
  w.equal(load_file(tmp_path / "torch" / "model.safetensors"), expected(base, 2))
  assert read_tuned(tmp_path / "torch").lp_comp.schedule == (16, 4)


def test_what_a_run_was_tuned_with_travels_and_auto_obeys_it(base, run, tmp_path, caplog):
  export.main(["--checkpoint", str(run), "--format=orbax", "--out", str(tmp_path / "orbax")])
  config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 4096}
  (tmp_path / "orbax" / "config.json").write_text(
    json.dumps(config | {"tokenizer_model_max_length": 512})
  )
  said = json.loads((tmp_path / "orbax" / "xcomp.json").read_text())

  assert said == {
    "version": 1,
    "lp_comp": {"schedule": [16, 4], "keep": "suffix", "group": 16},
    "clip_frames": 8,
    "image_size": 64,
    "dtype": "bfloat16",
    "context": None,
  }

  def auto(**more):
    return w.read_config(tmp_path / "orbax", **{"clip_frames": "auto"} | more)

  assert (
    auto().clip_frames == 8
    and auto(clip_frames="checkpoint").clip_frames == 4
    and auto().llm.context == 512
  )
  (tmp_path / "orbax" / "xcomp.json").write_text(
    json.dumps(said | {"clip_frames": 2, "context": 1024, "dtype": "float32"})
  )
  assert auto().clip_frames == 2 and auto().llm.context == 1024
  export.main(
    ["--checkpoint", str(tmp_path / "orbax"), "--format=torch", "--out", str(tmp_path / "torch")]
  )
  assert read_tuned(tmp_path / "torch") == read_tuned(tmp_path / "orbax")
  caplog.clear()
  for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
    shutil.copyfile(ASSETS / name, tmp_path / "torch" / name)
  reader = prepare_model(AskSettings(checkpoint=str(tmp_path / "torch"), context=2048))
  assert (
    reader.cfg.clip_frames == 2
    and reader.cfg.llm.context == 2048
    and "a context of 2,048 tokens (--context), not the 1024" in caplog.text
  )
  prepare_model(AskSettings(checkpoint=str(tmp_path / "torch"), clip_frames="8"))
  assert "config.json; --clip-frames checkpoint takes those" in caplog.text


LP_COMP = {"schedule": [16, 4], "keep": "suffix", "group": 16}


def with_tuned(base: pathlib.Path, copy: pathlib.Path, **change) -> pathlib.Path:
  """A copy of a checkpoint with an xcomp.json."""
  shutil.copytree(base, copy)
  (copy / "xcomp.json").write_text(json.dumps({"lp_comp": LP_COMP} | change))
  return copy


@pytest.mark.parametrize(
  "change, fields",
  [
    ({"version": 2}, {"value": 2, "allowed": 1}),
    (
      {"clip_frames": -4, "context": 0},
      {
        "wrong": {"clip_frames": -4, "context": 0},
        "allowed": {"clip_frames": range(1, 1_001), "context": range(1, 1_000_000_001)},
      },
    ),
    (
      {"lp_comp": {"schedule": [16, 4], "keep": "none", "group": 0}},
      {"wrong": {"lp_comp.group": 0}, "allowed": {"lp_comp.group": range(1, 1_000_001)}},
    ),
    ({"image_size": 224}, {"value": 224, "expected": 64}),
  ],
)
def test_what_is_wrong_with_xcomp_json_is_named(base, tmp_path, change, fields):
  copy = with_tuned(base, tmp_path / "copy", **change)
  with pytest.raises(CheckpointError) as caught:
    w.read_config(copy)
  assert caught.value.fields == {"where": copy / "xcomp.json"} | fields


@pytest.mark.parametrize(
  "change, message",
  [
    ({"clip_size": 4}, r"xcomp\.json\.clip_size is unknown"),
    ({"clip_frames": "4"}, r"xcomp\.json\.clip_frames"),
  ],
)
def test_keys_of_xcomp_json_that_are_unknown_or_of_another_type_are_named(
  base, tmp_path, change, message
):
  with pytest.raises(ConfigError, match=message):
    w.read_config(with_tuned(base, tmp_path / "copy", **change))


@pytest.mark.parametrize(
  "tuned, dtype", [("float32", "float32"), ("bfloat16", "float16"), (None, "float16")]
)
def test_the_dtype_that_weights_were_tuned_in_counts(tuned, dtype):
  assert kernels.compute_dtype(kernels.Card("gpu", "Tesla T4", (7, 5)), tuned) == dtype


def test_plain_checkpoint_keeps_its_clip_length(base, tmp_path):
  export.main(
    [
      "--checkpoint",
      str(base),
      "--format=orbax",
      "--out",
      str(tmp_path / "out"),
      "--dtype=bfloat16",
    ]
  )
  assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_local_num_frames"] == 4
  cfg = w.read_config(tmp_path / "out")
  assert set(loading.stored(tmp_path / "out", cfg).values()) == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("layout", ["orbax", "torch"])
@pytest.mark.parametrize("keep", [None, "none", "suffix"])
def test_conversion_changes_nothing_of_what_is_known_of_lp_comp(base, tmp_path, layout, keep):
  if keep:
    (base / "xcomp.json").write_text(
      json.dumps({"lp_comp": {"schedule": [16, 4], "keep": keep, "group": 16}})
    )
  before = read_tuned(base)
  export.main(["--checkpoint", str(base), f"--format={layout}", "--out", str(tmp_path / "out")])
  assert read_tuned(tmp_path / "out") == before and (before is None) == (keep is None)


@pytest.mark.parametrize(
  "name, refused",
  [
    ("model.vision_tower.vision_tower.encoder.blocks.1.mlp.fc1.bias", True),
    ("model.norm.weight", False),
  ],
)
def test_another_start_is_refused_if_what_was_not_trained_differs(
  base, run, tmp_path, capsys, name, refused
):
  tensors = load_file(base / "model.safetensors")
  tensors[name][3] *= 1.01
  other = w.tiny(tmp_path / "other", tensors)
  arguments = [
    "--checkpoint",
    str(run),
    "--format=torch",
    "--out",
    str(tmp_path / "out"),
    "--init-from",
    str(other),
  ]
  if not refused:  # it was trained: the run has its own
    export.main(arguments)
    w.equal(load_file(tmp_path / "out" / "model.safetensors"), expected(base, 2))
    return
  with pytest.raises(SystemExit):
    export.main(arguments)
  said = capsys.readouterr().err
  assert (
    "other is not what " in said
    and "vision/blocks/1/fc1/bias, which was not trained, differs" in said
  )
  assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_parameters_is_said(run, tmp_path, capsys):
  shutil.rmtree(run / "checkpoints" / "2" / "params")
  with pytest.raises(SystemExit):
    export.main(["--checkpoint", str(run), "--format=torch", "--out", str(tmp_path / "out")])
  assert "2 is damaged: it lacks params; remove it" in capsys.readouterr().err


def test_starting_checkpoint_that_has_moved(base, run, tmp_path, capsys):
  base.rename(tmp_path / "moved")
  arguments = ["--checkpoint", str(run), "--format=torch", "--out", str(tmp_path / "out")]
  with pytest.raises(SystemExit) as left:
    export.main(arguments)
  assert left.value.code == 1
  assert (
    f"error: {run}, step 2 started from another place: there is no directory {base}; --init-from "
    f"DIR says" in capsys.readouterr().err
  )
  export.main([*arguments, "--init-from", str(tmp_path / "moved")])
  w.equal(load_file(tmp_path / "out" / "model.safetensors"), expected(tmp_path / "moved", 2))


@pytest.mark.parametrize(
  "arguments, message",
  [
    (
      ["--checkpoint=absent/too/deep", "--format=torch"],
      "error: there is no directory absent/too/deep\n",
    ),
    (
      ["--checkpoint=base", "--format=torch", "--step=3"],
      "error: base is not the workdir of a run",
    ),
    (["--checkpoint=run", "--format=orbax", "--step=3"], "error: no checkpoint of step 3 in "),
    (["--checkpoint=base", "--format=orbax", "--out=base"], "base is --checkpoint"),
    (["--checkpoint=run", "--format=torch", "--out=run", "--overwrite"], "run is --checkpoint"),
    (
      ["--checkpoint=run", "--format=torch", "--out=run/checkpoints/new", "--overwrite"],
      "lies in --checkpoint",
    ),
    (
      ["--checkpoint=run/../run", "--format=torch", "--out=.", "--overwrite"],
      "contains --checkpoint",
    ),
    (
      ["--checkpoint=run", "--format=torch", "--out=base", "--overwrite"],
      "base is where the run started",
    ),
    (
      ["--checkpoint=run", "--init-from=base", "--format=torch", "--out=base", "--overwrite"],
      "base is --init-from",
    ),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(
  base, run, tmp_path, monkeypatch, capsys, arguments, message
):
  monkeypatch.chdir(tmp_path)
  (base / ".export.json").write_text(json.dumps(saving.file_sizes(base)))  # it could be replaced
  before = sorted(tmp_path.iterdir())
  with pytest.raises(SystemExit) as left:
    export.main(["--out=out", *arguments])
  said = capsys.readouterr().err
  assert left.value.code == 1
  assert message in said and said.count("error:") == 1 and "Traceback" not in said
  assert sorted(tmp_path.iterdir()) == before


def test_only_an_export_is_replaced_and_nothing_beside_it_goes(base, tmp_path, capsys):
  unfinished = tmp_path / "out.incomplete"  # of `predecode`
  unfinished.mkdir()
  (unfinished / "plan.json").write_text("{}")
  arguments = ["--checkpoint", str(base), "--format=torch", "--out", str(tmp_path / "out")]
  export.main(arguments)
  for name in ("notes.txt", "mine.py", "params/notes.txt", "model-backup.safetensors"):
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(SystemExit):
      export.main([*arguments, "--overwrite"])
    assert f"also holds {name}, which is not what the export wrote" in capsys.readouterr().err
    (tmp_path / "out" / name).unlink()
  (tmp_path / "out" / "params").rmdir()
  with pytest.raises(SystemExit):  # a checkpoint that no export made
    export.main(
      ["--checkpoint", str(tmp_path / "out"), "--format=torch", "--out", str(base), "--overwrite"]
    )
  assert (
    "base is not empty and no export" in capsys.readouterr().err and (base / "config.json").exists()
  )
  before = (tmp_path / "out").stat().st_ino
  export.main([*arguments, "--overwrite"])
  assert (tmp_path / "out").stat().st_ino != before
  assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "out.incomplete"]
  assert [path.name for path in unfinished.iterdir()] == ["plan.json"]


MODELING = "from .mm_utils import size\n\nclass Stand:\n  pass\n"
AUTO_MAP = {"AutoConfig": "modeling_stand.StandConfig", "AutoModel": "modeling_stand.Stand"}


def coded(directory: pathlib.Path, *files: str) -> pathlib.Path:
  """A checkpoint whose config.json asks for a module of its own; the files of that which are
  there.
  """
  config = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
  for file in files:
    (directory / file).write_text(MODELING if file == "modeling_stand.py" else "size = 1\n")
  return directory


def exported(
  directory: pathlib.Path, out: pathlib.Path, *more: str, layout: str = "torch"
) -> tuple[dict | None, list[str]]:
  """What the export has of `auto_map` and of Python files."""
  export.main(["--checkpoint", str(directory), f"--format={layout}", "--out", str(out), *more])
  return json.loads((out / "config.json").read_text()).get("auto_map"), sorted(
    f.name for f in out.glob("*.py")
  )


@pytest.mark.parametrize("layout", ["torch", "orbax"])
def test_official_code_goes_along(base, tmp_path, capsys, layout):
  code = ["constants.py", "mm_utils.py", "modeling_stand.py"]
  assert exported(coded(base, *code), tmp_path / "out", layout=layout) == (AUTO_MAP, code)
  assert (tmp_path / "out" / "modeling_stand.py").read_text() == MODELING
  assert "auto_map" not in capsys.readouterr().err


def test_code_is_also_named_in_lists(tmp_path):
  named = {"AutoTokenizer": ["words.Slow", None], "AutoModel": None}
  assert saving.missing_code(named, tmp_path) == ["words.py"]
  (tmp_path / "words.py").write_text("")
  assert saving.missing_code(named, tmp_path) == []


@pytest.mark.pure
def test_an_empty_folder_is_free(tmp_path):
  saving.check_free(tmp_path, overwrite=False)
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(CheckpointError) as caught:
    saving.check_free(tmp_path, overwrite=False)
  assert caught.value.fields == {"where": tmp_path, "missing": "overwrite"}


@pytest.mark.parametrize(
  "files, missing", [([], "modeling_stand.py"), (["modeling_stand.py"], "mm_utils.py")]
)
def test_without_official_code_auto_map_is_left_out(base, tmp_path, capsys, files, missing):
  assert exported(coded(base, *files), tmp_path / "out") == (None, [])
  assert (
    f"auto_map is left out of config.json: {base} has no {missing}. --code ORG/NAME fetches"
    in capsys.readouterr().err
  )
  other = tmp_path / "code"
  other.mkdir()
  (other / "modeling_stand.py").write_text(MODELING)
  with pytest.raises(SystemExit):
    exported(base, tmp_path / "again", "--code", str(other))
  assert (
    "code has no mm_utils.py, which auto_map of " in capsys.readouterr().err
    and not (tmp_path / "again").exists()
  )
  (other / "mm_utils.py").write_text("")
  assert exported(base, tmp_path / "again", "--code", str(other)) == (
    AUTO_MAP,
    ["mm_utils.py", "modeling_stand.py"],
  )


def test_code_from_the_hub(base, tmp_path, monkeypatch):
  import huggingface_hub

  asked = []

  def download(name, *, allow_patterns, local_files_only=False):
    asked.append((name, allow_patterns, local_files_only))
    if local_files_only:
      raise FileNotFoundError
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "modeling_stand.py").write_text("")
    return str(tmp_path / "hub")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert exported(coded(base), tmp_path / "out", "--code=org/name") == (
    AUTO_MAP,
    ["modeling_stand.py"],
  )
  # of what is in the cache nobody knows whether it is all
  assert asked == [("org/name", ["*.py"], False)]


def test_code_for_a_config_that_names_none_is_refused(base, tmp_path, capsys):
  with pytest.raises(SystemExit):
    exported(base, tmp_path / "out", "--code", str(base))
  assert (
    "config.json has no auto_map, which would name the files of --code" in capsys.readouterr().err
  )


def test_a_run_that_was_tied_stays_so_whatever_lies_beside_its_start(base, run, tmp_path):
  tensors = load_file(base / "model.safetensors")
  w.tiny(
    base,
    tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
    tie_word_embeddings=True,
  )
  export.main(["--checkpoint", str(run), "--format=torch", "--out", str(tmp_path / "out")])
  assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
  assert w.read_config(tmp_path / "out").llm.tied


def test_a_run_says_where_it_began_as_any_folder_finds_it(tmp_path, monkeypatch, tiny_run):
  config = tiny_run(tmp_path / "run")
  cfg = read_vlm_config(pathlib.Path(config.init_from), config.model, config.lp_comp)
  monkeypatch.chdir(pathlib.Path(config.init_from).parent)

  def say(place):
    return checkpoint.description(
      dataclasses.replace(config, init_from=place),
      cfg,
      prepare.open_data(config.data.train, cfg),
      None,
    )["run"]["init_from"]

  assert say(pathlib.Path(config.init_from).name) == config.init_from
  assert say("org/name") == "org/name"


def deep(step):
  (step / "config" / "metadata").write_text("[" * 100_000)


DAMAGES = {
  "a deep config": deep,
  "a config of another kind": lambda step: (step / "config" / "metadata").write_text("[]"),
  "a config without its model": (
    lambda step: (step / "config" / "metadata").write_text('{"run": {}}')
  ),
  "no arrays": lambda step: [file.unlink() for file in step.glob("params/ocdbt.process_0/d/*")],
  "noise for arrays": lambda step: [
    file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))
    for file in step.glob("params/**/d/*")
  ],
  "a pipe": lambda step: (
    (step / "params" / "manifest.ocdbt").unlink(),
    os.mkfifo(step / "params" / "manifest.ocdbt"),
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_of_a_run_is_one_error_with_its_name(run, tmp_path, damage, capsys):
  DAMAGES[damage](run / "checkpoints" / "2")
  with pytest.raises(SystemExit):
    export.main(["--checkpoint", str(run), "--format=torch", "--out", str(tmp_path / "out")])
  said = capsys.readouterr().err.splitlines()[-1]
  assert said.startswith(f"error: {run}") and "2" in said and len(said) < 1000
  assert not (tmp_path / "out").exists()
