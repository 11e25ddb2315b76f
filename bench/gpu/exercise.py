"""Every CUDA kernel on small odd shapes, once per dtype: what the sanitizers watch."""

from __future__ import annotations

import torch
from torch import Tensor

import sodfast
from sodfast.ops import (
    adam_decay_,
    boundary,
    decay_,
    dkd_loss,
    dkd_theta,
    goctconv,
    goctconv_depthwise,
    goctconv_dilated,
    goctconv_measured,
    goctconv_norm_act,
    goctconv_norm_depthwise,
    goctconv_update_stats_,
    ilblock,
    scfm,
    structure_polishing_sums,
)


def maps(channels: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(
            2, c, size[0] >> i, size[1] >> i, device="cuda", dtype=dtype, requires_grad=True
        )
        for i, c in enumerate(channels)
    ]


def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(shape, device="cuda", dtype=dtype, requires_grad=True)


def differentiate(ys: list[Tensor]) -> None:
    sum(y.float().square().sum() for y in ys).backward()


def main() -> None:
    torch.manual_seed(0)
    channels, outs = (5, 3, 2), (34, 4, 3)
    n, total, size = sum(outs), sum(channels), (20, 28)
    with sodfast.use_backend("cuda"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for kernel, stride in ((1, 1), (3, 1), (1, 2), (3, 2)):
                weight = tensor(n, total, kernel, kernel, dtype=dtype)
                large = (size[0] * stride, size[1] * stride)
                differentiate(goctconv(maps(channels, large, dtype), weight, outs, stride))
                ys, moments = goctconv_measured(maps(channels, large, dtype), weight, outs, stride)
                differentiate(ys)
                assert moments.isfinite().all()
                with torch.no_grad():
                    vectors = tensor(n, dtype=dtype), tensor(n, dtype=dtype)
                    goctconv(maps(channels, large, dtype), weight, outs, stride, *vectors)
                    layers = [weight, *(tensor(n, 1, 3, 3, dtype=dtype) for _ in range(2))]
                    vectors = [tensor(n, dtype=dtype) for _ in range(3)]
                    ilblock(maps(channels, large, dtype), layers, vectors, vectors, outs, stride)
            odd = maps((4,), (37, 43), dtype)
            differentiate(goctconv(odd, tensor(3, 4, 3, 3, dtype=dtype), (3,), 2))
            for dilation in (1, 2, 99):
                weight = tensor(total, 1, 3, 3, dtype=dtype)
                differentiate(goctconv_depthwise(maps(channels, size, dtype), weight, dilation))
                differentiate(goctconv_depthwise(odd, tensor(4, 1, 3, 3, dtype=dtype), dilation))
            branches = [[1, 0, 9], [2, 3, 0], [0, 0, 1]]
            weights = [tensor(sum(b), c, 3, 3, dtype=dtype) for b, c in zip(branches, channels)]
            differentiate(
                goctconv_dilated(maps(channels, size, dtype), weights, (1, 4, 16), branches)
            )
            for maps_size in (size, (80, 60)):
                for training in (True, False):
                    vectors = [tensor(total, dtype=dtype) for _ in range(5)]
                    ys, mean, var, means = goctconv_norm_act(
                        maps(channels, maps_size, dtype), *vectors, training
                    )
                    differentiate(ys)
                    kernel = tensor(total, 1, 3, 3, dtype=dtype)
                    ys, _, _, _, moments = goctconv_norm_depthwise(
                        maps(channels, maps_size, dtype), *vectors, kernel, None, training
                    )
                    moments = moments if training else None
                    differentiate(goctconv_norm_act(ys, *vectors, training, moments=moments)[0])
                    ys = goctconv_norm_depthwise(ys, *vectors, kernel, moments, training)[0]
                    differentiate(ys)
            running = [v.detach() for v in vectors[3:]]
            goctconv_update_stats_(*running, mean, var, channels, (9, 5, 1))
            layers = [torch.rand(c, device="cuda", dtype=dtype) for c in (3, 70)]
            samples = [torch.rand(5, len(w), device="cuda", dtype=dtype) for w in layers]
            copies = [[w.clone() for w in layers] for _ in range(3)]
            decay_(layers, samples, 0.1)
            decay_(layers, samples, 0.1, copies[0], copies[1])
            adam_decay_(layers, *copies, samples, 0.1, 0.01, 1)
            student, teacher = (maps((1,), (45, 67), dtype)[0] for _ in range(2))
            teacher, truth = teacher.detach(), teacher.detach().sigmoid()
            assert torch.stack(dkd_theta(student, teacher, truth)).isfinite().all()
            differentiate([dkd_loss(student, teacher, truth, truth[:, 0, 0, 0], 5.0, 25.0)])
            for side, small in (((40, 56), (20, 28)), ((37, 43), (5, 60)), ((9, 300), (3, 1))):
                x, y = maps((3,), side, dtype)[0], maps((3,), small, dtype)[0]
                differentiate([scfm(x, y), scfm(x, y, multiply=False)])
            for channels in (16, 21):
                x, y = maps((channels,), (24, 30), dtype)[0], maps((channels,), (6, 15), dtype)[0]
                x = x.contiguous(memory_format=torch.channels_last)
                differentiate([scfm(x, y), scfm(x, y, multiply=False)])
            for k in (1, 5, 13, 31):
                for thin in ("inner", "outer", "both"):
                    for z in (maps((2,), (70, 136), dtype)[0], maps((1,), (33, 67), dtype)[0]):
                        differentiate([boundary(z, k, thin)])
                differentiate([structure_polishing_sums(student, truth, k)])
            assert means.isfinite().all()
    torch.cuda.synchronize()
    print("every CUDA kernel ran")


if __name__ == "__main__":
    main()
