"""`import gendiff as gd`: the words, listed and typed; JAX is imported at the first use."""

import subprocess
import sys

import pytest

import gendiff as gd
from gendiff import denoiser, guidance, potential, process, sampling, words

WORDS = sorted(name for name in vars(words) if not name.startswith("_"))
MODULES = (process, denoiser, potential, guidance, sampling)


def test_there_is_a_word_of_every_kind():
    for word in ("Process", "Denoiser", "Potential", "Guidance", "Kernel", "edm", "from_v", "stack", "guide", "heun"):
        assert word in WORDS


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_the_object_of_its_module(word):
    assert word in dir(gd)
    assert any(getattr(gd, word) is vars(module).get(word) for module in MODULES)


def test_no_word_hides_a_module():
    assert {name for name in WORDS if f"gendiff.{name}" in sys.modules} == set()


def test_modules_are_attributes():
    assert gd.process is process
    assert gd.losses.mean is not None
    assert {"process", "losses", "methods", "__version__"} <= set(dir(gd))


def test_another_name_is_an_error():
    with pytest.raises(AttributeError, match=r"has no attribute 'guides': dir\(gendiff\)"):
        _ = gd.guides
    with pytest.raises(ImportError, match="guides"):
        from gendiff import guides  # noqa: F401


@pytest.mark.parametrize(
    ("imports", "absent"),
    [("import gendiff", {"jax", "gendiff.words"}), ("from gendiff.feedback import ask", {"optax", "gendiff.words"})],
)
def test_an_import_without_words_is_quick(imports, absent):
    code = f"{imports}; import sys; assert not {absent} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
