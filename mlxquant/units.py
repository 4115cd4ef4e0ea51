"""Bytes, tokens, rates and times: parsed from what people type, printed as people read them.

GB is 10**9 and GiB is 2**30, never mixed: Apple sells RAM in GiB and calls it GB, so machines use GiB here.
"""

from __future__ import annotations

import re

from mlxquant.errors import UsageError

KIB, MIB, GIB = 2**10, 2**20, 2**30
_BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
               "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 2**40}  # fmt: skip
_RAM_UNITS = {"": GIB, "G": GIB, "GB": GIB, "GIB": GIB, "MB": MIB, "MIB": MIB, "TB": 2**40, "TIB": 2**40}
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TOKEN_UNITS = {"": 1, "K": 1024, "M": 1024**2}
_MOST = 1e18  # of any unit; so no product overflows


def _split(text: str, what: str, example: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or float(match[1]) > _MOST:
        raise UsageError(f"{text[:80]!r} is not {what}", hint=f"write it like {example}")
    return float(match[1]), match[2].upper()


def parse_bytes(text: str) -> int:
    """'5GB', '16 GiB', '512MiB' or a plain number of bytes -> bytes. Raises UsageError."""
    value, unit = _split(text, "a number of bytes", "5GB or 16GiB")
    if unit not in _BYTE_UNITS:
        raise UsageError(f"{text!r} has the unknown unit {unit!r}", hint="use B, KB, MB, GB, TB, KiB, MiB or GiB")
    return round(value * _BYTE_UNITS[unit])


def parse_ram(text: str) -> int:
    """RAM as Apple prints it: '8GB', '8 GiB', '8g' and '8' are all 8 GiB. Bytes. Raises UsageError."""
    value, unit = _split(text, "an amount of RAM", "16GB")
    if unit not in _RAM_UNITS:
        raise UsageError(f"{text!r} has the unknown unit {unit!r}", hint="write it like 16GB")
    return round(value * _RAM_UNITS[unit])


def parse_tokens(text: str) -> int:
    """'4096', '8k' (8 * 1024) or '1M' -> tokens. Raises UsageError."""
    value, unit = _split(text, "a number of tokens", "4096 or 8k")
    if unit not in _TOKEN_UNITS:
        raise UsageError(f"{text!r} has the unknown unit {unit!r}", hint="write it like 4096 or 8k")
    return round(value * _TOKEN_UNITS[unit])


def parse_count(text: str) -> int:
    """'7B', '135M', '1.5b' or a plain number of parameters -> parameters. Raises UsageError."""
    value, unit = _split(text, "a number of parameters", "7B or 135M")
    if unit not in _COUNT_UNITS or not value:
        found = f"the unknown unit {unit!r}" if value else "no parameters"
        raise UsageError(f"{text!r} has {found}", hint="write it like 7B or 135M")
    return round(value * _COUNT_UNITS[unit])


def visible(text: str) -> str:
    """What a terminal would act on, and what nobody would see, as an escape: \\x1b, \\n, \\u202e."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_tokens(count: int) -> str:
    """8192 -> '8k', 131072 -> '128k', 40000 -> '39k' (thousands of 1024, rounded down), 900 -> '900'."""
    return f"{count // 1024}k" if count >= 1024 else str(count)


def format_bytes(count: float) -> str:
    """Decimal units, three significant digits: 3.55 GB, 98.4 MB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(count) >= 0.9995 * scale:
            return f"{format_number(count / scale)} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """Parameters and tokens: 135M, 1.54B."""
    for unit, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(count) >= 0.9995 * scale:
            return f"{format_number(count / scale)}{unit}"
    return f"{count:.0f}"


def format_number(value: float) -> str:
    """Three significant digits without an exponent, a fraction without trailing zeros: 1, 1.54, 98.4, 512, 1,024."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else text


def format_duration(seconds: float) -> str:
    """0.42 s, 12.3 s, 3 min 05 s."""
    if seconds < 60:
        return f"{format_number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_rate(tokens_per_s: float) -> str:
    return f"{format_number(tokens_per_s)} tok/s"
