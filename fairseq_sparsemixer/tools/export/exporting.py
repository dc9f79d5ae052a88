"""One function for all models."""

from typing import Optional

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.export.generation import Decoding
from fairseq_sparsemixer.tools.export.language_model import export_language_model
from fairseq_sparsemixer.tools.export.masked_lm import export_masked_lm
from fairseq_sparsemixer.tools.export.sequence_to_sequence import export_translation
from fairseq_sparsemixer.tools.export.source import Export, Source

TRANSLATION = ("transformer", "transformer_moe")


def export(source: Source, decoding: Optional[Decoding] = None, dense_as_experts: bool = False) -> Export:
    """The export of a checkpoint. Raises ConfigurationError, naming the flag, for what transformers does not have."""
    if source.kind in TRANSLATION:
        return export_translation(source, decoding or Decoding(), dense_as_experts)
    if source.kind in ("transformer_lm", "transformer_lm_moe"):
        return export_language_model(source)
    if source.kind in ("roberta", "roberta_moe"):
        return export_masked_lm(source)
    raise ConfigurationError(f"the checkpoint is of the model {source.kind}, of which transformers has no counterpart")
