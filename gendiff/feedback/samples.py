"""What is to be labelled: images, 2-D points, trajectories or short motions, each known by the hash of its content."""

import dataclasses
import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL import Image, ImageOps

Kind: TypeAlias = Literal["image", "point", "trajectory", "motion"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ARRAYS = ("samples.npz", "samples.npy")
IMAGES = (".png", ".jpg", ".jpeg")
OVERSHOOT = 1.5
"""Generated images leave [-1, 1] a little and are clipped when shown; beyond this they are in other units."""
SHAPES = {
    "image": "uint8 or float in [-1, 1], (N, H, W) or (N, H, W, 1, 3 or 4)",
    "point": "float, (N, 2)",
    "trajectory": "float, (N, T, 2)",
    "motion": "float, (N, T, J, 3)",
}


class SampleError(ValueError):
    """Samples that are missing, cannot be read, or are not what was expected."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """N samples of one kind; `samples[i]` is the array of one."""

    place: Path
    """The folder or file that they came from."""
    kind: Kind
    ids: tuple[str, ...]
    """Relative paths of image files, or the numbers of an array's rows."""
    hashes: tuple[str, ...]
    """`content_hash` of each.  Labels hang on these: they survive renamed files, and equal samples share one."""
    source: np.ndarray | tuple[Path, ...] = dataclasses.field(repr=False)
    parents: np.ndarray | None = None
    """Of motions: (J,), the joint that each joint hangs on, negative for the root."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> np.ndarray:
        """One sample; a file that has changed since it was loaded raises."""
        if isinstance(self.source, np.ndarray):
            return self.source[index]
        sample = _image(self.place, self.source[index])
        if content_hash(sample) != self.hashes[index]:
            raise SampleError(f"sample {self.ids[index]}: expected the content it was loaded with, given another")
        return sample

    @property
    def folder(self) -> Path:
        """Where the labels go by default."""
        return self.place if self.place.is_dir() else self.place.parent


def content_hash(sample: np.ndarray) -> str:
    """SHA-256, in hexadecimal, of the sample's type, shape and bytes in C order."""
    head = f"{sample.dtype.str} {sample.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(sample).tobytes()).hexdigest()


def load(place: Path, kind: Kind | None = None) -> Samples:
    """Reads a folder with `samples.npz` or `samples.npy`, or else its PNG and JPEG files; or such an array file itself.

    An .npz holds its samples as `samples`, as `arr_0`, or as its only array; motions may come with `parents` (J,).
    Nothing is ever unpickled, and links that lead out of the folder are refused.

    Args:
      place: the folder or file.
      kind: what the samples are; by default inferred from type, shape and range.

    Raises:
      SampleError: names the file or sample, what was expected, and what was found.
    """
    place = Path(place)
    if not place.exists():
        raise SampleError(f"samples {place}: expected a folder, or an .npz or .npy file, given nothing")
    if place.is_file():
        return _load_array(place, place, kind)
    arrays = [place / name for name in ARRAYS if (place / name).exists()]
    if len(arrays) > 1:
        raise SampleError(f"samples {place}: expected one of {' and '.join(ARRAYS)}, given both: name the file itself")
    return _load_array(place, arrays[0], kind) if arrays else _load_images(place, kind)


def of(array: np.ndarray, kind: Kind | None = None, place: Path = Path("samples")) -> Samples:
    """Samples of an array whose first axis counts them; the types and shapes of each kind are `SHAPES`."""
    array = np.asarray(array)
    if not array.size:
        raise SampleError(f"samples {place}: expected at least one, given shape {array.shape}")
    kind = _checked(place, array, kind or _infer(place, array))
    hashes = tuple(content_hash(sample) for sample in array)
    return Samples(place, kind, tuple(str(i) for i in range(len(array))), hashes, array)


def _load_array(place: Path, file: Path, kind: Kind | None) -> Samples:
    if file.suffix not in (".npz", ".npy"):
        raise SampleError(
            f"samples {file}: expected a folder, or an .npz or .npy file, given {file.suffix or 'a file'}"
        )
    _inside(place if place.is_dir() else place.parent, file)
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return of(loaded, kind, place)
        with loaded:
            samples = of(loaded[_key(file, loaded.files)], kind, place)
            parents = loaded["parents"] if "parents" in loaded.files else None
    except SampleError:
        raise
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise SampleError(
            f"samples {file}: expected plain arrays (nothing pickled), given what cannot be read as such "
            f"({_first_line(error)})"
        ) from error
    return dataclasses.replace(samples, parents=_parents(file, samples, parents))


def _key(file: Path, names: list[str]) -> str:
    for name in ("samples", "arr_0"):
        if name in names:
            return name
    rest = [name for name in names if name != "parents"]
    if len(rest) != 1:
        raise SampleError(f"samples {file}: expected an array called samples, given {', '.join(names) or 'none'}")
    return rest[0]


def _parents(file: Path, samples: Samples, parents: np.ndarray | None) -> np.ndarray | None:
    if parents is None or samples.kind != "motion":
        return None
    joints = samples[0].shape[1]
    fits = np.issubdtype(parents.dtype, np.integer) and parents.shape == (joints,) and parents.max() < joints
    if not fits:
        raise SampleError(
            f"parents in {file}: expected integers below {joints} of shape ({joints},), given {_describe(parents)}"
        )
    return parents


def _load_images(folder: Path, kind: Kind | None) -> Samples:
    files = sorted(_image_files(folder), key=lambda file: _natural(file.relative_to(folder).as_posix()))
    if not files:
        raise SampleError(f"samples {folder}: expected {', '.join(ARRAYS)} or PNG or JPEG files, given none of them")
    if kind not in (None, "image"):
        raise SampleError(f"samples {folder}: expected an array file for kind {kind}, given images")
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        hashes = tuple(pool.map(lambda file: content_hash(_image(folder, file)), files))
    return Samples(folder, "image", tuple(file.relative_to(folder).as_posix() for file in files), hashes, tuple(files))


def _image_files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if name[0] != "." and name.lower().endswith(IMAGES))


def _natural(name: str) -> list[tuple[int, str]]:
    """img2 comes before img10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _image(folder: Path, file: Path) -> np.ndarray:
    """Pixels (H, W), (H, W, 3) or (H, W, 4) in uint8, turned as the file's orientation says."""
    _inside(folder, file)
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode not in ("L", "RGB", "RGBA"):
                upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
            return np.asarray(upright)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(
            f"sample {file}: expected a PNG or JPEG image, given what cannot be read as one ({_first_line(error)})"
        ) from error


def _inside(folder: Path, file: Path) -> None:
    target = file.resolve()
    if not target.is_relative_to(folder.resolve()):
        raise SampleError(f"sample {file}: expected a file inside {folder}, given a link to {target}")


def _infer(place: Path, array: np.ndarray) -> Kind:
    floating, shape = np.issubdtype(array.dtype, np.floating), array.shape
    if floating and shape[1:] == (2,):
        return "point"
    if floating and array.ndim == 3 and shape[2] == 2:
        return "trajectory"
    if not floating or array.ndim != 4 or shape[3] != 3:
        return "image"
    if np.nanmax(np.abs(array)) > OVERSHOOT:
        return "motion"
    if shape[1] == shape[2]:
        return "image"
    raise SampleError(
        f"samples {place}: expected --kind image or --kind motion, since {_describe(array)} may be either"
    )


def _checked(place: Path, array: np.ndarray, kind: Kind) -> Kind:
    floating, per_sample = np.issubdtype(array.dtype, np.floating), array.shape[1:]
    fits = {
        "image": (floating or array.dtype == np.uint8)
        and (len(per_sample) == 2 or (len(per_sample) == 3 and per_sample[2] in (1, 3, 4))),
        "point": floating and per_sample == (2,),
        "trajectory": floating and len(per_sample) == 2 and per_sample[1] == 2,
        "motion": floating and len(per_sample) == 3 and per_sample[2] == 3,
    }
    if not fits[kind]:
        wanted = "; or ".join(f"{name}s: {shape}" for name, shape in SHAPES.items())
        raise SampleError(f"samples {place} as {kind}s: expected {wanted}; given {_describe(array)}")
    broken = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1))
    if len(broken):
        raise SampleError(
            f"sample {broken[0]} of {place}: expected finite numbers, given others (in {len(broken)} samples)"
        )
    if kind == "image" and floating and np.abs(array).max() > OVERSHOOT:
        raise SampleError(
            f"samples {place} as images: expected floats in [-1, 1], given up to {np.abs(array).max():.4g}"
        )
    return kind


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
