"""Samples for labelling: images, 2-D points, trajectories or short motions, identified by their content hash."""

import collections
import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np

from gendiff.data import files
from gendiff.feedback import pictures
from gendiff.feedback.regular import shown

Kind: TypeAlias = Literal["image", "point", "trajectory", "motion"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ARRAYS = ("samples.npz", "samples.npy")
LABELS = "labels.jsonl"
"""Default file of labels, beside the samples."""
OVERSHOOT = 1.5
"""Largest absolute value of a float image; values outside of [-1, 1] are clipped when shown."""
LARGEST = 1e100
"""Largest coordinate, because the squares of larger ones overflow."""
NARROW = 4
"""Up to this width, the rows of a grey image could also be coordinates or channels."""
SHAPES = {
    "image": "uint8 or float in [-1, 1], (N, H, W) or (N, H, W, 1, 3 or 4)",
    "point": "float, (N, 2)",
    "trajectory": "float, (N, T, 2)",
    "motion": "float, (N, T, J, 3)",
}


class SampleError(ValueError):
    """Samples are missing, cannot be read, or are of another kind."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """N samples of the same kind; `samples[i]` is the array of sample i."""

    place: Path
    """Source folder or file."""
    kind: Kind
    ids: tuple[str, ...]
    """Relative paths of image files, as `regular.shown`, or the numbers of an array's rows."""
    hashes: tuple[str, ...]
    """`content_hash` of the samples.  Labels refer to it, so they survive renaming, and equal samples share a label."""
    source: np.ndarray | tuple[Path, ...] = dataclasses.field(repr=False)
    parents: np.ndarray | None = None
    """Parents of a motion's joints, (J,), negative for the root."""
    left_out: str = ""
    """Summary of files that were not read, such as "2 .gif, 1 linked folder"."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a sample.

        Raises:
          SampleError: the file has changed since it was loaded.
        """
        if isinstance(self.source, np.ndarray):
            return self.source[index]
        sample = _image(self.place, self.source[index])
        if content_hash(sample) != self.hashes[index]:
            raise SampleError(f"sample {self.ids[index]} must keep the content it was loaded with, got another")
        return sample

    @property
    def folder(self) -> Path:
        """Default folder of the labels."""
        return self.place if self.place.is_dir() else self.place.parent


def content_hash(sample: np.ndarray) -> str:
    """Return the SHA-256, in hexadecimal, of the sample's type, shape and bytes in C order."""
    head = f"{sample.dtype.str} {sample.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(sample).tobytes()).hexdigest()


def load(place: Path, kind: Kind | None = None) -> Samples:
    """Read a folder with `samples.npz` or `samples.npy`, or else its images; or read such an array file.

    Images are PNG, JPEG, WebP and BMP files, also in subfolders; greys of 16 bits keep all bits.  An .npz holds its
    samples as `samples`, as `arr_0`, or as its only array; `parents` (J,) may accompany motions.  Pickled data is
    refused.  Links to files inside the folder are read, links out of it are refused, linked folders are left out.

    Args:
      place: the folder or file.
      kind: kind of the samples; default: inferred from type, shape and range.

    Raises:
      SampleError: the samples are missing, damaged, not finite or of another kind; the message names the file.
      ModuleNotFoundError: the samples are images, and Pillow is not installed.
    """
    place = Path(place)
    try:
        mode = place.stat().st_mode
    except (OSError, ValueError) as error:
        found = "nothing" if isinstance(error, FileNotFoundError) else _first_line(error)
        raise SampleError(f"samples {shown(place)} must be a folder, or an .npz or .npy file, got {found}") from None
    if not stat.S_ISDIR(mode):
        return _load_array(place, place, kind)
    arrays = [place / name for name in ARRAYS if os.path.lexists(place / name)]
    if len(arrays) > 1:
        raise SampleError(f"samples {shown(place)} must hold {' or '.join(ARRAYS)}, got both: name the file itself")
    return _load_array(place, arrays[0], kind) if arrays else _load_images(place, kind)


def of(
    array: np.ndarray, kind: Kind | None = None, place: Path = Path("samples"), parents: np.ndarray | None = None
) -> Samples:
    """Return the samples of an array; `SHAPES` has the types and shapes of the kinds.

    Args:
      array: (N, ..).
      kind: kind of the samples; default: inferred from type, shape and range.
      place: source of the samples, for errors.
      parents: see `Samples`; with parents, the kind is inferred as motion.

    Raises:
      SampleError: the array is empty or not finite, or the kind does not fit or is uncertain.
    """
    array = np.asarray(array)
    if not array.ndim or not array.size:
        raise SampleError(f"samples {shown(place)} must hold at least one, got shape {array.shape}")
    _check_finite(place, array)
    if kind is None and parents is not None and _fits(array, "motion"):
        kind = "motion"
    kind = _checked(place, array, kind or _infer(place, array))
    hashes = tuple(content_hash(sample) for sample in array)
    parents = _parents(place, array, parents) if kind == "motion" and parents is not None else None
    return Samples(place, kind, tuple(str(i) for i in range(len(array))), hashes, array, parents)


def _load_array(place: Path, file: Path, kind: Kind | None) -> Samples:
    if file.suffix.lower() not in (".npz", ".npy"):
        raise SampleError(
            f"samples {shown(file)} must be a folder, or an .npz or .npy file, got {file.suffix or 'a file'}"
        )
    _inside(place if place.is_dir() else place.parent, file)
    left_out: collections.Counter[str] = collections.Counter()
    if place.is_dir():
        left_out[f"image files beside {file.name}"] = sum(_is_image(found.name) for found in place.iterdir())
    parents = None
    try:
        with os.fdopen(files.descriptor(file, links=True), "rb") as opened:
            loaded = np.load(opened, allow_pickle=False)
            array = loaded
            if not isinstance(loaded, np.ndarray):
                key = _key(file, loaded.files)
                array, parents = loaded[key], loaded["parents"] if "parents" in loaded.files else None
                left_out.update(f"array {name}" for name in loaded.files if name not in (key, "parents"))
            samples = of(array, kind, place, parents)
    except SampleError:
        raise
    except Exception as error:  # damaged archives raise many types
        raise SampleError(
            f"samples {shown(file)} must be plain arrays (nothing pickled), got another content ({_first_line(error)})"
        ) from error
    left_out["array parents"] += parents is not None and samples.parents is None
    return dataclasses.replace(samples, left_out=_counts(left_out))


def _key(file: Path, names: list[str]) -> str:
    for name in ("samples", "arr_0"):
        if name in names:
            return name
    if len(rest := [name for name in names if name != "parents"]) != 1:
        raise SampleError(f"samples {shown(file)} must have an array called samples, got {', '.join(names) or 'none'}")
    return rest[0]


def _parents(place: Path, array: np.ndarray, parents: np.ndarray) -> np.ndarray:
    joints = array.shape[2]
    fits = np.issubdtype(parents.dtype, np.integer) and parents.shape == (joints,) and parents.max() < joints
    if not fits:
        raise SampleError(
            f"parents in {shown(place)} must be integers below {joints} of shape ({joints},), got {_describe(parents)}"
        )
    return parents


def _load_images(folder: Path, kind: Kind | None) -> Samples:
    left_out: collections.Counter[str] = collections.Counter()
    found = {file: shown(file.relative_to(folder).as_posix()) for file in _image_files(folder, left_out)}
    images = sorted(found, key=lambda file: _natural(found[file]))
    counts = _counts(left_out)
    if not images:
        rest = f" (left out: {counts})" if counts else ""
        raise SampleError(
            f"samples {shown(folder)} must hold {', '.join(ARRAYS)} or {pictures.NAMES} files, got none of them{rest}"
        )
    if kind not in (None, "image"):
        raise SampleError(f"samples {shown(folder)} must hold an array file for kind {kind}, got images")
    with ThreadPoolExecutor() as pool:  # threads, because Pillow releases the interpreter's lock while it decodes
        hashes = tuple(pool.map(lambda file: content_hash(_image(folder, file)), images))
    _check_rounded(images, hashes)
    return Samples(folder, "image", tuple(found[file] for file in images), hashes, tuple(images), left_out=counts)


def _image_files(folder: Path, left_out: collections.Counter[str]) -> Iterator[Path]:
    """Yield the image files below a folder; count all other entries in `left_out`."""
    waiting = [folder]
    while waiting:  # a loop, because folders can be nested deeper than the recursion limit
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name == LABELS:
                        continue
                    if entry.name.startswith("."):
                        left_out["hidden"] += 1
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        left_out["linked folder"] += 1
                    elif _is_image(entry.name):
                        yield Path(entry.path)
                    else:
                        left_out[shown(Path(entry.name).suffix).lower() or "file without a suffix"] += 1
        except OSError as error:
            raise SampleError(
                f"samples {shown(folder)}: the folder {shown(here)[-200:]} cannot be read ({error.strerror})"
            ) from None


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(pictures.SUFFIXES)


def _counts(left_out: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()) if count)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sorting key that puts img2 before img10."""
    return [(int(part), "") if part.isascii() and part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _image(folder: Path, file: Path) -> np.ndarray:
    _inside(folder, file)
    try:
        return pictures.read(file)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # damaged pictures raise many types
        raise SampleError(
            f"sample {shown(file)} must be a {pictures.NAMES} image, got another content ({_first_line(error)})"
        ) from error


def _check_rounded(images: Iterable[Path], hashes: Iterable[str]) -> None:
    """Refuse pictures that differ only in the bits that Pillow drops (the lower bytes of 16-bit colours).

    They have one hash, so a mark on the first picture would also label the others.
    """
    known: dict[str, Path] = {}
    for file, content in zip(images, hashes, strict=True):
        first = known.setdefault(content, file)
        if first is not file and any(map(pictures.rounded, (file, first))) and file.read_bytes() != first.read_bytes():
            raise SampleError(
                f"samples {shown(first)} and {shown(file)}: colours must have 8 bits where pictures differ by less "
                "than that, got 16 bits: save them as 8 bits, or leave a picture out"
            )


def _inside(folder: Path, file: Path) -> None:
    target = Path(os.path.realpath(file))  # because `Path.resolve` fails for a link to itself in some versions
    if not target.is_relative_to(os.path.realpath(folder)):
        raise SampleError(f"sample {shown(file)} must be a file inside {shown(folder)}, got a link to {shown(target)}")


def _infer(place: Path, array: np.ndarray) -> Kind:
    """Return the certain kind of an array of finite numbers, or raise SampleError."""
    floating, shape = np.issubdtype(array.dtype, np.floating), array.shape
    if floating and shape[1:] == (2,):
        return "point"
    if floating and array.ndim == 3 and shape[2] == 2:
        return "trajectory"
    if array.ndim == 3 and shape[2] <= NARROW and _fits(array, "image"):
        raise _uncertain(place, array, "image")
    if not _fits(array, "motion"):
        return "image"
    low, high = array.min(), array.max()
    if shape[1] == shape[2]:
        if max(-low, high) <= OVERSHOOT:
            return "image"
    elif max(-low, high) > OVERSHOOT and not (low >= 0 and high <= 255):  # 0..255 can be an image
        return "motion"
    raise _uncertain(place, array, "image", "motion")


def _uncertain(place: Path, array: np.ndarray, *kinds: Kind) -> SampleError:
    options = " or ".join(f"--kind {kind} ({SHAPES[kind]})" for kind in kinds)
    return SampleError(
        f"samples {shown(place)} must come with {options}, because {_describe(array)} may be something else"
    )


def _fits(array: np.ndarray, kind: Kind) -> bool:
    floating, per_sample = np.issubdtype(array.dtype, np.floating), array.shape[1:]
    return {
        "image": (floating or array.dtype == np.uint8)
        and (len(per_sample) == 2 or (len(per_sample) == 3 and per_sample[2] in (1, 3, 4))),
        "point": floating and per_sample == (2,),
        "trajectory": floating and len(per_sample) == 2 and per_sample[1] == 2,
        "motion": floating and len(per_sample) == 3 and per_sample[2] == 3,
    }[kind]


def _checked(place: Path, array: np.ndarray, kind: Kind) -> Kind:
    if not _fits(array, kind):
        wanted = "; or ".join(f"{name}s: {shape}" for name, shape in SHAPES.items())
        raise SampleError(f"samples {shown(place)} as {kind}s must be {wanted}; got {_describe(array)}")
    if kind == "image" and array.dtype != np.uint8 and np.abs(array).max() > OVERSHOOT:
        raise SampleError(
            f"samples {shown(place)} as images must be floats in [-1, 1], got up to {np.abs(array).max():.4g}: "
            "scale them, or save 0 to 255 as uint8"
        )
    return kind


def _check_finite(place: Path, array: np.ndarray) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        return
    largest = min(LARGEST, float(np.finfo(array.dtype).max))
    broken = np.flatnonzero(~(np.abs(array) <= largest).reshape(len(array), -1).all(1))
    if len(broken):
        raise SampleError(
            f"sample {broken[0]} of {shown(place)} must have finite numbers, got others (in {len(broken)} samples)"
        )


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
