"""Trains on a parquet file of encoded images through Hugging Face `datasets`.

    python examples/parquet.py --out runs/parquet

writes a small file first; --file takes one with the columns `image` (bytes and path, as `datasets`
writes images) and `label`.
"""

import argparse
from pathlib import Path
from typing import Any

import datasets

import ijepa_fast
from ijepa_fast.data import named_data


class Parquet:
    """The rows of a local parquet file: `datasets` maps it, and nothing is decoded."""

    def __init__(self, file: Path, cache: Path) -> None:
        read = datasets.Dataset.from_parquet(str(file), cache_dir=str(cache))
        self.rows = read.cast_column("image", datasets.Image(decode=False))
        # another one where file, size or time of change is
        self.fingerprint = self.rows._fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def bytes_at(self, i: int) -> bytes:
        """An encoded image."""
        return self.rows[i]["image"]["bytes"]

    def label_at(self, i: int) -> int:
        """Its class."""
        return self.rows[i]["label"]


def write_example(file: Path, images: int = 400) -> None:
    """Writes a tenth of the images from each class of Fashion-MNIST, with their labels."""
    folders = sorted((named_data("fashion_mnist_10k") / "train").iterdir())
    paths = [path for folder in folders for path in sorted(folder.iterdir())[: images // 10]]
    labels = [folders.index(path.parent) for path in paths]
    column = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    rows = datasets.Dataset.from_dict({"image": column, "label": labels})
    rows.cast_column("image", datasets.Image()).to_parquet(str(file))


def train(
    file: Path, out: Path, config: str | ijepa_fast.Config, **settings: Any
) -> ijepa_fast.RunResult:
    """`pretrain` on the rows of a file."""
    rows = Parquet(file, out.parent / "cache")
    return ijepa_fast.pretrain(config, data=rows, out=out, **settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/parquet"))
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if args.file is None:
        args.file = args.out.parent / "example.parquet"
        args.file.parent.mkdir(parents=True, exist_ok=True)
        write_example(args.file)
    train(args.file, args.out, "demo", batch_size=64, batch__device=64, max_steps=args.steps)
