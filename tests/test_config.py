"""config.py and the command line: what is unknown, missing or of another type is named, with the
nearest known key.
"""

import pathlib

import pytest

from xcomp_jax.config import ConfigError, RunConfig
from xcomp_jax.config_io import from_command_line, from_dict, to_dict

pytestmark = pytest.mark.pure

SCT = str(pathlib.Path(__file__).parents[1] / "configs" / "sct.py")


def parse(*flags):
  return from_command_line(["train", *flags])


@pytest.mark.parametrize("variant", ["", ":tiny", ":7b"])
def test_every_variant_holds_every_value(variant):
  config = parse(f"--config={SCT}{variant}")
  assert from_dict(RunConfig, to_dict(config)) == config


def test_the_plain_config_is_the_papers_recipe():
  config = parse(f"--config={SCT}")
  assert (config.optim.learning_rate, config.optim.warmup, config.optim.weight_decay) == (
    1e-5,
    0.03,
    0.0,
  )
  assert (config.optim.clip_norm, config.train.batch_size, config.train.epochs) == (1.0, 32, 1)
  assert (config.lp_comp.schedule, config.lp_comp.keep, config.lp_comp.group) == (
    "cosine",
    "suffix",
    16,
  )
  assert (config.model.clip_frames, config.data.shapes) == ("auto", None)  # 8 with the UMT tower
  assert (config.train.vision, config.train.projector, config.train.llm) == (False, True, True)
  assert config.train.projector_max_frames == 512
  assert "2B_res448" in config.init_from


def test_values_are_overridden_from_the_command_line():
  config = parse(
    f"--config={SCT}",
    "--config.optim.learning_rate=2e-4",
    "--config.train.steps=7",
    "--config.train.projector_max_frames=None",
    "--config.lp_comp.schedule=(16,8,1)",
    "--config.data.shapes=((8,2,64,512),)",
    "--config.data.heldout=runs/a-1",
    "--config.model.clip_frames=checkpoint",
    "--config.train.projector=False",
  )
  assert (
    config.optim.learning_rate == 2e-4
    and config.train.steps == 7
    and config.train.projector_max_frames is None
  )
  assert config.lp_comp.schedule == (16, 8, 1) and config.data.shapes == ((8, 2, 64, 512),)
  assert (
    config.data.heldout == "runs/a-1"
    and config.model.clip_frames == "checkpoint"
    and not config.train.projector
  )


@pytest.mark.parametrize("file", [SCT, SCT.replace("sct.py", "base.py")])
def test_one_folder_or_several_with_weights_from_the_command_line(file):
  one = parse(f"--config={file}", "--config.data.train=data/a-1").data
  assert (one.train, one.weights) == ("data/a-1", None)
  two = parse(
    f"--config={file}", "--config.data.train=('data/a','b')", "--config.data.weights=(1,0.25)"
  ).data
  assert (two.train, two.weights) == (("data/a", "b"), (1.0, 0.25)) and type(
    two.weights[0]
  ) is float


@pytest.mark.parametrize(
  "flags, words",
  [
    (
      ["--config.data.train=(1,2)"],
      "config.data.train = (1, 2): expected str or tuple[str, ...]",
    ),
    (
      ["--config.data.weights=0.5"],
      "config.data.weights = 0.5: expected tuple[float, ...] or None",
    ),
    (["--config.data.weights=(True,1)"], "config.data.weights = (True, 1)"),
    (
      ["--config.optim.learning_rat=1"],
      "config.optim.learning_rat is unknown; did you mean config.optim.learning_rate?",
    ),
    (
      ["--config.optim.lr=1"],
      "config.optim.lr is unknown; did you mean config.optim.learning_rate?",
    ),
    (["--config.epochs=1"], "config.epochs is unknown; did you mean config.train.epochs?"),
    (["--config.optim.x=1"], "config.optim.x is unknown; known: learning_rate, warmup"),
    (["--config.foo.zzz=1"], "config.foo.zzz is unknown"),
    (
      ["--config.trian.epochs=3"],
      "config.trian.epochs is unknown; did you mean config.train.epochs?",
    ),
    (
      ["--config.train.epochs.x=3"],
      "config.train.epochs.x is unknown; did you mean config.train.epochs?",
    ),
    (["--config.trian=3"], "config.trian is unknown; did you mean config.train?"),
    (["--config.optim.b1=x"], "config.optim.b1=x"),
    (["--config.train.steps=1.5"], "config.train.steps = 1.5: expected int or None"),
    (
      ["--config.lp_comp.keep=last"],
      "config.lp_comp.keep = 'last': expected 'suffix' or 'uniform'",
    ),
    (["--config.data.shapes=((8,2,64,1.5),)"], "shapes"),
    (["--confg.seed=1"], "confg"),
    (["stray"], "stray"),
    (["-c", "configs/base.py:see"], "flag 'c'"),  # is not short for --config
  ],
)
def test_a_bad_override_is_named(flags, words):
  with pytest.raises(ConfigError) as error:
    parse(f"--config={SCT}", *flags)
  assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "flags", [["--config", f"{SCT}:7b"], ["-config=nowhere.py", f"--config={SCT}:7b"]]
)
def test_the_last_config_counts_and_overrides_hold_wherever_they_stand(flags):
  config = parse(
    "--config.seed=1",
    f"--config={SCT}:8b",
    "--config.workdir=a",
    "--config.seed=2",
    *flags,
    "--config.workdir=b",
  )
  assert "7B" in config.init_from and (config.seed, config.workdir) == (2, "b")


@pytest.mark.parametrize(
  "flags, words",
  [
    ([], "--config=configs/sct.py"),
    ([f"--config={SCT}", "--config"], "--config=configs/sct.py"),
    (["--config=/nowhere/sct.py"], "no config file /nowhere/sct.py"),
    (["--config=/"], "no config file /"),
    ([f"--config={SCT}:8b"], "no variant '8b'; known: tiny, 7b"),
    (["--config=README.md"], "README.md: SyntaxError: "),
  ],
)
def test_a_config_that_is_not_there_is_named(flags, words, monkeypatch):
  monkeypatch.chdir(pathlib.Path(SCT).parents[1])
  with pytest.raises(ConfigError) as error:
    parse(*flags)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_configs_says_where_they_are(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError) as caught:
    parse("--config=configs/sct.py")
  assert caught.value.fields["where"] == "configs/sct.py"
  assert str(tmp_path) in str(caught.value) and "in the repository" in str(caught.value)


@pytest.mark.parametrize(
  "text, words",
  [
    ("x = 1 / 0", ", line 1: ZeroDivisionError: division by zero"),
    ("def get_config():\n  return 1 / 0", ", line 2: ZeroDivisionError: division by zero"),
    ("import nowhere", ", line 1: ModuleNotFoundError: No module named 'nowhere'"),
    (
      "def get_config():\n  open('nowhere')",
      ", line 2: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere'",
    ),
    ("x = 1", ": it has no function get_config, as configs/sct.py has"),
    (
      "def get_config(): pass",
      ": get_config has to return an ml_collections.ConfigDict, not NoneType",
    ),
    ("\0", ": SyntaxError: source code string cannot contain null bytes"),
  ],
)
def test_what_is_wrong_in_an_own_config_is_said_with_its_place(text, words, tmp_path):
  file = tmp_path / "own (1).py"
  file.write_text(text)
  with pytest.raises(ConfigError) as error:
    parse(f"--config={file}")
  assert str(error.value) == f"{file}{words}"


def test_a_missing_key_is_named():
  values = to_dict(parse(f"--config={SCT}"))
  del values["train"]["save_every"], values["train"]["epochs"]
  with pytest.raises(ConfigError) as caught:
    from_dict(RunConfig, values)
  assert caught.value.fields == {
    "where": "config.train",
    "missing": ["epochs", "save_every"],
    "nearest": {},
  }
  with pytest.raises(ConfigError) as caught:
    from_dict(RunConfig, values | {"mesh": 3, "train": to_dict(parse(f"--config={SCT}").train)})
  assert caught.value.fields == {"where": "config.mesh", "value": 3}
