"""Names of before are taken for a while, with a warning, wherever options are read."""

from __future__ import annotations

import logging

import pytest

from kvloom.engine.errors import ConfigError, InvalidRequestError
from kvloom.engine.retention import RETENTIONS
from kvloom.engine.selection import METHODS
from kvloom.engine.selection.base import read_options
from kvloom.engine.settings import former

OLD = {"least": 64, "share": 7}


@pytest.fixture(autouse=True)
def unwarned() -> None:
    former._warned.cache_clear()


def test_window_options_of_both_modes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            view = read_options(METHODS["razor_view"], OLD)
            evict = RETENTIONS["razor"].read('{"least": 64, "share": 7}')
    assert (view.min_window, view.window_divisor) == (evict.min_window, evict.window_divisor) == (64, 7)
    assert len(caplog.messages) == 4, "once for each"
    assert "razor_view.least is called min_window now" in caplog.messages[0]


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"kv\.razor_view\.least is not an option"):
        read_options(METHODS["razor_view"], {"least": 64, "min_window": 64})
    with pytest.raises(ConfigError, match="unknown share"):
        RETENTIONS["razor"].read('{"share": 5, "window_divisor": 5}')


def test_a_former_name_is_nobody_elses_option() -> None:
    with pytest.raises(InvalidRequestError, match=r"kv\.recycled\.least is not an option"):
        read_options(METHODS["recycled"], OLD)


def test_the_table_names_what_there_is() -> None:
    for owner, names in former.OPTIONS.items():
        options = (METHODS.get(owner) or RETENTIONS[owner]).options
        assert options is not None
        known = set(options.__dataclass_fields__)
        assert set(names.values()) <= known and not set(names) & known
