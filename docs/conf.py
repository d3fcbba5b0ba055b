"""Sphinx: pages in Markdown, and one API page for every room of the package, made from its docstrings."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes

import gendiff

project, author = "gendiff", "the gendiff authors"
release = version = gendiff.__version__
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "results/*/*.md"]  # pages include their findings
html_theme = "furo"
html_title = f"gendiff {release}"
html_static_path = ["_static"]
html_css_files = ["page.css"]
default_role = "code"  # docstrings write `name`
python_maximum_signature_line_length = 90
autodoc_member_order = "bysource"
autodoc_mock_imports = ["h5py", "libsumo", "mujoco", "shapely", "sklearn", "starlette", "sumolib", "torch", "uvicorn"]
nitpicky = True
nitpick_ignore_regex = [("py:(class|exc|obj)", ".*")]  # of annotations, which link where they can
suppress_warnings = ["ref.python"]  # two modules may have a class of one name, and annotations are short


# API pages: edit this table to move a module to another page.  `*` stands for modules that no other page has.

ROOMS = {
    "words": ("The five words", ["process", "denoiser", "potential", "guidance", "sampling"]),
    "around": ("Losses, likelihood, SMC", ["losses", "likelihood", "smc", "types", "static"]),
    "methods": ("Methods: the papers' algorithms", ["methods.*"]),
    "training": ("Training, devices, checkpoints", ["training", "distributed", "checkpoint", "*"]),
    "nets": ("Networks", ["nets.*"]),
    "oracles": ("Oracles", ["oracles.*"]),
    "metrics": ("Metrics", ["metrics.*"]),
    "data": ("Data", ["data", "data.*"]),
    "convert": ("Public checkpoints", ["convert.*"]),
    "feedback": ("The labelling page", ["feedback.*"]),
}


def modules() -> list[str]:
    """List the modules of the package, without its name: `process`, `nets.unet`."""
    found = pkgutil.walk_packages(gendiff.__path__, "gendiff.")
    found = [module for module in found if not module.ispkg or module.name == "gendiff.methods.genneg"]
    names = [module.name.removeprefix("gendiff.") for module in found]
    return sorted(name for name in names if not name.endswith("__main__") and name != "words")


def rooms() -> dict[str, str]:
    """Make the text of every API page."""
    left = modules()
    taken = {name for _, names in ROOMS.values() for name in names}
    pages = {}
    for room, (title, names) in ROOMS.items():
        members: list[str] = []
        for name in names:
            if name == "*":
                members += [other for other in left if "." not in other and other not in taken]
            elif name.endswith(".*"):
                members += [other for other in left if other.startswith(name[:-1])]
            else:
                members.append(name)
        pages[room] = "\n".join([f"# {title}", *map(section, members)])
    return pages


def section(name: str) -> str:
    """Make the part of a page that shows a module."""
    directive = f".. automodule:: gendiff.{name}\n   :members:"
    return f"\n## gendiff.{name}\n\n```{{eval-rst}}\n{directive}\n```\n"


def write_pages(app: Any) -> None:
    """Write the API pages, and leave alone those that are as they were, so that a second build is quick."""
    folder = Path(app.srcdir, "api")
    folder.mkdir(exist_ok=True)
    pages = rooms()
    for file in folder.glob("*.md"):
        if file.stem not in pages:
            file.unlink()
    for room, text in pages.items():
        file = folder / f"{room}.md"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


# Docstrings and signatures as the code has them.

COLON = "\ue000"
"""Stands for a colon while Napoleon reads the docstring of an attribute."""


def as_written(app: Any, what: str, name: str, obj: Any, *_: Any) -> tuple[str, str | None] | None:
    """Take annotations from the source: `Denoiser`, and not the Callable that it stands for."""
    if what not in ("function", "method", "class", "exception"):
        return None
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if isinstance(node, ast.ClassDef) and (hasattr(obj, "_fields") or dataclasses.is_dataclass(obj)):
        return f"({', '.join(ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign))})", None
    if not isinstance(node, ast.FunctionDef):
        return None
    if what == "method" and node.args.args and node.args.args[0].arg in ("self", "cls"):
        node.args.args = node.args.args[1:]
    return f"({ast.unparse(node.args)})", ast.unparse(node.returns) if node.returns else "None"


def as_markdown(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep reStructuredText from reading formulas as markup, and show indented blocks of a module as they are."""
    if re.fullmatch(r"Alias for field number \d+", "\n".join(lines).strip()):
        lines[:] = []
    if lines and what in ("attribute", "data", "property"):
        lines[0] = lines[0].replace(":", COLON)
    blocks, shown = [], what == "module"
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        if shown and indented and not lines[i - 1].strip():
            blocks += ["::", ""]
        blocks.append(line if shown and indented else escaped(line))
    lines[:] = blocks


def with_colons(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put the colons back that Napoleon would have taken for the end of a type."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def escaped(line: str) -> str:
    """Escape what reStructuredText would read as markup, outside of `code`."""
    if line.lstrip().startswith(">>>"):
        return line
    pieces = line.split("`")
    pieces[::2] = [re.sub(r"([\\*|]|_(?=\W|$))", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def aliases_as_written(app: Any, doctree: nodes.document) -> None:
    """Show what an alias stands for in the words of its source, `Callable[[Sample, Time], Sample]`."""
    for entry in doctree.findall(addnodes.desc):
        names = [name for signature in entry.findall(addnodes.desc_signature) for name in signature["ids"]]
        for paragraph in entry.findall(nodes.paragraph):
            if paragraph.astext().startswith("alias of ") and (alias := stands_for(names[0])):
                paragraph.children = [nodes.Text("alias of "), nodes.literal(alias, alias)]


def stands_for(name: str) -> str | None:
    """Find the value of a module's alias in its source."""
    module, _, alias = name.rpartition(".")
    lines = ast.parse(inspect.getsource(importlib.import_module(module))).body
    values = [line.value for line in lines if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == alias]
    return ast.unparse(values[0]) if values and values[0] else None


def setup(app: Any) -> None:
    """Connect the functions above to Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-signature", as_written)
    app.connect("autodoc-process-docstring", as_markdown, priority=100)
    app.connect("autodoc-process-docstring", with_colons, priority=900)
    app.connect("doctree-read", aliases_as_written)
