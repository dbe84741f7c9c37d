"""What the site shows besides its own pages: the repository's documents, at their own places, so
that their links hold; and docstrings as they are written here.
"""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

__all__ = ["Docstrings", "on_files"]

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("*.md", "docs/*.md", "docs/log/*.md", "docs/images/*", "kernels/*.md", "examples/*.*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents; mkdocs calls it."""
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


class Docstrings(Extension):
    """What griffe expects of them: an entry for each argument, and `Examples`."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Griffe calls it for everything it has read."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            # arguments that share an entry
            entry = r"^( +)(\w+(?:, \w+)+)(:.*(?:\n\1 +.*)*)"
            obj.docstring.value = re.sub(entry, _apart, text, flags=re.MULTILINE)


def _apart(entry: re.Match[str]) -> str:
    indent, names, text = entry.groups()
    return "\n".join(f"{indent}{name}{text}" for name in names.split(", "))
