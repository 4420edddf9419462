"""Class prompts → text features: exact, differentiable, and without work done twice."""

from fastood.prompts.encoder import PromptEncoder
from fastood.prompts.layout import PromptLayout, fixed, learned
from fastood.prompts.tower import TextTower, text_tower

__all__ = ["PromptEncoder", "PromptLayout", "TextTower", "fixed", "learned", "text_tower"]
