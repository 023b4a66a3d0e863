"""What a run says about itself: floating-point work, the step clock, compilations, the terminal
line.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence

import jax
import numpy as np

from xcomp_jax.config import LLMConfig, TrainConfig, VLMConfig
from xcomp_jax.data.batch import Length
from xcomp_jax.model import lp_comp
from xcomp_jax.parallel import chips

# JAX's events of what a call takes that finds no compiled function; with a warm compilation cache
# most is the first two.
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
COMPILE_EVENTS = (
  "/jax/core/compile/jaxpr_trace_duration",
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  BACKEND_COMPILE,
)


def forward_flops(
  cfg: VLMConfig, lengths: Sequence[Length] | np.ndarray, pixels: bool
) -> dict[str, np.ndarray]:
  """Counts the floating-point operations of each sample's forward pass.

  A multiply-add is 2. Causal attention counts half its square, the tower's attention all of it.
  Token merging, norms and softmax are left out.

  Args:
    cfg: sizes of the model.
    lengths: of the samples, or an array [n, 4] with the columns of `Length`.
    pixels: whether the tower computes too; it costs nothing where features are given.

  Returns:
    {"vision", "projector", "llm"}, each float64[n].
  """
  table = np.asarray(lengths, np.float64).reshape(-1, len(Length._fields))
  frames, per_clip, text = table[:, 0], np.maximum(table[:, 1], 1), table[:, 2] + table[:, 3]
  tokens = frames * cfg.tokens_per_frame

  v = cfg.vision
  sizes, kind = np.unique(per_clip, return_inverse=True)
  # that a clip's blocks work on
  n = np.array([v.tokens(int(size)) for size in sizes], np.float64)[kind]
  block = 2 * n * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 4 * n**2 * v.width
  clip = 2 * per_clip * v.patches * v.patch_size**2 * 3 * v.width + v.layers * block
  tower = frames / per_clip * clip * pixels

  m = cfg.llm
  projector = tokens * 2 * (v.width * m.width + m.width**2)

  heads = m.heads * m.head_dim
  first, rest = layer_products(m)
  llm = 2.0 * m.width * m.vocab_size * (text + (frames > 0))
  for count, after in entering_and_leaving(cfg):
    n, left = (text + tokens * c / cfg.lp_comp.group for c in (count, after))
    llm = llm + 2 * n * first + 2 * left * rest + 2 * n**2 * heads
  return {"vision": tower, "projector": projector, "llm": llm}


def layer_products(m: LLMConfig) -> tuple[int, int]:
  """Multiply-adds per token of a layer: those before its attention, and the others."""
  heads = m.heads * m.head_dim
  return (
    m.width * (heads + 2 * m.kv_heads * m.head_dim),
    m.width * heads + 3 * m.width * m.mlp_width,
  )


def entering_and_leaving(cfg: VLMConfig) -> list[tuple[int, int]]:
  """Tokens of a group that each layer attends with, and that it has to finish: only those that the
  next layer sees.
  """
  counts = lp_comp.counts(cfg.lp_comp, cfg.llm.layers)
  ahead = counts[1:] + counts[-1:] if lp_comp.only_selects(cfg.lp_comp) else counts
  return list(zip(counts, ahead, strict=True))


def training_passes(train: TrainConfig) -> dict[str, int]:
  """How many times the operations of its forward pass each part of the model takes in training.

  There is one more for the gradients of a part's activations, and one more for those of its
  weights, where the config asks for them. Recomputation (remat) is no useful work and not counted.
  """
  found, upstream = {}, False  # upstream: something before this part is trained
  for part in ("vision", "projector", "llm"):
    trains = getattr(train, part)
    upstream = upstream or trains
    found[part] = 1 + trains + upstream
  return found


def training_flops(
  cfg: VLMConfig, train: TrainConfig, lengths: Sequence[Length] | np.ndarray, pixels: bool
) -> float:
  """Counts the operations of forward and backward passes of these samples, all together; arguments
  as `forward_flops`.
  """
  times = training_passes(train)
  return float(
    sum(times[part] * flops.sum() for part, flops in forward_flops(cfg, lengths, pixels).items())
  )


class Listener:
  """Hears how long JAX traces, lowers and compiles, within a `with` block."""

  def __enter__(self):
    jax.monitoring.register_event_duration_secs_listener(self.listen)
    return self

  def __exit__(self, *_):
    jax.monitoring.unregister_event_duration_listener(self.listen)

  def listen(self, event: str, duration_secs: float, **about: str | int) -> None:
    """Takes notice of what has just ended."""
    raise NotImplementedError


class Goodput(Listener):
  """Where the wall time of a run goes: at every moment one part, so that they add up to all of it.
  A context manager.

  It is "start" first, and from `enter` on what that says. What JAX traces, lowers and compiles on
  this thread is "compile", wherever it happens.
  """

  PARTS = ("connect", "start", "restore", "compile", "data", "step", "evaluate", "save")

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self.begun = self._charged = clock()  # what is before `_charged` has its part
    self._seconds = dict.fromkeys(self.PARTS, 0.0)
    self._now, self._thread = "start", threading.get_ident()
    self._compiled: list[tuple[float, float]] = []  # from, to: apart, ascending

  def enter(self, name: str) -> None:
    """From now on time belongs to `name`."""
    self._charge()
    self._now = name

  @contextlib.contextmanager
  def part(self, name: str) -> Generator[None]:
    """What the block takes belongs to `name`, except for parts within."""
    before = self._now
    self.enter(name)
    try:
      yield
    finally:
      self.enter(before)

  def shares(self) -> dict[str, float]:
    """Of each part, up to now; their sum is 1."""
    total = self._charge() - self.begun
    return {name: value / total for name, value in self._seconds.items()}

  def line(self) -> str:
    """All of it for people."""
    shares = "  ".join(f"{name} {share:.1%}" for name, share in self.shares().items())
    return f"of {self._charged - self.begun:.0f} s: {shares}"

  def _charge(self) -> float:
    now = self._clock()
    self._seconds[self._now] += now - self._charged
    self._charged = now
    return now

  def listen(self, event: str, duration_secs: float, **about: str | int) -> None:
    """Takes the time of an event that just ended from the part at hand; what ended within it was
    taken before.
    """
    if event not in COMPILE_EVENTS or threading.get_ident() != self._thread:
      return
    end = self._charge()
    begin, known = end - duration_secs, 0.0
    while self._compiled and self._compiled[-1][1] > begin:
      first, last = self._compiled.pop()
      known += last - max(first, begin)
      begin = min(first, begin)
    self._compiled.append((begin, end))
    seconds = min(max(0.0, duration_secs - known), self._seconds[self._now])
    self._seconds[self._now] -= seconds
    self._seconds["compile"] += seconds


class Clock:
  """What was done since the last report, and how much of the time since then was waited for data.

  samples, frames, flops: added by who does it; flops are those of this process's devices.
  """

  def __init__(self, goodput: Goodput):
    self._goodput = goodput
    self.reset()

  def reset(self):
    """Starts a new interval."""
    self.start, self.waited = time.perf_counter(), self._goodput._seconds["data"]
    self.samples = self.frames = self.flops = 0.0

  def report(self) -> dict[str, float]:
    """Rates of the interval; mfu is the share of the peak that this process's devices reached, nan
    if unknown.
    """
    seconds = time.perf_counter() - self.start
    devices = jax.local_devices()
    chip = chips.find_chip(devices[0].device_kind)
    return {
      "samples_per_s": self.samples / seconds,
      "frames_per_s": self.frames / seconds,
      "data_wait": (self._goodput._seconds["data"] - self.waited) / seconds,
      "mfu": self.flops / seconds / (chip.flops * len(devices)) if chip else float("nan"),
    }


class Compilations(Listener):
  """Counts XLA compilations of the named jitted functions, from JAX's own events; a context
  manager.
  """

  def __init__(self, *names: str):
    self.count = dict.fromkeys(names, 0)
    self._seen: dict[str, set[str]] = {name: set() for name in names}  # what each was called on
    self._new: dict[str, list[float]] = {name: [] for name in names}  # seconds, not yet said

  def listen(self, event: str, duration_secs: float, **about: str | int) -> None:
    """Notes a compilation of one of the functions."""
    name = (
      str(about.get("fun_name", "")).removeprefix("jit(").removeprefix("jit_").removesuffix(")")
    )
    if event == BACKEND_COMPILE and name in self.count:
      self.count[name] += 1
      self._new[name].append(duration_secs)

  def lines(self, name: str, what: str) -> list[str]:
    """What calling `name` on `what` (a shape, in words) just compiled, and whether that is more
    than the shapes explain.
    """
    self._seen[name].add(what)
    count, shapes = self.count[name], len(self._seen[name])
    warning = (
      f"warning: {name} was compiled {count} times for {shapes} shapes; something else changes "
      "from step to step"
    )
    new, self._new[name] = self._new[name], []
    return [
      line
      for seconds in new
      for line in (
        f"compiled {name}{what and f' for {what}'} in {seconds:.1f} s",
        *[warning] * (count > shapes),
      )
    ]


def line(step: int, steps: int, values: Mapping[str, float]) -> str:
  """One readable line of a training step."""
  mfu = values["mfu"]
  return (
    f"step {step}/{steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad "
    f"{values['grad_norm']:.3g}  {values['samples_per_s']:.2f} samples/s  "
    f"{values['frames_per_s']:.0f} frames/s  data wait {values['data_wait']:.1%}  MFU "
    f"{'-' if np.isnan(mfu) else f'{mfu:.1%}'}  real {values['real_share']:.0%}"
  )
