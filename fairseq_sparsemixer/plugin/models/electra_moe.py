"""`electra_moe`: ELECTRA (Clark et al., 2020; arXiv 2003.10555) with experts in the discriminator.

A small dense generator fills in masked tokens. The discriminator predicts for each token whether it was replaced, and is
the model to fine-tune. Both share the embeddings, through a projection if their width differs.

B sentences, T tokens, N of them masked, V words.
"""

import copy
from argparse import ArgumentParser
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
from fairseq import utils
from fairseq.models import register_model
from fairseq.models.roberta.model import RobertaEncoder, RobertaLMHead
from fairseq.modules import LayerNorm, PositionalEmbedding
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.plugin.models import roberta_moe
from fairseq_sparsemixer.plugin.models.architectures import fill, register_architecture
from fairseq_sparsemixer.plugin.models.config import refuse
from fairseq_sparsemixer.plugin.models.roberta_moe import RobertaMoEEncoder, RobertaMoEModel
from fairseq_sparsemixer.ranges import COUNT, POSITIVE, broken_rule


class ElectraOutput(NamedTuple):
    """The output of a pre-training forward.

    generator_logits: [N, V], one row per masked token, in row-major order of the batch. scores: [B, T], the
    discriminator's logits that a token was replaced. replaced: [B, T] bool, whether it was.
    """

    generator_logits: Tensor
    scores: Tensor
    replaced: Tensor


class ElectraEmbedding(nn.Module):
    """Normalised token plus position embedding, shared by generator and discriminator. The encoder applies dropout."""

    def __init__(self, num_words: int, embedding_dim: int, padding_idx: int, max_positions: int):
        super().__init__()
        self.tokens = nn.Embedding(num_words, embedding_dim, padding_idx)
        self.positions = PositionalEmbedding(max_positions, embedding_dim, padding_idx, learned=True)
        self.layer_norm = LayerNorm(embedding_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, embedding_dim]."""
        return self.layer_norm(self.tokens(tokens) + self.positions(tokens))


class ProjectedEmbedding(nn.Module):
    """A shared embedding projected to one model's width, replacing the nn.Embedding that fairseq's encoder expects."""

    def __init__(self, shared: ElectraEmbedding, width: int):
        super().__init__()
        self.shared = shared
        self.embedding_dim, self.padding_idx = width, shared.tokens.padding_idx
        same = width == shared.tokens.embedding_dim
        self.projection = nn.Identity() if same else nn.Linear(shared.tokens.embedding_dim, width)

    @property
    def weight(self) -> Tensor:
        """[V, embedding_dim], tied to the generator's output layer."""
        return self.shared.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, width]."""
        return self.projection(self.shared(tokens))


class GeneratorHead(RobertaLMHead):
    """fairseq's masked-LM head for a model whose width differs from its embeddings': the first layer changes the width."""

    def __init__(self, embed_dim: int, output_dim: int, activation_fn: str, weight: Optional[Tensor], embedding_dim: int):
        super().__init__(embedding_dim, output_dim, activation_fn, weight)
        self.dense = nn.Linear(embed_dim, embedding_dim)


class DiscriminatorHead(nn.Module):
    """Two layers with one score per token: the logit that it was replaced."""

    def __init__(self, embed_dim: int, activation_fn: str):
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.activation_fn = utils.get_activation_fn(activation_fn)
        self.score = nn.Linear(embed_dim, 1)

    def forward(self, features: Tensor, masked_tokens: Optional[Tensor] = None) -> Tensor:
        """features [B, T, M] -> [B, T]."""
        return self.score(self.activation_fn(self.dense(features))).squeeze(-1)


class ElectraEncoder(RobertaMoEEncoder):
    """The common base of generator and discriminator: an encoder on the shared embedding."""

    def __init__(self, args: Any, dictionary: Any, shared: ElectraEmbedding):
        self.__dict__["shared"] = shared  # for the hook below, which registers it as a module
        super().__init__(args, dictionary)

    def build_embedding(self, vocab_size: int, embedding_dim: int, padding_idx: int) -> ProjectedEmbedding:
        """See RobertaEncoder."""
        return ProjectedEmbedding(self.shared, embedding_dim)


class Generator(ElectraEncoder):
    """Logits [N, V] of the masked tokens."""

    def build_lm_head(self, embed_dim: int, output_dim: int, activation_fn: str, weight: Optional[Tensor]) -> nn.Module:
        """See RobertaEncoder."""
        return GeneratorHead(embed_dim, output_dim, activation_fn, weight, self.shared.tokens.embedding_dim)


class Discriminator(ElectraEncoder):
    """Scores [B, T]: the logits that a token was replaced."""

    def build_lm_head(self, embed_dim: int, output_dim: int, activation_fn: str, weight: Optional[Tensor]) -> nn.Module:
        """See RobertaEncoder."""
        return DiscriminatorHead(embed_dim, activation_fn)


@torch.no_grad()
def corrupt(src_tokens: Tensor, target: Tensor, logits: Tensor, padding_idx: int) -> Tuple[Tensor, Tensor]:
    """The discriminator's input: masked tokens replaced by samples from the generator (Gumbel-max).

    src_tokens, target [B, T], where target is the original word at masked tokens and padding elsewhere; logits [N, V].
    Returns (tokens [B, T], replaced [B, T]). A sample equal to the original word counts as not replaced (section 2).
    Padding is never sampled, because it would hide the token from the discriminator.
    """
    gumbel = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()
    noisy = logits.float() + gumbel
    noisy[:, padding_idx] = -torch.inf
    masked = target.ne(padding_idx)
    tokens = src_tokens.masked_scatter(masked, noisy.argmax(-1))
    return tokens, masked & tokens.ne(target)


@register_model("electra_moe")
class ElectraMoEModel(RobertaMoEModel):
    """ELECTRA. `encoder` is the discriminator; `generator` exists only in pre-training."""

    def __init__(self, args: Any, discriminator: RobertaEncoder, generator: RobertaEncoder):
        super().__init__(args, discriminator)
        self.generator: Optional[RobertaEncoder] = generator
        generator.apply(init_bert_params)

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """roberta_moe's flags and ELECTRA's own."""
        super().add_args(parser)
        parser.add_argument(
            "--embedding-dim", type=int, metavar="D", help="width of the shared embeddings (default: --encoder-embed-dim)"
        )
        parser.add_argument(
            "--generator-size", type=float, metavar="R", help="the generator's widths and heads as a share of the discriminator's"
        )

    @classmethod
    def complete(cls, args: Any, task: Any) -> None:
        """See RobertaMoEModel."""
        super().complete(args, task)
        base(args)

    @classmethod
    def assemble(cls, args: Any, dictionary: Any) -> "ElectraMoEModel":
        """See RobertaMoEModel."""
        small = generator_args(args)
        shared = ElectraEmbedding(len(dictionary), args.embedding_dim, dictionary.pad(), args.max_positions)
        return cls(args, Discriminator(args, dictionary, shared), Generator(small, dictionary, shared))

    def forward(self, src_tokens: Tensor, *args, target: Optional[Tensor] = None, **kwargs):
        """With target [B, T] from fairseq's masked_lm task (pre-training): an ElectraOutput.

        Without target: only the discriminator, as in RobertaModel.forward.
        """
        if target is None:
            return super().forward(src_tokens, *args, **kwargs)
        padding_idx = self.encoder.dictionary.pad()
        logits, _ = self.generator(src_tokens, masked_tokens=target.ne(padding_idx))  # type: ignore[misc]  # pre-training has one
        tokens, replaced = corrupt(src_tokens, target, logits, padding_idx)
        scores, _ = self.encoder(tokens)
        return ElectraOutput(logits, scores, replaced)

    def register_classification_head(self, *args, **kwargs) -> None:
        """See RobertaModel. A model that gets a head is fine-tuned and no longer needs its generator."""
        super().register_classification_head(*args, **kwargs)
        self.generator = None

    def upgrade_state_dict_named(self, state_dict: Dict[str, Tensor], name: str) -> None:
        """See RobertaModel. Drops a pre-trained generator if this model has none."""
        super().upgrade_state_dict_named(state_dict, name)
        if self.generator is None:
            prefix = f"{name}.generator." if name else "generator."
            for key in [key for key in state_dict if key.startswith(prefix)]:
                del state_dict[key]


def generator_args(args: Any) -> Any:
    """The generator's args: as deep as the discriminator, generator_size times as wide, without experts.

    Raises ConfigurationError for an invalid size.
    """
    for name, rule in (("generator_size", POSITIVE), ("embedding_dim", COUNT)):
        refuse(broken_rule(f"--{name.replace('_', '-')}", getattr(args, name), rule))
    small = copy.copy(args)
    small.router = DENSE
    for name in ("encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads"):
        setattr(small, name, round(getattr(args, name) * args.generator_size))
    heads, width = small.encoder_attention_heads, small.encoder_embed_dim
    if heads < 1 or width < 1 or width % heads:
        raise ConfigurationError(
            f"--generator-size {args.generator_size} gives the generator {heads} attention heads for a width of {width};"
            " choose a share of --encoder-embed-dim and --encoder-attention-heads that divides both"
        )
    return small


@register_architecture("electra_moe", "electra_moe", "electra_moe_base")
def base(args: Any) -> None:
    """ELECTRA-Base (Table 6 of the paper) with experts: 12 layers of width 768, the generator a third as wide."""
    fill(args, generator_size=1 / 3)
    args.layernorm_embedding, args.no_token_positional_embeddings = False, True  # ElectraEmbedding has both
    roberta_moe.base(args)
    fill(args, embedding_dim=args.encoder_embed_dim)


@register_architecture("electra_moe", "electra_moe_small")
def small(args: Any) -> None:
    """ELECTRA-Small (Table 6) with experts: 12 layers of width 256, embeddings of 128, the generator a quarter as wide."""
    fill(args, encoder_layers=12, encoder_embed_dim=256, encoder_ffn_embed_dim=1024, encoder_attention_heads=4)
    fill(args, embedding_dim=128, generator_size=1 / 4)
    base(args)


@register_architecture("electra_moe", "electra_moe_tiny")
def tiny(args: Any) -> None:
    """2 layers of width 64, embeddings of 32, the generator half as wide; for tests."""
    fill(args, encoder_layers=2, encoder_embed_dim=64, encoder_ffn_embed_dim=128, encoder_attention_heads=2)
    fill(args, embedding_dim=32, generator_size=1 / 2)
    base(args)
