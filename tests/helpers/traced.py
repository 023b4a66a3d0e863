"""`xcomp_jax.train` that also notes every step's exact loss and samples, and may kill itself:
python tests/helpers/traced.py JSON ...

JSON: {"trace": FILE} and perhaps {"kill": {"process": 1, "phase": "data" | "step" | "save", "step":
7, "delay": 0.01}}: SIGKILL so many seconds after that process begins with that phase of step 7.
Each process adds lines to FILE.N.
"""

import json
import os
import signal
import sys
import threading

import jax

from xcomp_jax.training import checkpoint, loop, metrics


def main():
  jax.config.update("jax_default_matmul_precision", "highest")
  options = json.loads(sys.argv.pop(1))
  kill, done, samples = options.get("kill"), [None], []

  def note(kind, value):
    with open(f"{options['trace']}.{jax.process_index()}", "a") as file:
      file.write(json.dumps([kind, value]) + "\n")

  def phase(name, step):
    if (
      kill
      and (kill["process"], kill["phase"]) == (jax.process_index(), name)
      and step >= kill["step"]
    ):
      note("killed", [name, step])
      threading.Timer(kill["delay"], os.kill, (os.getpid(), signal.SIGKILL)).start()
      kill.clear()

  line, wait, place, save = (
    metrics.line,
    metrics.Clock.wait,
    loop.place_rows,
    checkpoint.save_checkpoint,
  )

  def lined(step, steps, values):
    note("step", [step, float(values["loss"]).hex(), sorted(samples)])
    samples.clear()
    done[0] = step
    return line(step, steps, values)

  def waited(self, iterator):
    phase("data", (done[0] or 0) + 1)
    return wait(self, iterator)

  def placed(batch, mesh):
    phase("step", (done[0] or 0) + 1)
    samples.extend(i for i in batch.index.ravel().tolist() if i >= 0)
    return place(batch, mesh)

  def saved(checkpoints, step, *rest):
    phase("save", step)
    return save(checkpoints, step, *rest)

  metrics.line, metrics.Clock.wait, loop.place_rows, checkpoint.save_checkpoint = (
    lined,
    waited,
    placed,
    saved,
  )
  loop.main()


if __name__ == "__main__":
  main()
