"""The notebook of the first hour runs."""

import json
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def test_the_first_hour(tmp_path, monkeypatch):
    """The notebook, with fewer steps, in a kernel of this Python."""
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "here",
        "language": "python",
    }
    (tmp_path / "kernels" / "here").mkdir(parents=True)
    (tmp_path / "kernels" / "here" / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    scripts = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([scripts, os.environ["PATH"]]))
    notebook = nbformat.read(ROOT / "examples" / "first_hour.ipynb", as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    assert "epochs=3" in cells["train"].source
    cells["train"].source = cells["train"].source.replace("epochs=3", "epochs=3, max_steps=40")
    folder = tmp_path / "work"
    folder.mkdir()
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, kernel_name="here", timeout=600, resources=resources).execute()

    def printed(name):
        return "".join(out.get("text", "") for out in cells[name].outputs)

    run = folder / "runs" / "first_hour"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert re.search(r"raw pixels .* %\nuntrained .* %\ntarget .* %\n", printed("evaluate"))
    assert "(8000, 128) float32" in printed("embed")
    assert len(printed("nearest").splitlines()) == 8
    for name in ("masks", "curves", "neighbours", "pca"):
        assert any("image/png" in out.get("data", {}) for out in cells[name].outputs), name
    assert "the same features: True" in printed("export")
    assert (folder / "runs" / "first_hour_hf" / "model.safetensors").is_file()
