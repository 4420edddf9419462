"""Fine-tuning: the losses (prompt learners, adapters and trainers will join them here)."""

from fastood.tuning.losses import ebm_loss, locoop_loss

__all__ = ["ebm_loss", "locoop_loss"]
