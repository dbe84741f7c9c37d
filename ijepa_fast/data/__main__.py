"""`ijepa-fast data DIR ...`: what a data set consists of, before a run depends on it; with
`--pack OUT` the same images, resized, in tar shards.

Exit codes: 0 fine, 1 more unusable files than allowed, a damaged shard or a folder that cannot be
listed (4 with `--pack`), 2 wrong input, 130 interrupted.
"""

import json
import logging
import shlex
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ijepa_fast.__main__ import enter
from ijepa_fast.config import run_command
from ijepa_fast.data.cache import open_index
from ijepa_fast.data.index import Index
from ijepa_fast.data.pack import pack
from ijepa_fast.data.report import as_text, summary
from ijepa_fast.errors import require

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Looks at every file of a data set and says what it consists of; keeps the table that training
    opens. With --pack OUT writes the images, resized, as tar shards that --data OUT reads.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders, list files (.txt, .tsv), tar shards (also train-{0000..0099}.tar) or a name
    (fashion_mnist_10k, fashion_mnist)."""
    verify: bool = False
    """Decode every image wholly, once: finds damage between header and end."""
    json: bool = False
    """Print JSON."""
    max_bad_share: float = 0.001
    """Share of unusable files above which the exit code is 1 (one file is always allowed)."""
    threads: int | None = None
    """Threads; by default twice the number of cores, at most 16; one a core to pack."""
    pack: Path | None = None
    """A new folder for tar shards of JPEG files with the same order and classes. The same command
    goes on where it was stopped."""
    side: int = 256
    """With --pack: pixels of the shorter side; smaller images are not enlarged."""
    quality: int = 95
    """With --pack: of the JPEG files, 1 to 100."""
    shard_mb: float = 1000
    """With --pack: megabytes of a shard."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(Arguments, _check_data, argv, "data")


def _check_data(arguments: Arguments) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    share, threads = arguments.max_bad_share, arguments.threads
    require(0 <= share <= 1, "--max-bad-share", "between 0 and 1", share)
    require(threads is None or threads >= 1, "--threads", "at least 1", threads)
    try:
        index, path = open_index(
            arguments.sources,
            threads=threads,
            verify=arguments.verify,
            compare_all=True,
            allow_missing=True,
        )
        if arguments.pack:
            return _pack(arguments, index, arguments.pack)
        found = summary(index, max_bad_share=share, threads=threads or 8)
    except KeyboardInterrupt:
        print("interrupted" + ", nothing is kept" * (not arguments.pack), file=sys.stderr)
        return 128 + signal.SIGINT
    found["table"] = str(path) if path else None
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print(as_text(found))
        print(f"table       {found['table'] or 'not kept'}")
    return int(found["too_many_bad"] or bool(found["lost"]))


def _pack(arguments: Arguments, index: Index, out: Path) -> int:
    done = pack(
        index,
        out,
        side=arguments.side,
        quality=arguments.quality,
        shard_bytes=int(arguments.shard_mb * 1e6),
        threads=arguments.threads,
        max_bad_share=arguments.max_bad_share,
    )
    if arguments.json:
        print(json.dumps(asdict(done), indent=1))
        return 0
    share = done.bytes / max(done.source_bytes, 1)
    print(
        f"packed      {done.images:,} images ({done.copied:,} as they were) in {done.shards} shards"
    )
    print(
        f"size        {done.bytes / 1e9:.3f} GB of {done.source_bytes / 1e9:.3f} GB ({share:.0%})"
    )
    if done.done:
        print(f"speed       {done.done / done.seconds:,.0f} images/s, {done.seconds:,.0f} s")
    print(f"left out    {len(done.left_out):,}")
    for name, reason in done.left_out:
        print(f"  {name!r}: {reason}")
    print(f"next        ijepa-fast train --data {shlex.quote(str(out))}")
    return 0


if __name__ == "__main__":
    enter("data")
