"""What a document says that can be checked: commands, Python, links, headings, code in the text.

A fenced block is Python (```python), a script (its first line is `#!...`), a session (its commands
begin with `$ `, the rest is what they print), or, where its first line is a command, commands only:
then every line must be one. In any other block, and in inline code, whatever begins with a known
program is a command.
"""

import ast
import re
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Command", "Document", "Place", "anchors", "read", "split", "unbound"]

_SHELLS = {"bash", "sh", "shell", "console"}
_FENCE = re.compile(r"\s*(```+|~~~+)\s*(\S*)")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n[ \t]*\n).)+?)(?<!`)\1(?!`)", re.DOTALL)
_TARGETS = (
    re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)"),
    re.compile(r"^\[[^\]]+\]:\s*(\S+)", re.MULTILINE),
    re.compile(r"\b(?:src|href)=\"([^\"]+)\""),
)
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")


@dataclass(frozen=True)
class Place:
    """Something in a document, and where: line, counted from 1, and its text."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Command(Place):
    """One command: its words, without quotes, continuations and comments.

    Attributes:
        words: the program and its arguments.
        environment: variables set before it.
        inline: in the text, so that arguments may be left out.
    """

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    inline: bool = False


@dataclass
class Document:
    """What was found in a file."""

    path: Path
    commands: list[Command] = field(default_factory=list)
    python: list[Place] = field(default_factory=list)
    scripts: list[Place] = field(default_factory=list)
    spans: list[Place] = field(default_factory=list)
    links: list[Place] = field(default_factory=list)


def split(line: str) -> Iterator[tuple[tuple[tuple[str, str], ...], tuple[str, ...]]]:
    """The commands of a line of shell: (variables, words) of each.

    Raises:
        ValueError: a quotation without end.
    """
    line = re.sub(r"('[^']*'|\"[^\"]*\")|(?<!\S)#.*", lambda match: match[1] or "", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>()")
    lexer.whitespace_split, lexer.commenters = True, ""
    found: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if redirected or set(word) <= set("<>"):
            # what it prints goes elsewhere: no argument
            redirected = not redirected
        elif set(word) <= set(";&|"):
            found.append([])
        else:
            found[-1].append(word)
    for words in found:
        rest = words[words[:1] == ["sudo"] :]
        count = 0
        while count < len(rest) and _ASSIGNMENT.match(rest[count]):
            count += 1
        pairs = (word.partition("=") for word in rest[:count])
        variables = tuple((name, value) for name, _, value in pairs)
        if rest[count:]:
            yield variables, tuple(rest[count:])


def _begins(text: str, programs: Collection[str]) -> bool:
    """Whether a text starts as a command with arguments does."""
    words = [word for word in text.split() if not _ASSIGNMENT.match(word)]
    words = words[words[:1] == ["sudo"] :]
    return len(words) > 1 and words[0] in programs


def _logical(first: int, lines: list[str]) -> Iterator[tuple[int, str]]:
    """Lines with their continuations, and the number of their first one."""
    held, start = "", first
    for number, line in enumerate(lines, first):
        start = start if held else number
        held += line.rstrip()
        if held.endswith("\\"):
            held = held[:-1] + " "
            continue
        yield start, held.strip()
        held = ""
    if held:
        yield start, held.strip()


class _Reader:
    def __init__(self, path: Path, name: str, programs: Collection[str]) -> None:
        self.document, self.name, self.programs = Document(path), name, programs

    def add(self, line: int, text: str, *, inline: bool = False, known: bool = False) -> None:
        """Commands of a line; `known` leaves out those of other programs."""
        for variables, words in split(text):
            if not known or words[0] in self.programs:
                self.document.commands.append(
                    Command(self.name, line, text, words, variables, inline)
                )

    def script(self, first: int, lines: list[str]) -> None:
        self.document.scripts.append(Place(self.name, first, "\n".join(lines) + "\n"))
        for line, text in _logical(first, lines):
            if _begins(text, self.programs):
                self.add(line, text, known=True)

    def block(self, kind: str, first: int, lines: list[str]) -> None:
        filled = [line.strip() for line in lines if line.strip()]
        code = [line for line in filled if not line.startswith("#")]
        if kind in ("python", "py"):
            margin = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
            text = "\n".join(line[margin:] for line in lines) + "\n"
            self.document.python.append(Place(self.name, first, text))
        elif filled and filled[0].startswith("#!"):
            self.script(first, lines)
        elif any(line.startswith("$ ") for line in filled):
            for line, text in _logical(first, lines):
                if text.startswith("$ "):
                    self.add(line, text[2:])
        elif kind in _SHELLS or (not kind and code and _begins(code[0], self.programs)):
            for line, text in _logical(first, lines):
                self.add(line, text)
        elif kind in ("", "text"):
            for line, text in _logical(first, lines):
                if _begins(text, self.programs):
                    self.add(line, text, known=True)

    def prose(self, text: str) -> None:
        def number(match: re.Match[str]) -> int:
            return text.count("\n", 0, match.start()) + 1

        for match in _SPAN.finditer(text):
            words = " ".join(match[2].replace("\\|", "|").split())
            self.document.spans.append(Place(self.name, number(match), words))
            if _begins(words, self.programs):
                self.add(number(match), words, inline=True)
        # code is no link
        text = _SPAN.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
        for pattern in _TARGETS:
            for match in pattern.finditer(text):
                self.document.links.append(Place(self.name, number(match), match[1]))

    def markdown(self, text: str) -> None:
        prose: list[str] = []
        block: list[str] = []
        fence, kind, first = "", "", 0
        for number, line in enumerate(text.splitlines(), 1):
            match = _FENCE.match(line)
            if fence and line.strip().startswith(fence):
                self.block(kind, first, block)
                fence = ""
            elif fence:
                block.append(line)
            elif match:
                fence, kind, first, block = match[1], match[2], number + 1, []
            prose.append("" if fence or match else line)
        assert not fence, f"{self.name}:{first - 1}: a block without end"
        for number, line in enumerate(prose, 1):
            # blocks by indentation
            if line.startswith("    ") and _begins(line.removeprefix("    $"), self.programs):
                self.add(number, line.strip().removeprefix("$ "))
        self.prose("\n".join(prose))

    def docstring(self, text: str) -> None:
        body = ast.parse(text).body
        if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            lines = text.splitlines()[body[0].lineno - 1 : body[0].end_lineno]
            for line, words in _logical(body[0].lineno, lines):
                if _begins(words.removeprefix("$ "), self.programs):
                    self.add(line, words.removeprefix("$ "), known=True)


def read(path: Path, name: str, programs: Collection[str]) -> Document:
    """Reads Markdown, the docstring of a Python file, or a shell script.

    Args:
        path: the file.
        name: what messages call it.
        programs: what a command begins with.

    Raises:
        ValueError: a command has a quotation without end.
    """
    reader, text = _Reader(path, name, programs), path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        reader.docstring(text)
    elif path.suffix == ".sh":
        reader.script(1, text.splitlines())
    else:
        reader.markdown(text)
    return reader.document


def anchors(path: Path) -> set[str]:
    """Anchors of a Markdown file's headings, as GitHub makes them."""
    found: set[str] = set()
    fence = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := _FENCE.match(line):
            fence = "" if fence and match[1].startswith(fence) else fence or match[1]
        elif not fence and (heading := re.match(r"#{1,6}\s+(.*?)\s*#*$", line)):
            title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            again = 0
            while (name := slug + (f"-{again}" if again else "")) in found:
                again += 1
            found.add(name)
    return found


def unbound(tree: ast.Module) -> set[str]:
    """Names that a piece of Python uses and nowhere binds, builtins among them."""
    used: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return used - bound
