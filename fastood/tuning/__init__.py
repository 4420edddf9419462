"""Fine-tuning: the losses (prompt learners, adapters and trainers will join them here)."""

from fastood.tuning.ebm import ebm_loss
from fastood.tuning.locoop import locoop_loss

__all__ = ["ebm_loss", "locoop_loss"]
