"""Compiles every Triton kernel for a GPU that is not here, with the arguments of real layers.

A script of test_triton_cubins.py: python triton_cubins.py CAPABILITY DTYPE..., for example
80 float32. The ops run on CPU tensors, and each launch stops once its cubin is there. Prints a
line per cubin: kernel, dtype, registers, bytes of stack (spilled registers lie there).
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import sodfast.kernels as kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class AbsentGPU:
    """A driver that says what to compile for, and nothing else."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown.stdout)
    assert found, shown.stdout
    return int(found[1]), int(found[2])


def layers(dtype: torch.dtype) -> None:
    """A training step and an inference of what CSNet is made of, some 20 channels a scale."""

    def maps(*channels: int, size: int = 56) -> list[Tensor]:
        shapes = [(2, c, size >> i, size >> i) for i, c in enumerate(channels)]
        return [torch.empty(shape, dtype=dtype) for shape in shapes]

    def vectors(number: int, size: int) -> list[Tensor]:
        return [torch.empty(size, dtype=dtype) for _ in range(number)]

    image, xs, fine = maps(3, size=112), maps(20, 18), maps(41, 40)
    bias = vectors(1, 38)[0]
    stem, weight = torch.empty(38, 3, 3, 3, dtype=dtype), torch.empty(38, 38, 1, 1, dtype=dtype)
    wide = torch.empty(81, 38, 1, 1, dtype=dtype)
    kernels.goctconv(image, stem, bias, bias, [20, 18], 2)
    kernels.goctconv_grad_weight(xs, image, stem, 2)
    kernels.goctconv_grad_input(xs, image, stem, 2)
    kernels.goctconv(xs, weight, None, None, [20, 18], 1)
    kernels.goctconv(xs, wide, bias.new_empty(81), bias.new_empty(81), [41, 40], 1)
    kernels.goctconv_grad_input(fine, xs, wide, 1)
    kernels.goctconv_grad_weight(fine, xs, wide, 1)

    depthwise = torch.empty(38, 1, 3, 3, dtype=dtype)
    kernels.goctconv_depthwise(xs, depthwise, bias, bias, 1)
    kernels.goctconv_depthwise_grad_input(xs, depthwise, 1)
    kernels.goctconv_depthwise_grad_weight(xs, xs, depthwise, 1)

    inputs, outputs = maps(12, 24, 24), maps(7, 8, 9)
    dense = [
        torch.empty(o.shape[1], x.shape[1], 3, 3, dtype=dtype) for o, x in zip(outputs, inputs)
    ]
    branches = [1, 2, 4, 8, 16], [1, 1, 1, 2, 2, 1, 1, 2, 2, 2, 1, 2, 2, 2, 2]
    kernels.goctconv_dilated(inputs, dense, bias.new_empty(24), bias.new_empty(24), *branches)
    kernels.goctconv_dilated_grad_input(outputs, dense, *branches)
    kernels.goctconv_dilated_grad_weight(outputs, inputs, dense, *branches)

    norm = vectors(5, 38)
    for training in (True, False):
        _, mean, var, _ = kernels.goctconv_norm_act(xs, *norm, training, 1e-5)
        kernels.goctconv_norm_act_backward(xs, xs, *norm[:3], mean, var, training, 1e-5)
    kernels.goctconv_update_stats_(*norm[3:], mean, var, [20, 18], [6272, 1568], 0.1)

    logits, teacher, truth = maps(1)[0], maps(1)[0], maps(1)[0]
    kernels.dkd_theta(logits, teacher, truth, 0.7, 0.5, 0.01)
    for with_gradient in (True, False):
        kernels.dkd_loss(logits, teacher, truth, bias[:2], 5.0, 25.0, with_gradient)
    kernels.dkd_loss_backward(bias[:2], logits)

    small = torch.empty(2, 20, 28, 28, dtype=dtype)
    for multiply in (True, False):
        kernels.scfm(xs[0], small, multiply)
        kernels.scfm_backward(xs[0], xs[0], small, multiply)
    for k, thin in ((13, 1), (1, 2), (31, 3)):  # a 1 is compiled into a kernel
        kernels.boundary(xs[0], k, thin)
        kernels.boundary_backward(xs[0], xs[0], k, thin)
    kernels.structure_polishing_sums(logits, truth, 13)
    of_sums = torch.empty(2, 2, 3, dtype=dtype)
    kernels.structure_polishing_sums_backward(of_sums, logits, truth, 13)

    lists = [vectors(3, 38) for _ in range(4)]
    means = [torch.empty(24, 38, dtype=dtype) for _ in range(3)]
    kernels.decay_(lists[0], lists[1], means, lists[2], 0.5, True)
    kernels.adam_decay_(*lists, means, [], 0.5, True, False, 0.01, 0.9, 0.999, 1e-8, 1)


def main(capability: int, dtypes: list[str]) -> None:
    triton.runtime.driver.set_active(AbsentGPU(capability))
    run, seen = triton.JITFunction.run, set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(compiled) not in seen:
            seen.add(id(compiled))
            name = f"{self.__module__}.{self.__name__}"
            print(name, dtype, *resources(compiled.asm["cubin"]), flush=True)

    with mock.patch.object(triton.JITFunction, "run", compile_only):
        for dtype in dtypes:
            layers(getattr(torch, dtype))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
