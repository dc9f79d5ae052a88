"""The layers to compare. Each builder takes a Shape and returns a Contender, which runs forward and backward as in training.

Peers that are not installed are loaded from a checkout given on the command line; none of their code is kept here.
"""

import importlib.util
import sys
import warnings
from argparse import Namespace
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from fairseq_sparsemixer import build_moe_layer
from fairseq_sparsemixer.moe.gradient_memory import GradBufferPool

AUX_WEIGHT = 0.01  # weight of the balance loss, as in training


class Shape(NamedTuple):
    """tokens S, experts E, experts per token k, model_dim M, hidden_dim H of an expert."""

    tokens: int
    experts: int
    top_k: int
    model_dim: int
    hidden_dim: int

    @property
    def flops(self) -> int:
        """Multiplications and additions of the active matrix products, forward and backward."""
        return 12 * self.tokens * self.top_k * self.model_dim * self.hidden_dim

    def weight_bytes(self, experts: Optional[int] = None) -> int:
        """Bytes of the feed-forward weights in float32."""
        return 8 * (self.experts if experts is None else experts) * self.model_dim * self.hidden_dim


class NotRunnable(Exception):
    """This contender cannot run here; the message says why."""


Forward = Callable[[Tensor], Tuple[Tensor, Optional[Tensor]]]  # x [S, M] -> output [S, M], balance loss


class Contender(NamedTuple):
    """A module and how to call it."""

    module: nn.Module
    forward: Forward

    def forget_memory(self) -> None:
        """Release the gradient buffers that our experts keep between steps, so that they count as memory of the next step."""
        for module in self.module.modules():
            if hasattr(module, "gradient_memory"):
                module.gradient_memory = GradBufferPool()

    def step(self, x: Tensor, upstream: Tensor) -> None:
        """Forward and backward with newly allocated gradients, as in fairseq."""
        self.module.zero_grad(set_to_none=True)
        x.grad = None
        output, aux = self.forward(x)
        outputs, grads = [output], [upstream]
        if aux is not None:
            outputs.append(aux)
            grads.append(torch.full_like(aux, AUX_WEIGHT))
        torch.autograd.backward(outputs, grads)


def feed_forward(model_dim: int, hidden_dim: int) -> nn.Sequential:
    """fairseq's feed-forward network: fc2(relu(fc1(x)))."""
    return nn.Sequential(nn.Linear(model_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, model_dim))


def dense(shape: Shape) -> Contender:
    """A feed-forward network with the same active FLOPs: hidden dimension k * H."""
    module = feed_forward(shape.model_dim, shape.top_k * shape.hidden_dim)
    return Contender(module, lambda x: (module(x), None))


def ours(shape: Shape, router: Optional[str] = None) -> Contender:
    """This package's layer: SparseMixer for one expert per token, SparseMixer-v2 for more."""
    options = {} if shape.top_k == 1 else {"top_k": shape.top_k}
    router = router or ("sparsemixer" if shape.top_k == 1 else "sparsemixer_v2")
    layer = build_moe_layer(router, shape.model_dim, shape.hidden_dim, shape.experts, **options)
    return Contender(layer, lambda x: (layer(x), layer.l_aux))


def single_rank_group() -> Any:
    """A process group with this process only; fairscale and fairseq's branch require one."""
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=0, world_size=1)
    return dist.group.WORLD


def fairscale(shape: Shape) -> Contender:
    """fairscale's MOELayer with its Top2Gate: always two experts per token, capacity 2 S / E."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fairscale.nn.moe import MOELayer, Top2Gate
    if shape.top_k != 2:
        raise NotRunnable("its gate always uses two experts per token")
    if 2 * shape.tokens % shape.experts or shape.tokens % shape.experts:
        raise NotRunnable("it needs a token count divisible by the number of experts")
    group = single_rank_group()
    experts = nn.ModuleList([feed_forward(shape.model_dim, shape.hidden_dim) for _ in range(shape.experts)])
    layer = MOELayer(Top2Gate(shape.model_dim, shape.experts), experts, group=group)

    def forward(x: Tensor):
        output = layer(x.unsqueeze(1))
        return output.squeeze(1), layer.l_aux

    return Contender(layer, forward)


def sparsemixer_official(shape: Shape, path: Path) -> Contender:
    """The feed-forward part of microsoft/SparseMixer's encoder layer: its own forward without attention and norms."""
    if shape.top_k != 1:
        raise NotRunnable("it always uses one expert per token")
    load_package("sparsemixer", path / "sparsemixer")
    module = load_package("peer_sparsemixer_layer", path / "example" / "moe" / "transformer_switch_layer.py")
    args = Namespace(
        encoder_embed_dim=shape.model_dim, encoder_ffn_embed_dim=shape.hidden_dim, encoder_attention_heads=8,
        num_experts=shape.experts, load_balancing=True, router="sparsemixer", jitter_eps=0.1, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, relu_dropout=0.0, activation_fn="relu",
        encoder_normalize_before=False, quant_noise_pq=0,
    )  # fmt: skip
    layer = module.SwitchTransformerEncoderLayer(args, layer_idx=0)
    layer.self_attn = _PassQuery()
    layer.self_attn_layer_norm = layer.final_layer_norm = nn.Identity()
    layer.residual_connection = lambda x, residual: x

    def forward(x: Tensor):
        output, _, balance = layer(x.unsqueeze(1), None)
        return output.squeeze(1), balance

    return Contender(layer, forward)


class _PassQuery(nn.Module):
    def forward(self, query: Tensor, **_: Any):
        return query, None


def fairseq_moe(shape: Shape, path: Path) -> Contender:
    """The MOELayer of fairseq's `moe` branch with its own gate, which drops tokens beyond its default capacity."""
    from fairseq import distributed_utils  # noqa: F401  the branch's files import it from the installed fairseq

    moe = load_package("peer_fairseq_moe", path / "fairseq" / "modules" / "moe")
    group = single_rank_group()
    gate = {1: moe.Top1Gate, 2: moe.Top2Gate}.get(shape.top_k)
    if gate is None:
        raise NotRunnable("its gates use one or two experts per token")
    experts = nn.ModuleList([feed_forward(shape.model_dim, shape.hidden_dim) for _ in range(shape.experts)])
    layer = moe.MOELayer(gate(shape.model_dim, shape.experts), experts, Namespace(), group=group, all2all_group=group)

    def forward(x: Tensor):
        with cuda_stand_ins():
            output, aux = layer(x.unsqueeze(1))
        return output.squeeze(1), aux

    return Contender(layer, forward)


@contextmanager
def cuda_stand_ins() -> Iterator[None]:
    """Without a GPU, replace the CUDA functions that the branch's layer needs for its statistics, so that it runs.

    Its events measure nothing, and its histograms use floating-point numbers, because torch.histc on CPUs takes no others.
    """
    if torch.cuda.is_available():
        yield
        return
    histogram = torch.histc
    with ExitStack() as stack:
        for name, stand_in in {
            "torch.histc": lambda values, *args, **options: histogram(values.float(), *args, **options),
            "torch.cuda.Event": mock.MagicMock,
            "torch.cuda.synchronize": lambda: None,
        }.items():
            stack.enter_context(mock.patch(name, stand_in))
        yield


def tutel(shape: Shape, path: Path) -> Contender:
    """Microsoft's Tutel."""
    layer = import_for_gpu(path, "tutel.moe").moe_layer(
        gate_type={"type": "top", "k": shape.top_k, "capacity_factor": 0},
        model_dim=shape.model_dim,
        experts={"type": "ffn", "num_experts_per_device": shape.experts, "hidden_size_per_expert": shape.hidden_dim},
    )

    def forward(x: Tensor):
        output = layer(x)
        return output, output.l_aux

    return Contender(layer, forward)


def megablocks(shape: Shape, path: Path) -> Contender:
    """MegaBlocks' dropless layer, with its balance loss, which it keeps in a list until asked for."""
    dmoe, moe = (import_for_gpu(path, f"megablocks.layers.{name}") for name in ("dmoe", "moe"))
    options = import_for_gpu(path, "megablocks.layers.arguments").Arguments(
        hidden_size=shape.model_dim, ffn_hidden_size=shape.hidden_dim, moe_num_experts=shape.experts,
        moe_top_k=shape.top_k, moe_loss_weight=1.0, bf16=True, fp16=False, activation_fn=F.relu,
    )  # fmt: skip
    layer = dmoe.dMoE(options)

    def forward(x: Tensor):
        moe.clear_load_balancing_loss()
        output, _ = layer(x.unsqueeze(1))
        return output.squeeze(1), moe.batched_load_balancing_loss(options)

    return Contender(layer, forward)


def megatron(shape: Shape, path: Path) -> Contender:
    """Megatron-Core's layer with grouped experts of Transformer Engine and its all-to-all; it adds its balance loss itself."""
    import_for_gpu(path, "transformer_engine")  # without it, the layer loops over experts
    state = import_for_gpu(path, "megatron.core.parallel_state")
    single_rank_group()
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel()
        import_for_gpu(path, "megatron.core.tensor_parallel.random").model_parallel_cuda_manual_seed(1)
    config = import_for_gpu(path, "megatron.core.transformer.transformer_config").TransformerConfig(
        num_layers=1, num_attention_heads=1, hidden_size=shape.model_dim, moe_ffn_hidden_size=shape.hidden_dim,
        num_moe_experts=shape.experts, moe_router_topk=shape.top_k, moe_aux_loss_coeff=AUX_WEIGHT, moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall", moe_permute_fusion=True, add_bias_linear=False, activation_func=F.relu,
        params_dtype=torch.bfloat16, bf16=True,
    )  # fmt: skip
    specs = import_for_gpu(path, "megatron.core.models.gpt.moe_module_specs")
    layer = specs.get_moe_module_spec(use_te=True, num_experts=shape.experts, moe_grouped_gemm=True)(config=config)
    return Contender(layer, lambda x: (layer(x.unsqueeze(1))[0].squeeze(1), None))


PEERS: Dict[str, Callable[[Shape, Path], Contender]] = {
    "sparsemixer": sparsemixer_official,
    "fairseq-moe": fairseq_moe,
    "tutel": tutel,
    "megablocks": megablocks,
    "megatron": megatron,
}


def import_for_gpu(path: Path, name: str) -> ModuleType:
    """Import a GPU-only module from a checkout at path. Raises NotRunnable if it cannot be imported."""
    if not torch.cuda.is_available():
        raise NotRunnable("it needs a GPU")
    sys.path.insert(0, str(path))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotRunnable(f"{error}") from None


def load_package(name: str, path: Path) -> ModuleType:
    """Load the module or package at path under the given name. Raises NotRunnable if it does not exist or cannot be imported."""
    if name in sys.modules:
        return sys.modules[name]
    file = path / "__init__.py" if path.is_dir() else path
    if not file.is_file():
        raise NotRunnable(f"no {file}")
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(path)] if path.is_dir() else None)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[name]
        raise NotRunnable(f"{error}") from None
    return module
