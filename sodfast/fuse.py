"""The inference form of a network: normalisation folded, and the whole of it as a plan."""

import copy
from itertools import pairwise

import torch
from torch import nn

from .cuda_graph import GraphedNetwork, check_cuda
from .nn import DilatedBank, GOctConv, NormAct, SimplifiedGOctConv
from .plan import make_plan
from .weights import flush_denormals


def fuse(model: nn.Module, cuda_graph: bool = False) -> nn.Module:
    """Return the inference form of a model: same call, same result to 5e-5.

    Every convolution named in a module's ``fusable_pairs`` takes over the batch normalisation
    (folded in float64, as variances are near 1e-4), the weight gain and the PReLU of its
    :class:`~sodfast.nn.NormAct`. So does every Conv2d with a BatchNorm2d, where
    ``fusable_pairs`` names them or a Sequential has one after the other. The result is a copy
    in eval mode without state: several threads may call it. It cannot be trained further; fuse
    again after training.

    Args:
        model: any module; what has no such pairs stays as it is.
        cuda_graph: capture the network on a GPU at the first call with a shape and dtype, and
            replay it from then on; see :class:`sodfast.cuda_graph.GraphedNetwork`, which is
            then returned and takes tensors on a CUDA device only.

    Returns:
        For a model that knows its steps (it has ``add_to``, as csnet, extractor, vanilla, and
        scfnet on MobileNetV3 or EfficientNet-Lite0 have) a :class:`sodfast.plan.Plan`, which runs
        the whole network as one op and can be saved as a file that needs no Python. For any
        other module its copy, which runs layer by layer.

    Raises:
        TypeError: a pair names something that cannot be fused.
        RuntimeError: ``cuda_graph`` where torch finds no CUDA device.
    """
    if cuda_graph:
        check_cuda()
    fused = copy.deepcopy(model).eval()
    for module in list(fused.modules()):
        for conv_name, norm_name in _pairs(module):
            conv = module if conv_name == "self" else getattr(module, conv_name)
            norm = getattr(module, norm_name)
            if isinstance(norm, nn.Identity):  # fused before
                continue
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                _fold_batch_norm(conv, norm)
                setattr(module, norm_name, nn.Identity())
                continue
            if not isinstance(norm, NormAct) or not isinstance(
                conv, (GOctConv, SimplifiedGOctConv, DilatedBank)
            ):
                raise TypeError(
                    f"{type(module).__name__}.fusable_pairs names ({conv_name!r}, {norm_name!r}): "
                    f"a {type(conv).__name__} and a {type(norm).__name__} cannot be fused"
                )
            _fold(conv, norm)
            setattr(module, norm_name, nn.Identity())
    network = make_plan(fused.requires_grad_(False))
    return GraphedNetwork(network) if cuda_graph else network


def _pairs(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """The names of convolutions in a module and of the norms that follow them."""
    if not isinstance(module, nn.Sequential):
        return tuple(getattr(module, "fusable_pairs", ()))
    named = list(module.named_children())
    return tuple(
        (conv_name, norm_name)
        for (conv_name, conv), (norm_name, norm) in pairwise(named)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    )


@torch.no_grad()
def _fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Moves γ (W x + b − μ) / sqrt(σ² + ε) + β into the convolution."""
    if norm.running_mean is None or norm.running_var is None:
        raise TypeError("a BatchNorm2d without running statistics cannot be fused")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale *= norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        shift += norm.bias.double()
    if conv.bias is not None:
        shift += conv.bias.double() * scale
    weight = conv.weight
    weight.copy_(flush_denormals(weight.double() * scale.view(-1, 1, 1, 1)))
    conv.bias = nn.Parameter(flush_denormals(shift).to(weight.dtype))


@torch.no_grad()
def _fold(conv: GOctConv | SimplifiedGOctConv | DilatedBank, norm: NormAct) -> None:
    """Move γ (W x + b − μ) / sqrt(σ² + ε) + β and the PReLU after it into the convolution."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if conv.bias is not None:
        shift += conv.bias.double() * scale
    rows = scale * getattr(conv, "weight_gain", 1.0)
    if isinstance(conv, DilatedBank):
        per_scale = rows.split([weight.shape[0] for weight in conv.weights])
        for weight, row in zip(conv.weights, per_scale):
            weight.copy_(flush_denormals(weight.double() * row.view(-1, 1, 1, 1)))
    else:
        conv.weight.copy_(flush_denormals(conv.weight.double() * rows.view(-1, 1, 1, 1)))
    if not isinstance(conv, GOctConv):
        conv.weight_gain = 1.0
    # Buffers now, also what was a learned bias: nothing here is trained any more.
    del conv.bias, conv.slope
    conv.register_buffer("bias", flush_denormals(shift).to(norm.bias.dtype))
    conv.register_buffer("slope", flush_denormals(norm.slope.detach()))
