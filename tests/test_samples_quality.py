"""The names of what benchmarks/samples_quality.py compares."""

import pytest

from prfl_bench.samples_quality import Mode


def test_the_modes():
    assert Mode.of("fresh") == Mode("fresh")
    assert Mode.of("samples:4")[1:] == (4, 0, 1)
    assert Mode.of("persistent:16")[1:] == (1, 16, 1)
    assert Mode.of("persistent:1:4")[1:] == (1, 1, 4)


@pytest.mark.parametrize("text", ["old", "fresh:1", "samples", "samples:0", "samples:x", "persistent:1:2:3"])
def test_another_mode_is_refused(text):
    with pytest.raises(SystemExit, match="--modes: got .*want fresh, samples:K, persistent:N"):
        Mode.of(text)
