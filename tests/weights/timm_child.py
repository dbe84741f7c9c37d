"""``python timm_child.py FOLDER``: features of timm's models of every sub-folder of FOLDER, of the
images in its ``images.safetensors``, into its ``features.safetensors``.

timm imports torchvision, of which no CPU build goes with the pinned torch; its models need nothing
of it. In a process of its own, so that nobody else takes the stand-in for the library.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_MODES = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")


class _Module(ModuleType):
    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        # a class that can be inherited from, and an enumeration of interpolations
        return type(name, (), {mode: number for number, mode in enumerate(_MODES)})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == "torchvision":
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def main(folder: Path) -> None:
    """Does it."""
    sys.meta_path.insert(0, _Finder())
    import timm

    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        model: Any = timm.create_model(f"local-dir:{part}", pretrained=True).eval()
        x = load_file(part / "images.safetensors")["images"]
        with torch.no_grad():
            found = {"patches": model.forward_features(x), "pooled": model(x)}
        save_file(found, part / "features.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
