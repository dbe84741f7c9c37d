"""Data sets that have a name instead of a folder of images."""

from pathlib import Path

from ijepa_fast.data.sets.idx import EMBEDDED, FASHION_MNIST, find_idx, write_idx

__all__ = ["NAMES", "named_data"]

# a folder of such a name is written ./fashion_mnist
NAMES = ("fashion_mnist_10k", "fashion_mnist")


def named_data(root: str) -> Path | None:
    """The folder of a named data set, written into the cache if it is not there.

    Args:
        root: `fashion_mnist_10k` (embedded: 8,000 images for training, 2,000 held out);
            `fashion_mnist` (Debian's package dataset-fashion-mnist); or a folder with MNIST's four
            IDX files.

    Returns:
        A folder with `train` and `test`; None for any other root.

    Raises:
        ValueError: the data set is not installed, or its files are damaged.
        OSError: the cache folder cannot be written.
    """
    if root == "fashion_mnist_10k":
        return write_idx(EMBEDDED)
    if root == "fashion_mnist":
        if not FASHION_MNIST.is_dir():
            raise ValueError(
                f"data fashion_mnist must be installed, got no {FASHION_MNIST}: apt install "
                "dataset-fashion-mnist, or give --data the folder of its four IDX files"
            )
        return write_idx(FASHION_MNIST)
    folder = Path(root)
    if folder.is_dir() and find_idx(folder):
        return write_idx(folder)
    return None
