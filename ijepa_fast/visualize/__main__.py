"""`python -m ijepa_fast.visualize COMMAND ...`: pictures of data, runs and what they learnt.

Exit codes: 0 done, 2 wrong input, 3 no usable checkpoint.
"""

import logging
import sys
from typing import Annotated, Any

import tyro

from ijepa_fast.__main__ import enter
from ijepa_fast.config import run_command
from ijepa_fast.visualize.decoder.commands import PredictorPicture, Prove, TrainDecoder
from ijepa_fast.visualize.picture_commands import (
    CurvePicture,
    MaskPicture,
    NeighbourPicture,
    PcaPicture,
    Report,
)

__all__ = ["main"]

Command = (
    Annotated[MaskPicture, tyro.conf.subcommand("masks")]
    | Annotated[CurvePicture, tyro.conf.subcommand("curves")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[PcaPicture, tyro.conf.subcommand("pca")]
    | Annotated[NeighbourPicture, tyro.conf.subcommand("neighbours")]
    | Annotated[TrainDecoder, tyro.conf.subcommand("train-decoder")]
    | Annotated[PredictorPicture, tyro.conf.subcommand("predictor")]
    | Annotated[Prove, tyro.conf.subcommand("prove")]
)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    description = "Pictures of data, runs and what they learnt."
    return run_command(Command, _draw, argv, "visualize", description=description)


def _draw(command: Any) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    command.do()


if __name__ == "__main__":
    enter("visualize")
