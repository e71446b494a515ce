"""Every key of HY-Video-PRFL's YAML files takes a value of any kind, or refuses it."""

import copy
import math
from collections import Counter

import pytest
import yaml
from test_official_yaml import official

from prfl_engine import config
from prfl_engine.config import load_config
from prfl_engine.errors import UserError
from prfl_engine.official_keys import KEYS


@pytest.mark.parametrize("kind", ["prfl", "ce"])
def test_a_value_of_any_kind_is_read_or_refused(kind, tmp_path, monkeypatch, capsys):
    path, refused = official(tmp_path, kind), Counter()
    given = yaml.safe_load(path.read_text())
    for key in KEYS:
        *sections, name = key.split(".")
        for value in (math.nan, -1, 2**200, "", " ", "a\0b", [], [[]], ["x"], {"x": [1]}, True):
            values = copy.deepcopy(given)
            place = values
            for section in sections:
                place[section] = place = place[section] if isinstance(place.get(section), dict) else {}
            place[name] = value
            monkeypatch.setattr(config, "read_yaml", lambda _, values=values: values)
            try:
                load_config(path)
            except UserError:
                refused[key] += 1
    assert len(refused) > 30
    assert min(refused["save.output_dir"], refused["train_id"]) >= 3
