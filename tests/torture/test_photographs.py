"""A published size on real photographs: too slow for every day."""

import shutil
from pathlib import Path

import skimage.data

from ijepa_fast import train
from ijepa_fast.callbacks import read_rows


def test_twenty_steps_on_real_photographs(tmp_path):
    folder = Path(skimage.data.__file__).parent
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
    (tmp_path / "photos").mkdir()
    for name in names:
        shutil.copy(folder / name, tmp_path / "photos" / name)
    out = tmp_path / "run"
    argv = ["--preset", "vits16", "--data", str(tmp_path / "photos"), "--out", str(out)]
    argv += ["--model.depth", "1", "--model.predictor-depth", "1", "--max-steps", "20"]
    argv += ["--batch.global", "2", "--masks.truncation-group", "2", "--log.interval", "1"]
    # CPUs without bfloat16 products take 40 s more in it
    argv += ["--optim.precision", "float32"]
    assert train.main(argv) == 0
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(0 < row["loss"] < 1 and row["skipped"] == 0 for row in rows)
    # five pictures, two a step: every epoch draws anew, so the steps differ
    assert len({row["ids_hash"] for row in rows}) > 5
