"""From a checkpoint on disk to a model, and back: names, files, sizes, parameters."""
