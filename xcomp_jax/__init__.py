"""XComp in JAX: a video language model whose layers compress every frame to one token.

  import xcomp_jax
  model = xcomp_jax.load("exports/sct")
  video = model.encode("film.mp4")
  print(model.ask(video, "What happens first?"))

`python -m xcomp_jax` lists the commands. To read the code, begin with `model/lp_comp.py` (the
idea), then `model/vlm.py` (the whole model in four functions), then `training/loop.py`.

Axis letters, used by every docstring and einsum:
  B batch, T frames, C clips, F frames of a clip, P patches of a frame,
  N visual tokens, L sequence (queries), S keys, D width, H heads,
  K kv heads, h head size, V vocabulary.
"""

import importlib
from typing import TYPE_CHECKING, Any

from xcomp_jax.errors import XCompError

if TYPE_CHECKING:
  from xcomp_jax.inference.chat import Answer, Chat
  from xcomp_jax.inference.encoded_video import EncodedVideo
  from xcomp_jax.inference.video_model import Pieces, VideoModel, load, local_mesh

# names of the package by where they are: JAX is imported when one of them is used
_HOMES = {
  "load": "inference.video_model",
  "local_mesh": "inference.video_model",
  "VideoModel": "inference.video_model",
  "Pieces": "inference.video_model",
  "EncodedVideo": "inference.encoded_video",
  "Answer": "inference.chat",
  "Chat": "inference.chat",
}

__all__ = [
  "Answer",
  "Chat",
  "EncodedVideo",
  "Pieces",
  "VideoModel",
  "XCompError",
  "__version__",
  "load",
  "local_mesh",
]


def __getattr__(name: str) -> Any:
  if name == "__version__":
    from importlib.metadata import version

    return version("xcomp_jax")
  if name not in _HOMES:
    raise AttributeError(f"module 'xcomp_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"xcomp_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
