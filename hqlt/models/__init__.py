"""Language models and the formats they are read from."""

from hqlt.models.language_model import LanguageModel, SequenceModel
from hqlt.models.reference_checkpoints import layer_from_reference, model_from_reference

__all__ = ["LanguageModel", "SequenceModel", "layer_from_reference", "model_from_reference"]
