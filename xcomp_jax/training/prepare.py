"""What a run is of, before any weight is read: its data, mesh, shapes and the plan of its steps."""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.cli import keep_compiled
from xcomp_jax.config import ConfigError, MeshConfig, RunConfig, VLMConfig
from xcomp_jax.data import packing, pipeline
from xcomp_jax.data.batch import length_table
from xcomp_jax.data.blend import Blend, measure_lengths, run_order
from xcomp_jax.data.packing import Micro
from xcomp_jax.data.store import Features, Layout, StoreError, open_store
from xcomp_jax.files import apart
from xcomp_jax.model import kernels, lp_comp, vlm
from xcomp_jax.parallel.mesh import make_mesh
from xcomp_jax.training import checkpoint, forecast, workdir
from xcomp_jax.training.forecast import Schedule
from xcomp_jax.training.steps import clip_share, row_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedRun:
  """What a run is of, before any weight is read."""

  cfg: VLMConfig
  mesh: Mesh
  opened: list[Blend]  # what it trains on, and if there are, held-out data
  lengths: np.ndarray  # int64[n, 4] of the samples that it trains on, columns as `Length`
  schedule: Schedule
  plan: list[list[Micro]]  # the micro-batches of each step
  data: pipeline.BatchReader
  heldout: Callable[[], pipeline.BatchReader] | None  # reads all of it, from the beginning
  description: dict  # of `checkpoint.description`

  @property
  def steps(self) -> int:
    """Optimizer steps of the whole run."""
    return len(self.plan)

  @property
  def pixels(self) -> bool:
    """Whether the tower runs, too."""
    return self.opened[0].features is None

  def account(self, steps: Sequence[Sequence[Micro]]) -> forecast.Account:
    """Says what some of the steps compute and take at least."""
    return forecast.account(self.schedule, steps, self.lengths, self.pixels)


def prepare_run(config: RunConfig, devices: Sequence[Any]) -> PreparedRun:
  """Reads what a config names, and makes sure that it goes together and that the workdir can be
  written.

  devices: what it computes on.
  """
  _keep_apart(config)
  keep_compiled(config.compilation_cache)
  kernels.check_implementation(config.model.attention, config.model.dtype)
  directory = resolve(config.init_from, "about")
  cfg = read_vlm_config(directory, config.model, config.lp_comp)
  lp_comp.counts(cfg.lp_comp, cfg.llm.layers)  # refuses schedules that can't be
  tokenizer = loading.read_tokenizer(directory, cfg)
  opened = _open_all(config, cfg)
  description = checkpoint.description(config, cfg, *opened)
  checkpoint.agree(description)

  # which samples each step has, and what they take
  train, data = config.train, opened[0]
  order = run_order(data, train.batch_size, config.seed, train.epochs)[: train.steps]
  lengths = [measure_lengths(some, tokenizer, config.data.mask) for some in opened]
  schedule = forecast.schedule_run(config, cfg, lengths[0], devices)
  forecast.check_memory(schedule)
  mesh = make_mesh(MeshConfig(*schedule.mesh), devices)
  plan = packing.pack_steps(lengths[0], order, schedule.shapes, schedule.costs)
  checkpoint.agree({"plan of the steps": zlib.crc32(repr((schedule.mesh, plan)).encode())})

  share = share_of(mesh, config, cfg.clips_per_chunk)
  heldout = None
  if len(opened) > 1:
    size, count = train.batch_size, len(opened[1])
    parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
    with _about_heldout():
      other = forecast.schedule_run(config, cfg, lengths[1], devices, schedule)
    heldout = functools.partial(
      pipeline.read_steps,
      opened[1],
      tokenizer,
      config.data,
      lengths[1],
      packing.pack_steps(lengths[1], parts, other.shapes, other.costs),
      dataclasses.replace(share, trained=False),
    )
  if not checkpoint.begun(config.workdir):
    # what is missing or broken is said before anything is written
    loading.stored(resolve(config.init_from), cfg)
  workdir.claim(config.workdir)
  return PreparedRun(
    cfg=cfg,
    mesh=mesh,
    opened=opened,
    lengths=length_table(lengths[0]),
    schedule=schedule,
    plan=plan,
    data=pipeline.read_steps(data, tokenizer, config.data, lengths[0], plan, share),
    heldout=heldout,
    description=description,
  )


def _keep_apart(config: RunConfig) -> None:
  """Refuses a workdir that is, or lies in, what the run reads."""
  data = config.data.train if isinstance(config.data.train, tuple) else (config.data.train,)
  apart(
    {"config.workdir": config.workdir},
    {"config.init_from": config.init_from, "config.data.heldout": config.data.heldout}
    | {
      f"config.data.train[{i}]" if len(data) > 1 else "config.data.train": path
      for i, path in enumerate(data)
    },
  )


def _open_all(config: RunConfig, cfg: VLMConfig) -> list[Blend]:
  """What a run trains on, and held-out data if the config names some."""
  opened = [open_data(config.data.train, cfg, config.data.weights)]
  if config.data.heldout is not None:
    with _about_heldout():
      opened.append(open_data(config.data.heldout, cfg))
  for data in opened:
    if data.features is not None and config.train.vision:
      raise ConfigError(
        f"config.train.vision = True, but {data.stores[0].path} holds features, which a tower "
        "that learns would not make again; set it to False, or train on frames",
        where="config.train.vision",
        data=str(data.stores[0].path),
      )
  return opened


def share_of(mesh: Mesh, config: RunConfig, clips: int) -> pipeline.ProcessShare:
  """What this process reads of a run on a mesh; clips: of a device in the tower at once.

  Raises:
    ConfigError: see `row_share`.
  """
  rows, groups = row_share(mesh)
  return pipeline.ProcessShare(
    rows=rows,
    groups=groups,
    devices=mesh.size,
    mine=tuple(clip_share(mesh)),
    clips=clips,
    trained=config.train.vision,
  )


@contextlib.contextmanager
def _about_heldout() -> Generator[None]:
  """Says that it is the held-out data something is wrong with."""
  try:
    yield
  except (ConfigError, StoreError) as error:
    raise type(error)(
      f"held-out data in config.data.heldout (None: no evaluation): {error}",
      **error.fields | {"where": "config.data.heldout"},
    ) from error


def open_data(
  folders: str | tuple[str, ...], cfg: VLMConfig, weights: tuple[float, ...] | None = None
) -> Blend:
  """Stores that the model can read; whether features are its own tower's only the weights can say
  (`check_tower`).

  Raises:
    StoreError: see `open_store`.
    ConfigError: frames have another size, clips another length, groups of LP-Comp don't fill a
      clip, or see `Blend`.
  """
  group = cfg.lp_comp.group
  stores = [open_store(folder) for folder in ((folders,) if isinstance(folders, str) else folders)]
  for store in stores:
    wanted: list[tuple[Layout | Features, str, int]] = [
      (store.layout, "image_size", cfg.vision.image_size),
      (store.layout, "clip_frames", cfg.clip_frames),
    ]
    if store.features is not None:
      wanted += [
        (store.features, "tokens_per_frame", cfg.tokens_per_frame),
        (store.features, "width", cfg.vision.width),
      ]
    for has, name, value in wanted:
      if getattr(has, name) != value:
        raise ConfigError(
          f"{store.path} was written with {name} {getattr(has, name)}, but the model takes "
          f"{value}; run predecode again",
          where=str(store.path),
          key=name,
          found=getattr(has, name),
          expected=value,
        )
    for frames in sorted({sample.clip_frames for sample in store.samples if sample.frames}):
      if (tokens := frames * cfg.tokens_per_frame) % group:
        raise ConfigError(
          f"lp_comp.group = {group}: {store.path} has clips of {frames} frames, whose {tokens} "
          f"tokens can't be cut into groups of {group}",
          where="lp_comp.group",
          value=group,
          frames=frames,
        )
  return Blend(stores, weights)


def check_tower(model: vlm.VLM, name: str, data: Sequence[Blend]) -> None:
  """Makes sure that features are of this model's tower. Where several processes share it, all of
  them must call this.

  name: of the model, for the message.

  Raises:
    ConfigError: they are of other weights or settings.
  """
  made = [
    (store.path, store.features.identity)
    for blend in data
    for store in blend.stores
    if store.features is not None
  ]
  identity = loading.tower_identity(model) if made else None
  for path, other in made:
    if other != identity:
      raise ConfigError(
        f"{path} holds features by another tower: its identity is {other}, that of the tower in "
        f"{name} {identity}. Make the features again with this checkpoint, or train on frames",
        where=str(path),
        found=other,
        expected=identity,
      )
