"""The labelling page: marks samples as malign, undecided or benign, with the mouse or the keyboard.

It works on a TPU VM through an SSH tunnel: the command prints the address to open and the line to type. Every mark is
written at once to a plain file of JSON lines; stop at any time, also with kill -9, and go on where you stopped. The
keys stand at the foot of the page.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gendiff import command as stopping
from gendiff.data import files
from gendiff.feedback import ask, consensus, labels
from gendiff.feedback import samples as reading
from gendiff.feedback.ask import Options

DEFAULTS = Options()


def command(
    samples: tyro.conf.Positional[Path],
    options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS,
    malign: int = 0,
    benign: int = 0,
    report: bool = False,
    also: tuple[Path, ...] = (),
) -> None:
    """Opens the page, or with --report only says what has been marked.

    Args:
      samples: Folder with samples.npz or samples.npy, or else with PNG, JPEG, WebP or BMP images; or such an array
        file. Arrays: images (N, H, W) or (N, H, W, C) in uint8 or float in [-1, 1], points (N, 2), trajectories
        (N, T, 2), motions (N, T, J, 3).
      options: What the page can be told.
      malign: How many malign samples are wanted; the page shows how many are missing, and closes when there are enough.
      benign: How many benign samples are wanted.
      report: Print counts, minutes and the raters' agreement, and open no page.
      also: Further files of labels of the same samples, for the report (other raters').
    """
    for name, path in (("samples", samples), ("--labels", options.labels), *(("--also", each) for each in also)):
        if path is not None:
            files.local(name, path)
    need = (malign, benign) if malign or benign else None
    ask.check_options(options, need)
    if not report:
        ask.hold(ask.make_board(samples, options, need), options)
    found = reading.load(samples, options.kind)
    stopping.say(consensus.report(found, labels.read(ask.label_file(found, options), *also)))


def main() -> None:
    """The command line.  Errors that a user can mend are one line and exit status 2."""
    stopping.heed()
    try:
        if 1 in stopping.closed:
            raise ValueError("standard output must be open, because the page's address and the report go there")
        tyro.cli(command, prog="python -m gendiff.feedback", description=__doc__)
    except BrokenPipeError:  # `| head -1`: nobody reads it
        raise SystemExit(stopping.UNREAD) from None
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("GENDIFF_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        print("(GENDIFF_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
