"""The labelling page: mark samples as malign, undecided or benign, with the mouse or the keyboard.

It works on a TPU VM through an SSH tunnel: the command prints the address and the ssh command. It writes every mark at
once to a file of JSON lines. Stop at any time, also with kill -9, and resume. The foot of the page lists the keys.
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
    """Open the page, or with --report only print a summary of the marks.

    Args:
      samples: Folder with samples.npz or samples.npy, or else with PNG, JPEG, WebP or BMP images; or such an array
        file. Arrays: images (N, H, W) or (N, H, W, C) in uint8 or float in [-1, 1], points (N, 2), trajectories
        (N, T, 2), motions (N, T, J, 3).
      options: Options of the page.
      malign: Number of malign samples to collect; the page counts the missing ones, and closes when it has enough.
      benign: Number of benign samples to collect.
      report: Print counts, minutes and the raters' agreement, and open no page.
      also: Other raters' files of labels of the same samples, for the report.
    """
    for name, path in (("samples", samples), ("--labels", options.labels), *(("--also", file) for file in also)):
        if path is not None:
            files.local(name, path)
    need = (malign, benign) if malign or benign else None
    ask.check_options(options, need)
    if not report:
        ask.hold(ask.make_board(samples, options, need), options)
    found = reading.load(samples, options.kind)
    stopping.say(consensus.report(found, labels.read(ask.label_file(found, options), *also)))


def main() -> None:
    """Run the command line.  An error that the user can fix prints one line and exits with status 2."""
    stopping.heed()
    try:
        if 1 in stopping.closed:
            raise ValueError("standard output must be open, because the page's address and the report go there")
        tyro.cli(command, prog="python -m gendiff.feedback", description=__doc__)
    except BrokenPipeError:  # the reader of standard output has closed it, such as `| head -1`
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
