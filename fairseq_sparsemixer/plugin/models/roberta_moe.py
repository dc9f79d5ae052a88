"""`roberta_moe`: fairseq's RoBERTa with experts in chosen layers of its encoder."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any, Dict

from fairseq import utils
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model
from fairseq.models.roberta import model as roberta
from fairseq.models.roberta.model import RobertaEncoder, RobertaModel
from fairseq.modules import LearnedPositionalEmbedding
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.models.architectures import fill, fill_defaults, register_architecture, settable
from fairseq_sparsemixer.plugin.models.config import check_options
from fairseq_sparsemixer.plugin.models.hydra import check_option_names
from fairseq_sparsemixer.plugin.models.loading import ChecksCheckpoints
from fairseq_sparsemixer.plugin.models.moe_block import RemembersUpdates
from fairseq_sparsemixer.plugin.models.transformer_moe import MoEEncoder, TransformerMoEConfig

BERT_STD = 0.02  # of BERT's initial weights (arXiv 1810.04805), as in fairseq's init_bert_params


@dataclass
class MoEFlags(MoEOptions, FairseqDataclass):
    """MoEOptions as a dataclass from which fairseq can generate flags."""


def init_bert_experts(module: nn.Module) -> None:
    """Initialise experts as fairseq's init_bert_params does feed-forward layers."""
    if isinstance(module, Experts):
        for weight in (module.weight_in, module.weight_out):
            nn.init.normal_(weight, std=BERT_STD)
        for bias in (module.bias_in, module.bias_out):
            nn.init.zeros_(bias)


class RobertaMoEEncoder(RobertaEncoder):
    """fairseq's RobertaEncoder around an encoder with experts."""

    def build_encoder(self, args: Any, dictionary: Any, embed_tokens: nn.Module) -> MoEEncoder:
        """See RobertaEncoder."""
        return MoEEncoder(TransformerMoEConfig.from_namespace(args), dictionary, embed_tokens)


@register_model("roberta_moe")
class RobertaMoEModel(ChecksCheckpoints, RemembersUpdates, RobertaModel):
    """fairseq's RoBERTa with experts; with `--router dense`, the plain model."""

    def __init__(self, args: Any, encoder: RobertaEncoder):
        super().__init__(args, encoder)
        self.apply(init_bert_experts)

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """RoBERTa's flags, then one per field of MoEOptions; the architectures below set the defaults."""
        RobertaModel.add_args(parser)
        parser.add_argument("--checkpoint-activations", action="store_true", help="recompute activations in the backward pass")
        parser.add_argument("--offload-activations", action="store_true", help="keep checkpointed activations on the CPU")
        gen_parser_from_dataclass(parser, MoEFlags(), delete_default=True)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "RobertaMoEModel":
        """See RobertaModel. Raises ConfigurationError for invalid options."""
        check_option_names(args, cls, base)
        with settable(args):
            cls.complete(args, task)
        check_options(args, {"encoder": args.encoder_layers})
        check_pruning(args)
        if OmegaConf.is_config(args):  # the model uses hasattr(args, name), which is always true for a config of omegaconf 2.0
            args = Namespace(**{name: args[name] for name in args})
        return cls.assemble(args, task.source_dictionary)

    @classmethod
    def assemble(cls, args: Any, dictionary: Any) -> "RobertaMoEModel":
        """Build the model from complete and checked args."""
        return cls(args, RobertaMoEEncoder(args, dictionary))

    @classmethod
    def complete(cls, args: Any, task: Any) -> None:
        """Complete args by fairseq's and the experts' defaults, and the maximum length that the task needs."""
        if not utils.safe_hasattr(args, "max_positions"):
            # fairseq 0.12.2's masked_lm task reports no maximum; it only has the setting
            of_task = task.max_positions() or utils.safe_getattr(task.cfg, "tokens_per_sample")
            args.max_positions = utils.safe_getattr(args, "tokens_per_sample", of_task)
        if getattr(args, "offload_activations", False):
            args.checkpoint_activations = True
        base(args)

    def load_state_dict(self, state_dict: Dict[str, Tensor], *args, **kwargs):
        """See ChecksCheckpoints. Also exits with one sentence if the checkpoint has another number of positions."""
        check_positions(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)


def check_positions(model: nn.Module, state_dict: Dict[str, Tensor]) -> None:
    """Raise SystemExit (for the reason, see check_checkpoint_fits) if the position tables differ in length."""
    for name, module in model.named_modules():
        found = state_dict.get(f"{name}.weight")
        if isinstance(module, LearnedPositionalEmbedding) and found is not None and len(found) != len(module.weight):
            unused = len(module.weight) - module.max_positions  # fairseq's positions start after the padding index
            raise SystemExit(
                f"fairseq-sparsemixer: the checkpoint has {len(found) - unused} positions, but the flags say"
                f" {module.max_positions}; give --max-positions {len(found) - unused}"
            )


def check_pruning(args: Any) -> None:
    """Raise ConfigurationError for fairseq's pruning of feed-forward layers, which needs weights that experts do not have."""
    off = {"ffn_reg_scale_factor": 0.0, "ffn_blocks_to_remove": -1}
    for name, value in off.items():
        if args.router != DENSE and utils.safe_getattr(args, name, value) != value:
            raise ConfigurationError(
                f"--{name.replace('_', '-')} {getattr(args, name)} prunes fairseq's own feed-forward layers; leave it out,"
                " or use --router dense"
            )


@register_architecture("roberta_moe", "roberta_moe", "roberta_moe_base")
def base(args: Any) -> None:
    """RoBERTa-base with experts: 12 layers, width 768."""
    fill_defaults(args, MoEOptions)
    roberta.base_architecture(args)


@register_architecture("roberta_moe", "roberta_moe_tiny")
def tiny(args: Any) -> None:
    """2 layers of width 64; for tests."""
    fill(args, encoder_layers=2, encoder_embed_dim=64, encoder_ffn_embed_dim=128, encoder_attention_heads=2)
    base(args)


@register_architecture("roberta_moe", "roberta_moe_large")
def large(args: Any) -> None:
    """RoBERTa-large with experts: 24 layers, width 1024."""
    fill_defaults(args, MoEOptions)
    roberta.roberta_large_architecture(args)
