"""Recipes: functions that return frozen configurations. A variant of one is ``dataclasses.replace``."""

from hqlt.recipes.expressivity import MODELS, expressivity
from hqlt.recipes.quickstart import TextRecipe, quickstart_parity, quickstart_text
from hqlt.recipes.settings import PRESETS

__all__ = ["MODELS", "PRESETS", "TextRecipe", "expressivity", "quickstart_parity", "quickstart_text"]
