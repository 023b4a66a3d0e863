"""A command that replaces a folder, with care or without: what `test_kill` kills."""

import os
import pathlib
import shutil
import sys
import time

if __name__ == "__main__":
  careful, place = sys.argv[1] != "clumsy", pathlib.Path(sys.argv[2])
  new, old, out = place / "out.new", place / "out.old", place / "out"
  shutil.rmtree(new, ignore_errors=True)
  new.mkdir()
  for name in "abc":
    (new / name).write_text("new")
    time.sleep(0.02)
  if careful and old.exists() and not out.exists():
    os.rename(old, out)
  if careful and out.exists():
    shutil.rmtree(old, ignore_errors=True)
    os.rename(out, old)
  else:
    shutil.rmtree(out, ignore_errors=True)
    time.sleep(0.2)  # or only a machine that is quick enough would be seen to lose it
  os.rename(new, out)
  shutil.rmtree(old, ignore_errors=True)
