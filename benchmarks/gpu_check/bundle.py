"""What a visit to a CUDA machine without a network brings along: ``make gpu-bundle``.

Into one folder: wheels for Python 3.12, photographs, and with ``--dali`` DALI as an archive in
pieces of 45 MB. ``--unpack DIR`` joins the pieces there and unpacks them. A machine that has torch,
triton, numpy, safetensors, pytest and Pillow needs no more.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.files import ROOT
from benchmarks.photographs import write_photographs

PYTHON = "3.12"
WHEELS = ("tyro", "typeguard", "docstring-parser", "zstandard")
DALI = (
    *("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "nvidia-libnvcomp-cu13"),
    *("libcst", "optree", "makefun", "gast", "astunparse", "nvtx", "six"),
)
PHOTOGRAPHS = 48
PIECE = 45 * 10**6  # bytes
# pip takes these literally
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 34)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu-bundle", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-bundle"))
    parser.add_argument("--dali", action="store_true", help="DALI too: 190 MB")
    parser.add_argument("--unpack", type=Path, metavar="DIR", help="on the CUDA machine")
    args = parser.parse_args()
    if args.unpack:
        unpack(args.out / "dali", args.unpack)
        return 0
    download(WHEELS, args.out / "wheels")
    write_photographs(args.out / "photographs", PHOTOGRAPHS)
    if args.dali:
        with tempfile.TemporaryDirectory() as folder:
            wheels = Path(folder) / "wheels"
            download(DALI, wheels)
            tree = Path(folder) / "tree"
            for wheel in sorted(wheels.glob("*.whl")):
                shutil.unpack_archive(wheel, tree, "zip")
            prune(tree)
            pack(tree, args.out / "dali")
    sizes = {part.name: _megabytes(part) for part in sorted(args.out.iterdir())}
    print(f"{args.out}: " + ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))
    return 0


def download(packages: Sequence[str], folder: Path) -> None:
    """The wheels of these packages alone, in the versions that this release is tested with."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    command += ["--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    command += ["--python-version", PYTHON, "--only-binary=:all:", "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *packages], check=True)


def prune(tree: Path) -> None:
    """Removes what only other Pythons, compilers and people would need."""
    ours = f".cpython-{PYTHON.replace('.', '')}-"
    for file in tree.glob("nvidia/**/*.cpython-*.so"):
        if ours not in file.name:
            file.unlink()
    for name in ("include", "bin", "samples"):
        for folder in tree.glob(f"nvidia/*/{name}"):
            shutil.rmtree(folder)


def pack(tree: Path, folder: Path) -> None:
    """A zstd archive of the tree, in pieces."""
    import zstandard

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryFile() as whole:
        compressor = zstandard.ZstdCompressor(level=12, threads=-1)
        with (
            compressor.stream_writer(whole, closefd=False) as stream,
            tarfile.open(fileobj=stream, mode="w|") as archive,
        ):
            archive.add(tree, arcname=".")
        whole.seek(0)
        number = 0
        while piece := whole.read(PIECE):
            (folder / f"dali.tar.zst.{number:02d}").write_bytes(piece)
            number += 1


def unpack(folder: Path, tree: Path) -> None:
    """Joins the pieces of `pack` and unpacks them.

    Raises:
        ValueError: a piece is missing.
    """
    import zstandard

    pieces = sorted(folder.glob("dali.tar.zst.*"))
    numbers = [int(piece.suffix[1:]) for piece in pieces]
    if not pieces or numbers != list(range(len(pieces))):
        raise ValueError(f"{folder} must hold all pieces dali.tar.zst.00 and on, got {numbers}")
    with tempfile.TemporaryFile() as whole:
        for path in pieces:
            with path.open("rb") as piece:
                shutil.copyfileobj(piece, whole)
        whole.seek(0)
        with (
            zstandard.ZstdDecompressor().stream_reader(whole, closefd=False) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            archive.extractall(tree, filter="data")


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


if __name__ == "__main__":
    sys.exit(main())
