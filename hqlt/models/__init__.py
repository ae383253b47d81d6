"""Language models and the formats they are read from."""

from hqlt.models.decoding import Decoder
from hqlt.models.language_model import LanguageModel, SequenceModel
from hqlt.models.reference_checkpoints import layer_from_reference, model_from_reference

__all__ = ["Decoder", "LanguageModel", "SequenceModel", "layer_from_reference", "model_from_reference"]
