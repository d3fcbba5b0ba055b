"""toy.py says what its first lines promise, and stays as short as they promise."""

import re
from pathlib import Path

from experiments import toy


def test_it_prints_what_its_first_lines_say(capsys):
    toy.main()
    rates = [float(rate) for rate in re.findall(r"(\d+\.\d+)%", capsys.readouterr().out)]
    promised = [float(rate) for rate in re.findall(r"(\d+\.\d+)%", toy.__doc__)]
    assert len(rates) == len(promised) == 2
    # 8,192 samples a rate: four standard errors of a difference, for another order of sums.
    for rate, promise in zip(rates, promised, strict=True):
        assert abs(rate - promise) < 4 * 100 * (2 * promise / 100 / 8192) ** 0.5


def test_it_is_sixty_lines():
    assert len(Path(toy.__file__).read_text().splitlines()) <= 60
