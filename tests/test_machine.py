"""What a Mac's tools print, read; what this machine says of itself; and Macs that are only described."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from math import ceil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxquant import machine
from mlxquant.errors import UsageError
from mlxquant.machine import bandwidth, described, probe
from mlxquant.macs import chips, largest_buffer, usual_working_set

GIB, MIB = 2**30, 2**20
TABLE = tomllib.loads((Path(machine.__file__).parent / "macs.toml").read_text())

# `ioreg -r -d1 -w0 -c AGXAccelerator` on an M4, shortened.
IOREG = """+-o AGXAcceleratorG16G  <class AGXAcceleratorG16G, id 0x10000039c, registered, matched, active, busy 0>
    {
      "IOMatchedAtBoot" = Yes
      "GPUConfigurationVariable" = {"num_gps"=4,"gpu_gen"=16,"num_cores"=10,"num_frags"=10}
      "PerformanceStatistics" = {"In use system memory (driver)"=0,"Device Utilization %"=30}
      "model" = "Apple M4"
      "gpu-core-count" = 10
      "MetalPluginName" = "AGXMetalG16G_B0"
    }
"""


@pytest.mark.parametrize(
    ("printed", "cores"),
    [(IOREG, 10), ("", None), (IOREG.replace("gpu-core-count", "x"), None), (IOREG.replace("= 10\n", "= ?\n"), None)],
)
def test_gpu_cores(monkeypatch, printed, cores):
    monkeypatch.setattr(machine, "_run", lambda *command: printed)
    assert machine._mac_gpu_cores() == cores


def test_tools_that_are_missing_or_print_what_is_no_utf8():
    assert machine._run("no-such-tool-here") == ""
    printed = machine._run(sys.executable, "-c", r"import sys; sys.stdout.buffer.write(b'\xff \"gpu\" = 8\n')")
    assert printed.endswith('"gpu" = 8')


def test_bandwidth_by_chip_and_cores():
    assert bandwidth("Apple M1", 8) == 68.25e9
    assert bandwidth("Apple M3 Max", 30) == 307.2e9
    assert bandwidth("Apple M3 Max", 40) == 409.6e9
    assert bandwidth("Apple M3 Max", None) is None  # two are sold
    assert bandwidth("Apple M3 Max", None, 64 * GIB) == 409.6e9
    assert bandwidth("Apple M3 Max", None, 96 * GIB) == 307.2e9
    assert bandwidth("Apple M4 Max", None, 36 * GIB) == 409.6e9
    assert bandwidth("Apple M4 Max", 40, 36 * GIB) == 546e9  # cores that were read outweigh RAM
    assert bandwidth("Apple M2", 9) == 102.4e9  # one bandwidth, whatever the cores
    assert bandwidth("Apple Paravirtual device", None) is None


def test_a_mac_as_a_virtual_machine_describes_itself(monkeypatch):
    """What MLX told on a hosted runner; no tool there knows the GPU's cores."""
    import mlx.core as mx

    told = {
        "device_name": "Apple Paravirtual device",
        "architecture": "air64_v27",
        "max_recommended_working_set_size": 5010800640,
        "memory_size": 7516192768,
        "max_buffer_length": 3758096384,
        "resource_limit": 499000,
    }
    monkeypatch.setattr(machine, "_run", lambda *command: "")
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "device_info", lambda device: told)
    found = machine._probe_mac()
    assert (found.working_set_bytes, found.memory_bytes, found.max_buffer_bytes) == (5010800640, 7516192768, 3758096384)
    assert (found.device, found.gpu_cores, found.bandwidth_bytes_per_s) == ("gpu", None, None)
    # The rule of macs.toml gives what this machine said, though no Mac was sold with 7 GB.
    assert (found.usual_working_set_bytes, largest_buffer(5010800640)) == (5010800640, 3758096384)
    assert (found.limits, found.older_working_set_bytes, found.generation) == ("read", None, None)


@pytest.mark.parametrize(("version", "usual"), [("15.6.1", 103079215104), ("26.5.2", 115448725504), ("", 115448725504)])
def test_a_mac_whose_limit_was_raised_shows_both(monkeypatch, version, usual):
    """MLX's device_info() on an M5 Max with iogpu.wired_limit_mb set: the largest buffer stays what it was."""
    import mlx.core as mx

    told = {
        "device_name": "Apple M5 Max",
        "architecture": "applegpu_g17s",
        "max_recommended_working_set_size": 130566586368,
        "memory_size": 137438953472,
        "max_buffer_length": 86586540032,
        "resource_limit": 499000,
    }
    monkeypatch.setattr(machine, "_run", lambda *command: "")
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: (version, ("", "", ""), "arm64"))
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "device_info", lambda device: told)
    found = machine._probe_mac()
    assert (found.working_set_bytes, found.usual_working_set_bytes) == (130566586368, usual)
    assert found.max_buffer_bytes == 86586540032
    assert found.bandwidth_bytes_per_s == 614.4e9  # from the RAM, as no tool told the cores
    assert found.system_bytes == 137438953472 - 130566586368
    assert found.generation == "M5"


def test_a_mac_without_a_metal_device(monkeypatch):
    """Its tools still tell what it is."""
    import mlx.core as mx

    printed = {"machdep.cpu.brand_string": "Apple M2 Pro", "hw.memsize": "17179869184"}
    monkeypatch.setattr(machine, "_run", lambda *command: printed.get(command[-1], ""))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)  # how MLX was built, not what is there
    monkeypatch.setattr(mx, "is_available", lambda device: device != mx.gpu)
    found = machine._probe_mac()
    assert (found.device, found.memory_bytes) == ("cpu", 17179869184)
    assert 0 < found.working_set_bytes < found.memory_bytes


def test_this_machine():
    found = probe()
    assert 0 < found.working_set_bytes <= found.memory_bytes
    assert found.cpu_cores >= 1
    assert found.chip
    if sys.platform == "darwin":
        assert found.chip.startswith("Apple")
        assert found.system.startswith("macOS")


def test_every_row_names_sources_that_are_spelled_out():
    rows = TABLE["chip"] + TABLE["working_set"]
    assert all(row["source"] for row in rows)
    named = {source for row in rows for source in row["source"]}
    assert named == TABLE["sources"].keys()
    assert all(len(text) > 20 for text in TABLE["sources"].values())


def test_rows_are_well_formed_and_none_stands_twice():
    seen = [(row.name, cores) for row in chips() for cores in row.gpu_cores]
    assert len(seen) == len(set(seen))
    for row in chips():
        assert 50e9 < row.bandwidth_bytes_per_s < 1300e9
        assert list(row.ram_gib) == sorted(set(row.ram_gib))
    for macos in ("15", "26"):
        rows = [row for row in TABLE["working_set"] if row["macos"] == macos]
        sizes = [row["ram_gib"] for row in rows]
        assert sizes == sorted(set(sizes))
        assert set(sizes) >= {gib for chip in chips() for gib in chip.ram_gib}
        assert [row["share"] for row in rows] == sorted(row["share"] for row in rows)


@pytest.mark.parametrize("row", [row for row in TABLE["working_set"] if "bytes" in row or "buffer_bytes" in row])
def test_the_rule_gives_what_was_printed_to_the_byte(row):
    """The table holds what Macs printed, beside the share that the code reckons with."""
    value, observed = usual_working_set(row["ram_gib"] * GIB, int(row["macos"]))
    assert observed != row.get("derived", False)
    assert value == row.get("bytes", value)
    assert largest_buffer(value) == row.get("buffer_bytes", largest_buffer(value))


# recommendedMaxWorkingSetSize as people and logs quote it, in MiB or in 1e6 bytes, by RAM in GB.
OLDER = [
    (8, 5461.34, MIB), (16, 10922.67, MIB), (24, 17179.87, 1e6), (32, 21845.34, MIB), (36, 28991.03, 1e6),
    (48, 36864, MIB), (64, 49152, MIB), (96, 73728, MIB), (128, 103079.22, 1e6), (192, 147456, MIB),
    (512, 498216.21, 1e6),
]  # fmt: skip
NEWER = [
    (8, 5726.63, 1e6), (16, 12713.12, 1e6), (18, 14302.25, 1e6), (24, 18186.25, MIB), (32, 25559.05, MIB),
    (36, 28753.92, MIB), (48, 40200.90, 1e6), (64, 55662.79, 1e6), (96, 83494.17, 1e6), (128, 110100.48, MIB),
    (512, 475136, MIB),
]  # fmt: skip


@pytest.mark.parametrize(("macos", "seen"), [(15, OLDER), (26, NEWER)])
def test_working_sets_as_people_quote_them(macos, seen):
    for gib, quoted, unit in seen:
        assert abs(usual_working_set(gib * GIB, macos)[0] / unit - quoted) < 0.02, gib


def test_described_limits_of_either_macos():
    found = described("M4 16GB")
    assert (found.working_set_bytes, found.max_buffer_bytes) == (12713115648, 9534832640)
    assert (found.system, found.limits, found.device) == ("macOS 26", "observed", "gpu")
    assert found.system_bytes == 16 * GIB - 12713115648
    older = found.with_older_macos()
    assert found.older_working_set_bytes == older.working_set_bytes == 11453251584
    assert (older.max_buffer_bytes, older.system, older.older_working_set_bytes) == (8589934592, "macOS 15", None)
    alike = described("M2 8GB")
    assert (alike.older_working_set_bytes, alike.with_older_macos()) == (None, alike)
    assert [described(ram=ram).limits for ram in ("192GB", "256GB", "20GB", "18GB")] == [*["derived"] * 3, "observed"]
    assert described("M3 Pro 18GB").with_older_macos().limits == "derived"


def test_ram_that_was_never_sold_has_the_share_of_the_next_smaller():
    for gib, like in [(4, 8), (12, 8), (20, 18), (40, 36), (400, 256), (1024, 512)]:
        share = next(row["share"] for row in TABLE["working_set"] if row["macos"] == "26" and row["ram_gib"] == like)
        found = described(ram=f"{gib}GB")
        assert found.working_set_bytes == ceil(share * gib * GIB / 16384) * 16384
        assert found.limits == "derived"


@pytest.mark.parametrize(
    ("words", "chip", "cores", "gib", "rate"),
    [
        ("M2 8GB", "Apple M2", None, 8, 102.4e9),
        ("m3 max 64gb", "Apple M3 Max", 40, 64, 409.6e9),
        ("M3 Max 40-core 64GB", "Apple M3 Max", 40, 64, 409.6e9),
        ("M3 Max 96 GB", "Apple M3 Max", 30, 96, 307.2e9),
        ("M4 Max 36GB", "Apple M4 Max", 32, 36, 409.6e9),
        ("m5max 128 gib", "Apple M5 Max", 40, 128, 614.4e9),
        ("M5 Max 32c 36GB", "Apple M5 Max", 32, 36, 460.8e9),
        ("Apple M1-Ultra, 64-core GPU, 128GB", "Apple M1 Ultra", 64, 128, 819.2e9),
        ("MacBook Pro M4 Pro 14-core CPU 20-core GPU 24GB memory", "Apple M4 Pro", 20, 24, 273e9),
        ("Mac Pro M2 Ultra 192GB", "Apple M2 Ultra", None, 192, 819.2e9),
        ("MacBook Neo A18 Pro", "Apple A18 Pro", 5, 8, 60e9),
        ("M5 Ultra 256GB", "Apple M5 Ultra", None, 256, 1200e9),
        ("M3-Pro", "Apple M3 Pro", None, 18, 153.6e9),
        ("16GB", "Mac", None, 16, None),
        ("16384MB", "Mac", None, 16, None),
    ],
)
def test_described_by_words(words, chip, cores, gib, rate):
    found = described(words)
    assert (found.chip, found.gpu_cores, found.memory_bytes) == (chip, cores, gib * GIB)
    assert found.bandwidth_bytes_per_s == rate
    assert 0 < found.max_buffer_bytes < found.working_set_bytes < found.memory_bytes


def test_described_by_parts():
    assert (
        described(chip="m3-max", ram="64GB", gpu_cores=40)
        == described("M3 Max 40-core 64GB")
        == described("M3 Max 64GB")
    )
    assert described("M3 Max", ram="64") == described("M3 Max 64GB", chip="Apple M3 Max", ram="64 GiB")


@pytest.mark.parametrize("row", chips(), ids=lambda row: f"{row.name} {row.gpu_cores}")
def test_every_mac_that_was_sold_is_known_by_its_own_title(row):
    for gib in row.ram_gib:
        for cores in row.gpu_cores:
            found = described(f"{row.name} {cores}-core {gib}GB")
            assert (found.gpu_cores, found.bandwidth_bytes_per_s) == (cores, row.bandwidth_bytes_per_s)
            assert described(found.title) == found
        unsaid = described(f"{row.name} {gib}GB")
        assert unsaid.bandwidth_bytes_per_s == row.bandwidth_bytes_per_s
        assert described(unsaid.title) == unsaid
        assert any("second hand" in remark for remark in unsaid.remarks) == row.second_hand


def test_what_is_taken_for_granted_is_said():
    (least,) = described(chip="M3-Pro").remarks
    assert least == "RAM is not given: 18 GB is the least that the M3 Pro was sold with"
    (unsold,) = described(ram="16GB", chip="M3-Pro").remarks
    assert unsold == "the M3 Pro was sold with 18 or 36 GB, not 16 GB"
    lower = described(chip="M3 Max", ram="20GB")
    assert lower.bandwidth_bytes_per_s == 307.2e9
    assert "two bandwidths" in lower.remarks[1]
    assert "chip is not given" in described(ram="16GB").remarks[0]
    assert described("M2 8GB").remarks == ()


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"mac": "M7 16GB"}, "no Mac has a chip 'm7'", "M5 Ultra, M6"),
        ({"mac": "M3 Extreme 64GB"}, "no Mac has a chip 'm3 extreme'", "known are M3, M3 Pro, M3 Max, M3 Ultra, "),
        ({"chip": "Intel", "ram": "16GB"}, "no Mac has a chip 'Intel'", "known are"),
        ({"chip": "M3 Mux"}, "no Mac has a chip 'M3 Mux'", "M3 Max"),
        ({"mac": "M2 8XB"}, "unknown unit 'xb'", "64GB"),
        ({"mac": "M2 8"}, "has no unit", "64GB"),
        ({"ram": "16XB"}, "unknown unit 'XB'", "16GB"),
        ({"ram": "lots"}, "is not an amount of RAM", "16GB"),
        ({"mac": "M3 Pro 16GB"}, "the M3 Pro was sold with 18 or 36 GB, not 16 GB", "--chip 'M3 Pro' --ram 16GB"),
        ({"mac": "M3 Max 30-core 64GB"}, "with 30 GPU cores was sold with 36 or 96 GB, not 64 GB", "--ram 64GB"),
        ({"mac": "M5 Ultra 64GB"}, "was sold with 96 to 512 GB, not 64 GB", "--chip"),
        ({"mac": "M3 Max 12-core 64GB"}, "the M3 Max has 30 or 40 GPU cores, not 12", "leave them out"),
        ({"mac": "M5 Ultra 90-core 256GB"}, "has up to 80 GPU cores, not 90", "leave them out"),
        ({"chip": "M2", "gpu_cores": 0}, "has 8 or 10 GPU cores, not 0", "leave them out"),
        ({"mac": "M1 0GB"}, "no Mac has 0 GB of RAM", "16GB"),
        ({"ram": "2TB"}, "no Mac has 2048 GB of RAM", "16GB"),
        ({"ram": "9" * 400}, "is not an amount of RAM", "16GB"),
        ({"mac": "M2 8GB", "ram": "16GB"}, "more than one amount of RAM", "all but one"),
        ({"mac": "M2 8GB", "chip": "M3"}, "more than one chip", "all but one"),
        ({"mac": "M3 Max 40-core", "gpu_cores": 30}, "more than one number of GPU cores", "all but one"),
        ({"mac": "M1 8GB 16GB"}, "more than one amount of RAM is given in 'M1 8GB 16GB'", "all but one"),
        ({"mac": "M3 Max 2.5-core"}, "is no number of cores", "40-core"),
        ({"mac": "40-core 64GB"}, "its chip is missing", "M2 8GB"),
        ({"mac": ""}, "its chip is missing", "M2 8GB"),
        ({}, "its chip is missing", "M2 8GB"),
    ],
)
def test_what_is_no_mac(given, message, hint):
    with pytest.raises(UsageError) as caught:
        described(**given)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


PIECES = [
    "M3",
    "m5",
    " max",
    "-Pro",
    "40",
    "-core",
    " GB",
    "64gb",
    "1",
    ".",
    "cpu",
    "gpu",
    " ",
    "ultra",
    "Mac",
    "9" * 40,
]


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=8).map("".join)))
@example("²GB")
@example("M3 " + "9" * 5000 + "GB")
@example("\n")
def test_any_words_are_a_mac_or_one_line(words):
    for ask in (lambda: described(words), lambda: described(ram=words), lambda: described(chip=words, ram="64GB")):
        try:
            found = ask().title
        except UsageError as refusal:
            found = refusal.message
        assert len(found.splitlines()) == 1
        assert len(found) < 400


def test_importing_machine_reads_no_table():
    script = "import sys, mlxquant.machine as m; print(m.__name__, 'tomllib' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mlxquant.machine", "False", "False"]
