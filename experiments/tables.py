"""All results on one page beside the papers' numbers, and the commands that reproduce a row.

    python -m experiments.tables
    python -m experiments.tables FOLDER ... --output page.md
    python -m experiments.tables --row genneg.checkerboard round-1
    python -m experiments.tables --docs docs/results

The page, in Markdown, has a table for each configuration, which joins runs that differ only in their seed.  It says
where, when and by which commit they ran, and lists missing results.  Warnings name files that cannot be read.
"""

import dataclasses
import os
import sys
from pathlib import Path

import tyro

from experiments.lab import page
from experiments.lab.config import ConfigError
from experiments.lab.experiment import NAMES
from experiments.lab.reproduce import reproduce
from experiments.lab.results import cleaned, collect
from gendiff.command import BAD_INPUT, say
from gendiff.data import files


@dataclasses.dataclass(frozen=True)
class Options:
    """The folders to read, and the page to write."""

    roots: tyro.conf.Positional[tuple[Path, ...]] = (Path("results"),)
    """Folders that hold runs, at any depth."""
    output: Path = Path("results/index.md")
    """The page, or a folder for its index.md."""
    join_commits: bool = False
    """Also join runs of different commits and devices."""
    row: tuple[str, str] | None = None
    """EXPERIMENT and ROW: print the commands that reproduce this row, and write no page."""
    docs: Path | None = None
    """A folder such as docs/results, with a folder of results and findings.md for each experiment: write their pages
    there, and read nothing else."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m experiments.tables", description=__doc__)
    try:
        for path in (*options.roots, options.output, *filter(None, [options.docs])):
            files.local("a folder, --output or --docs", path)
        run(options)
    except (ConfigError, ValueError, OSError) as error:
        if os.environ.get("GENDIFF_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None


def run(options: Options) -> None:
    """Write the page or pages, or print the commands that reproduce a row.

    Raises:
      ValueError: no run or no such row exists, or a file of `docs` is damaged.
      OSError: a page cannot be written.
    """
    warnings: list[str] = []
    roots = options.roots if options.docs is None else (options.docs,)
    runs = collect(roots, lambda text: warnings.append(cleaned(text)))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.docs is not None and warnings:
        raise ValueError(f"--docs must be a folder whose results can be read, got {warnings[0]}")
    if not runs and options.docs is None:
        places = ", ".join(map(str, roots))
        command = f"python -m experiments.{NAMES[0]} --preset smoke"
        raise ValueError(f"no run of an experiment in {places}: run one first, {command}")
    if options.row is not None:
        say(reproduce(runs, *options.row, options.join_commits))
        return
    if options.docs is not None:
        pages = page.documents(options.docs, runs)
    else:
        output = options.output / "index.md" if options.output.is_dir() else options.output
        output = output if output.suffix == ".md" else output.with_name(f"{output.name}.md")
        pages = {output: page.page(runs, warnings, output.parent, options.join_commits)}
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.store_text(path, text)
        say(str(path))


if __name__ == "__main__":
    main()
