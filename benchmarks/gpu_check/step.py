"""Part `step`: whole training steps side by side, one preset at a time.

``ARGS='--presets vitb16_in1k --seconds 120'``. What is compiled is timed before the next provider
is compiled. Leaves step.json and step.md, written after every turn.
"""

from collections.abc import Sequence

from benchmarks import bench_step
from benchmarks.gpu_check import files

__all__ = ["main"]

SECONDS = 240


def main(argv: Sequence[str]) -> bool:
    """The whole part; True if nothing failed and everything was measured."""
    parser = bench_step.add_options(files.options("step", __doc__.split("\n\n")[0], SECONDS))
    parser.set_defaults(presets=["vitb16_in1k"], modes=["published"], repeats=3)
    args = parser.parse_args(argv)
    files.start(args)
    if args.device.type == "cpu":
        args.presets, args.batch, args.steps, args.repeats = ["demo"], 2, 2, 1
    return bench_step.run(args) == 0
