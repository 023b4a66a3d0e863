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

from xcomp_jax.training import loop


def main():
  jax.config.update("jax_default_matmul_precision", "highest")
  options = json.loads(sys.argv.pop(1))
  kill, samples = options.get("kill"), []

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

  class Traced(loop.Loop):
    def read(self):
      phase("data", self.done + 1)
      return super().read()

    def add(self, micro):
      phase("step", self.done + 1)
      samples.extend(i for i in micro.batch.index.ravel().tolist() if i >= 0)
      return super().add(micro)

    def tell(self, group, values):
      if group == "train":
        note("step", [self.done, float(values["loss"]).hex(), sorted(samples)])
        samples.clear()
      super().tell(group, values)

    def save(self):
      phase("save", self.done)
      super().save()

  loop.main(kind=Traced)


if __name__ == "__main__":
  main()
