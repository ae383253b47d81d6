"""Recipes: functions that return frozen configurations. A variant of one is ``dataclasses.replace``."""

from hqlt.recipes.expressivity import MODELS, PRESETS, expressivity
from hqlt.recipes.quickstart import TextRecipe, quickstart_parity, quickstart_text

__all__ = ["MODELS", "PRESETS", "TextRecipe", "expressivity", "quickstart_parity", "quickstart_text"]
