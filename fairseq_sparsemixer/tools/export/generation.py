"""The generation config with which `generate` of transformers decodes as fairseq-generate does.

    fairseq                                                        generation_config.json
    --beam B; ends with B finished hypotheses                      num_beams, early_stopping
    score / length ^ --lenpen, the length with </s>                length_penalty
    at most --max-len-b words, and the model's positions - 1       max_length: two more, </s> at either end
    </s> is forced after that                                      forced_eos_token_id
    --min-len 1: the first word is not </s>                        min_new_tokens
    <pad> is never generated                                       suppress_tokens

One difference is left: transformers scores a forced </s> with probability 1, fairseq with the model's. It can matter only for
hypotheses that reach the maximum length.
"""

from dataclasses import dataclass
from typing import Any, Dict

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.ranges import COUNT, Rule, broken_rule

BOS, PAD, EOS = 0, 1, 2  # in every dictionary of fairseq
SPECIAL: Dict[str, Any] = {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS}


@dataclass
class Decoding:
    """The flags of fairseq-generate, with its defaults. Raises ConfigurationError for a value out of range."""

    beam: int = 5
    lenpen: float = 1.0
    max_len_b: int = 200

    def __post_init__(self) -> None:
        finite = Rule(lambda x: abs(x) < float("inf"), "be finite")
        for name, rule in (("beam", COUNT), ("lenpen", finite), ("max_len_b", COUNT)):
            sentence = broken_rule(f"--{name.replace('_', '-')}", getattr(self, name), rule, "")
            if sentence:
                raise ConfigurationError(sentence)


def generation_config(decoding: Decoding, max_positions: int) -> Dict[str, Any]:
    """See the top of this file. max_positions: those of the decoder."""
    return {
        **SPECIAL,
        "decoder_start_token_id": EOS,
        "num_beams": decoding.beam,
        "early_stopping": decoding.beam > 1,
        "length_penalty": decoding.lenpen,
        "max_length": min(decoding.max_len_b, max_positions - 1) + 2,
        "min_new_tokens": 1,
        "forced_eos_token_id": EOS,
        "suppress_tokens": [PAD],
    }
