"""Training stages on transformers.Trainer, and learning from the stock model without labels."""

from thresher.training.learner import Learner, distillation_loss
from thresher.training.post_training import post_train
from thresher.training.recipe import fit
from thresher.training.stages import run_stage

__all__ = ["Learner", "distillation_loss", "fit", "post_train", "run_stage"]
