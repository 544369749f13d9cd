"""Training runs: files of examples in, a folder with a model out."""

from .run import TrainingOptions, last_checkpoint, train

__all__ = ["TrainingOptions", "last_checkpoint", "train"]
