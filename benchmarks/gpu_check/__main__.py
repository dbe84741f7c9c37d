"""What to run on a CUDA machine: ``make gpu-check PART=ops|sanitize|step|tune OUT=dir
PYTHON=python3``.

Each part ends within 9 minutes, needs no network, and writes its results to OUT after every
configuration, at most 8 files.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.gpu_check import ops, sanitize, tune
from benchmarks.tune import TUNINGS


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.split("\n\n")[1])
    parser.add_argument("part", choices=["ops", "sanitize", "step", "tune"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", help="cpu tries the script out")
    parser.add_argument("--presets", nargs="+", help="of part step")
    parser.add_argument("--batch", type=int, default=128, help="of part step")
    parser.add_argument("--modes", nargs="+", help="of part step: published, whole")
    parser.add_argument("--providers", nargs="+", help="of part step")
    ops_tuned = [tuning.bench for tuning in TUNINGS]
    parser.add_argument("--op", choices=ops_tuned, help="of part tune: only this one")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: gpu-check needs a CUDA device, torch sees none", file=sys.stderr)
        return 2
    if args.part == "tune" and device.type != "cuda":
        print("error: part tune measures, it needs a CUDA device", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "ops":
        green = ops.run(args.out, device)
    elif args.part == "sanitize":
        green = sanitize.run(args.out)
    elif args.part == "step":
        # it alone needs the trainer and its packages
        from benchmarks.gpu_check import step
        from benchmarks.step_contest import names_on
        from benchmarks.step_providers import MODES, PROVIDERS
        from ijepa_fast.presets import PRESETS

        chosen = []
        for name, known, default in (
            ("presets", PRESETS, step.PRESETS),
            ("modes", MODES, MODES),
            ("providers", PROVIDERS, names_on(device)),
        ):
            asked = getattr(args, name) or default
            if unknown := set(asked) - set(known):
                parser.error(f"--{name} must be among {'; '.join(known)}, got {'; '.join(unknown)}")
            chosen.append(asked)
        green = step.run(args.out, device, chosen[0], args.batch, chosen[1], chosen[2])
    else:
        green = tune.run(args.out, args.op)
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
