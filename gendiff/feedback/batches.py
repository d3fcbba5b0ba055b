"""Labels of batches of drawn images, each marked by a person at a page of its own."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Float

from gendiff.data import files
from gendiff.feedback import ask, labels


def marks(
    images: Float[np.ndarray, "n h w c"], folder: Path, name: str, malign: int, benign: int, meaning: str
) -> list[float]:
    """Ask for the labels of images in [-1, 1]: 1 for benign, 0 for malign, NaN for an image without a label.

    Labels are of their samples, so a batch has a folder `<name>-<hash>` below `folder`; asked again, its labels stand.

    Args:
      malign, benign: numbers needed.
      meaning: of "malign", such as "a seven with a stroke".

    Raises:
      ValueError: too few labels when the page closed; see also `ask.ask`.
    """
    pixels = np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    place = folder / f"{name}-{hashlib.blake2b(pixels.tobytes(), digest_size=4).hexdigest()}"
    place.mkdir(parents=True, exist_ok=True)
    files.store(place / "samples.npz", lambda file: np.savez(file, pixels))
    chosen = ask.ask(place, malign, benign, ask.Options(meaning=meaning))
    found = np.full(len(images), np.nan)
    found[np.asarray(chosen.malign)], found[np.asarray(chosen.benign)] = 0.0, 1.0
    return found.tolist()


def seconds(folder: Path) -> float | None:
    """The mean labelling time of the batches below `folder`; None if none has labels."""
    found = sorted(folder.glob(f"*/{ask.FILE}"))
    return float(np.mean([sum(labels.seconds(labels.read(file)).values()) for file in found])) if found else None
