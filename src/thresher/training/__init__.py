"""Training stages on transformers.Trainer, and learning from the stock model without labels."""

from thresher.training.learner import Learner, distillation_loss
from thresher.training.recipe import fit
from thresher.training.stages import run_stage

__all__ = ["Learner", "distillation_loss", "fit", "run_stage"]
