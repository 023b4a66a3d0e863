"""What the study's cells hold, by name: right answers, selected scenes, ranks."""

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from xcomp_jax.inputs import read_json
from xcomp_jax.synthetic.films import KINDS

# Shares that are right without looking a thing up: of the best constant answer, and of an answer
# about any shot instead of the one that is asked about, of order one with a colour that the
# question doesn't have. Who sees the shots can count them.
CHANCE = {
  "needle": 1 / 6,
  "attribute": 1 / 4,
  "motion": 1 / 4,
  "order": 1 / 6,
  "count": 1 / 3,
  "whole": 1 / 4,
}
ANY_SHOT = {
  "needle": 0.26,
  "attribute": 0.49,
  "motion": 0.45,
  "order": 0.32,
  "count": 1,
  "whole": 0.60,
}
# rules that are also tuned for 1,200 steps, and measured with ever more clips
LONGER = (
  "none",
  "progressive",
  "early",
)
SINGLE = np.isin(KINDS, ("needle", "attribute", "motion"))  # kinds that need one scene
QUARTERS = ("first", "second", "third", "last")

# where cells have answers about ever more frames
CURVES = {
  "no compression": ("base_frames", "wide", "none"),
  "no compression, tuned": ("tune_none_{seed}", "wide", "none"),
  "LP-Comp, not tuned for": ("base_frames", "wide", "progressive"),
  "LP-Comp after SCT": ("tune_progressive_{seed}", "wide", "progressive"),
  "the early schedule after SCT": ("tune_early_{seed}", "wide", "early"),
}
# where they have what QC-Comp selects
LONGEST = "512 scenes, LP-Comp after SCT"
SELECTIONS = {
  "128 scenes, no compression, tuned": ("select_none_{seed}", "long"),
  "128 scenes, LP-Comp after SCT": ("select_progressive_{seed}", "long"),
  "32 scenes, no compression, tuned": ("select_none_{seed}", "window"),
  "32 scenes, LP-Comp after SCT": ("select_progressive_{seed}", "window"),
  LONGEST: ("official_{seed}", "hour"),
}

Measure = Mapping[str, Any]  # what `measures` returns about a model and films


class Cells:
  """The results of the cells in a folder, by name."""

  def __init__(self, folder: pathlib.Path):
    self.results = {
      file.stem: read_json(file, ValueError)["result"] for file in sorted(folder.glob("*.json"))
    }

  def seeds(self, *path: str) -> list[Measure]:
    """The measures at a path, whose first name may have {seed}; of every seed that is there."""
    pattern = re.compile(re.escape(path[0]).replace(r"\{seed\}", r"\d+") + "$")
    found = []
    for name in sorted(filter(pattern.match, self.results)):
      value = self.results[name]
      for key in path[1:]:
        value = value.get(key) if value else None
      if value:
        found.append(value)
    return found

  def selections(self) -> Iterator[tuple[str, Sequence[float | None], dict[str, list[Measure]]]]:
    """What was selected: films and model, places of needed scenes, and by mode the measures of
    every seed, of the modes that all seeds have.
    """
    for name, path in SELECTIONS.items():
      if seeds := self.seeds(*path):
        modes = [mode for mode in seeds[0] if all(mode in one for one in seeds)]
        yield (
          name,
          seeds[0]["place"],
          {mode: [one[mode] for one in seeds] for mode in modes if mode != "place"},
        )


def right(measure: Measure, key: str = "right") -> Bool[np.ndarray, "films kinds"]:
  """The bits of a measure, a row for each film and a column for each of KINDS."""
  return (np.frombuffer(measure[key].encode(), np.uint8) == ord("1")).reshape(-1, len(KINDS))


def bound(measures: Sequence[Measure]) -> float:
  """What is right if all questions are answered for which enough was shown, and the others by the
  best constant answer.
  """
  chance = [CHANCE[kind] for kind in KINDS]
  return float(np.mean([np.where(right(m, "hits"), 1, chance) for m in measures]))


def single(values: Sequence[float | None]) -> Float[np.ndarray, "films kinds"]:
  """What a measure says of all questions, of the kinds that need one scene."""
  return np.array(values, float).reshape(-1, len(KINDS))[:, SINGLE]


def ranked_first(measure: Measure, key: str = "rank") -> Bool[np.ndarray, "films kinds"]:
  """Where the one scene that is needed has the highest score; of the kinds that need one. key: by
  whose scores.
  """
  return single(measure[key]) == 0


def by_quarter(
  place: Sequence[float | None], values: Sequence[np.ndarray]
) -> list[list[Float[np.ndarray, "films kinds"]]]:
  """Values [films, 3] of every seed, for each quarter of the film: nan where the needed scene is
  elsewhere.

  place: of the needed scenes, as measured.
  """
  quarter = np.floor(single(place) * len(QUARTERS))
  return [[np.where(quarter == k, value, np.nan) for value in values] for k in range(len(QUARTERS))]
