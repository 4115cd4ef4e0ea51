"""What people type is parsed, what they read is rounded, and nothing unknown is guessed."""

from __future__ import annotations

import pytest

from mlxquant.errors import UsageError
from mlxquant.units import (
    format_bytes,
    format_count,
    format_duration,
    format_rate,
    parse_bytes,
    parse_ram,
    parse_tokens,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("5GB", 5 * 10**9), ("16 GiB", 16 * 2**30), ("1.5mb", 1_500_000), ("512", 512), (" 2 KiB ", 2048)],
)
def test_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["8GB", "8 GiB", "8g", "8", "8192MB"])
def test_ram_is_as_apple_prints_it(text):
    assert parse_ram(text) == 8 * 2**30


@pytest.mark.parametrize("text", ["", "GB", "-8GB", "8XB", "8kB", "9" * 400])
def test_what_is_no_amount_of_ram(text):
    with pytest.raises(UsageError):
        parse_ram(text)


@pytest.mark.parametrize(("text", "value"), [("4096", 4096), ("8k", 8192), ("1M", 2**20), ("0.5k", 512)])
def test_tokens(text, value):
    assert parse_tokens(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 XB", "1e9", "5GB6", "nan", "9" * 400, "1" + "0" * 300 + "TB"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(UsageError):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "8kb", "-1", "many", "9" * 400])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(UsageError):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (82_793_088, "82.8 MB"), (999_700_000, "1 GB"),
     (3.554e9, "3.55 GB"), (538_060_032, "538 MB"), (1.5e12, "1,500 GB")],
)  # fmt: skip
def test_format_bytes(count, text):
    assert format_bytes(count) == text


def test_other_formats():
    assert [format_count(n) for n in (7, 134_515_008, 1.777e9, 6.71e11)] == ["7", "135M", "1.78B", "671B"]
    assert [format_duration(s) for s in (0.0178, 12.34, 185, 3725)] == ["0.02 s", "12.3 s", "3 min 05 s", "1 h 02 min"]
    assert [format_rate(r) for r in (0.224, 19.7, 12345)] == ["0.22 tok/s", "19.7 tok/s", "12,345 tok/s"]
