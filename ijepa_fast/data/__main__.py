"""`python -m ijepa_fast.data DIR ...`: what a data set consists of, before a run depends on it.

Exit codes: 0 fine, 1 more unusable files than allowed, a damaged shard or a folder that cannot be
listed, 2 wrong input, 130 interrupted.
"""

import json
import logging
import signal
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from ijepa_fast.data.cache import open_index
from ijepa_fast.data.report import as_text, summary

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Looks at every file of a data set and says what it consists of; keeps the table that training
    opens.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders, list files (.txt, .tsv), tar shards (also train-{0000..0099}.tar) or names (shapes,
    fashion_mnist)."""
    verify: bool = False
    """Decode every image wholly, once: finds damage between header and end."""
    json: bool = False
    """Print JSON."""
    max_bad_share: float = 0.001
    """Share of unusable files above which the exit code is 1 (one file is always allowed)."""
    threads: int | None = None
    """Threads; by default twice the number of cores, at most 16."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m ijepa_fast.data")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if not 0 <= arguments.max_bad_share <= 1:
            share = arguments.max_bad_share
            raise ValueError(f"--max-bad-share must be between 0 and 1, got {share}")
        if arguments.threads is not None and arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        index, path = open_index(
            arguments.sources,
            threads=arguments.threads,
            verify=arguments.verify,
            compare_all=True,
            allow_missing=True,
        )
        threads = arguments.threads or 8
        found = summary(index, max_bad_share=arguments.max_bad_share, threads=threads)
    except KeyboardInterrupt:
        print("interrupted, nothing is kept", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found["table"] = str(path) if path else None
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print(as_text(found))
        print(f"table       {found['table'] or 'not kept'}")
    return int(found["too_many_bad"] or bool(found["lost"]))


if __name__ == "__main__":
    sys.exit(main())
