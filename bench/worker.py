"""One fresh process: one case in one variant (or the machine's limits), one round.

Started by run.py; prints one line of JSON. Whatever goes wrong is a reason in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="whose sodfast is measured")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--case", help="without it the machine's limits are measured")
    parser.add_argument("--variant")
    options = parser.parse_args()
    sys.path.insert(0, str(options.tree))
    try:
        result = measure(options)
    except Exception as error:
        result = {"reason": sentence(error)}
    print(json.dumps(result), flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    # Before anything runs in parallel: threads take the setting from the one that starts them.
    torch.set_flush_denormal(True)
    torch.set_num_threads(options.threads)

    import sodfast

    if options.tree.resolve() not in Path(sodfast.__file__).resolve().parents:
        raise RuntimeError(f"sodfast was imported from {sodfast.__file__}, not {options.tree}")
    result: dict[str, Any] = {
        "torch": torch.__version__, "python": platform.python_version(), **compiled_module(sodfast)
    }  # fmt: skip
    if options.case is None:
        from limits import measure_limits

        return {**result, "limits": measure_limits(options.threads, options.seconds)}

    from cases import find_case
    from measure import peak_bytes, samples_of, step_of
    from variants import find_variant

    case, variant = find_case(options.case), find_variant(options.variant)
    torch.manual_seed(0)
    work = case.build()
    sodfast.use_backend(variant.backend)
    step = step_of(variant.prepare(case, work), case.training)
    result["samples"] = samples_of(step, options.seconds)
    result["peak_bytes"] = peak_bytes(step)
    return result


def compiled_module(sodfast: Any) -> dict[str, str]:
    """Compiler and instruction set of sodfast._C; empty without it."""
    try:
        import sodfast._C as module
    except ImportError:
        return {"compiler": "", "isa": ""}
    return {"compiler": module.build_info()["compiler"], "isa": module.cpu_isa()}


def sentence(error: BaseException) -> str:
    """An exception as one line, from the innermost cause that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


if __name__ == "__main__":
    main()
