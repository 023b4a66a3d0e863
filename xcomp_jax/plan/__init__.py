"""Says what a run takes, and whether it fits, by compiling its programs."""
