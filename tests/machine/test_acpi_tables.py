"""The ACPI tables: found, linked and checksummed as an operating system and as firmware would, and what they say."""

import mmap
import shutil
import struct
import subprocess
from itertools import pairwise

import pytest

from lasskvm.errors import MemoryLayoutError
from lasskvm.machine.acpi import BIOS_AREA_END, BIOS_AREA_START, AcpiTables, aml
from lasskvm.memory import GuestMemory

HEADER = 36
MIB = 1 << 20


def word(data: bytes, offset: int, size: int = 4) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


class System:
    """A megabyte of memory with the tables of a machine, and an operating system that looks for them."""

    def __init__(self) -> None:
        self.memory = GuestMemory()
        self.memory.set_slot(0, 0, mmap.mmap(-1, MIB))

    def rsdp(self) -> bytes:
        found = [
            gpa
            for gpa in range(BIOS_AREA_START, BIOS_AREA_END, 16)
            if self.memory.read(gpa, 8) == b"RSD PTR "
        ]
        assert len(found) == 1
        return self.memory.read(found[0], 36)

    def table(self, gpa: int) -> bytes:
        data = self.memory.read(gpa, word(self.memory.read(gpa, 8), 4))
        assert sum(data) & 0xFF == 0 or data[:4] == b"FACS"
        return data

    def tables(self) -> dict[bytes, bytes]:
        """All tables by signature, through the XSDT and the FADT; the RSDT must name the same."""
        rsdp = self.rsdp()
        rsdt, xsdt = self.table(word(rsdp, 16)), self.table(word(rsdp, 24, 8))
        pointers = [word(xsdt, offset, 8) for offset in range(HEADER, len(xsdt), 8)]
        assert pointers == [word(rsdt, offset) for offset in range(HEADER, len(rsdt), 4)]
        tables = {data[:4]: data for data in (rsdt, xsdt, *map(self.table, pointers))}
        fadt = tables[b"FACP"]
        assert word(fadt, 36) % 64 == 0, "the FACS is aligned"
        assert word(fadt, 40) == word(fadt, 140, 8), "both pointers to the DSDT"
        return tables | {b"DSDT": self.table(word(fadt, 40)), b"FACS": self.table(word(fadt, 36))}


@pytest.fixture
def placed():
    system = System()
    AcpiTables().place(system.memory, BIOS_AREA_START)
    return system


def execute_loader(files: dict[str, bytes], memory: GuestMemory) -> None:
    """Do what firmware does with the table loader's commands."""
    room = {1: 0x40000, 2: 0xF1230}
    addresses: dict[str, int] = {}
    contents: dict[str, bytearray] = {}
    script = files["etc/table-loader"]
    assert len(script) % 128 == 0

    def name(data: bytes) -> str:
        assert data[-1] == 0
        return data.rstrip(b"\0").decode()

    for position in range(0, len(script), 128):
        command = script[position : position + 128]
        kind = word(command, 0)
        file = name(command[4:60])
        if kind == 1:
            alignment, zone = struct.unpack_from("<IB", command, 60)
            addresses[file] = room[zone] + alignment - 1 & -alignment
            room[zone] = addresses[file] + len(files[file])
            contents[file] = bytearray(files[file])
        elif kind == 2:
            target = name(command[60:116])
            offset, size = struct.unpack_from("<IB", command, 116)
            value = word(contents[file], offset, size) + addresses[target]
            contents[file][offset : offset + size] = value.to_bytes(size, "little")
        else:
            assert kind == 3
            offset, start, length = struct.unpack_from("<III", command, 60)
            total = sum(contents[file][start : start + length])
            contents[file][offset] = contents[file][offset] - total & 0xFF
    for file, data in contents.items():
        memory.write(addresses[file], data)


def parse_aml(data: bytes) -> list:
    """The terms of *data* as nested lists: an independent reader of the subset that a DSDT here consists of."""
    terms = []
    position = 0

    def length_at(start: int) -> tuple[int, int]:
        following = data[start] >> 6
        if not following:
            return data[start], start + 1
        length = data[start] & 0xF | int.from_bytes(data[start + 1 : start + 1 + following], "little") << 4
        return length, start + 1 + following

    def name_at(start: int) -> tuple[str, int]:
        prefix = ""
        while data[start : start + 1] in (b"\\", b"^"):
            prefix += chr(data[start])
            start += 1
        if data[start] == 0x2E:
            count, start = 2, start + 1
        elif data[start] == 0x2F:
            count, start = data[start + 1], start + 2
        else:
            count = 1
        parts = [data[start + 4 * n : start + 4 * n + 4].decode("ascii") for n in range(count)]
        return prefix + ".".join(parts), start + 4 * count

    while position < len(data):
        opcode = data[position]
        position += 1
        if opcode == 0x5B:
            opcode = 0x5B00 | data[position]
            position += 1
        if opcode in (0x10, 0x5B82):
            length, inside = length_at(position)
            end = position + length
            assert end <= len(data)
            path, inside = name_at(inside)
            terms.append(["Scope" if opcode == 0x10 else "Device", path, parse_aml(data[inside:end])])
            position = end
        elif opcode == 0x08:
            path, position = name_at(position)
            terms.append(["Name", path])
        elif opcode in (0x11, 0x12):
            length, inside = length_at(position)
            end = position + length
            assert end <= len(data)
            if opcode == 0x12:
                elements = parse_aml(data[inside + 1 : end])
                assert len(elements) == data[inside]
                terms.append(elements)
            else:
                assert data[inside] == 0x0A
                content = data[inside + 2 : end]
                assert len(content) == data[inside + 1]
                terms.append(content)
            position = end
        elif opcode in (0x00, 0x01):
            terms.append(opcode)
        elif opcode == 0x0D:
            end = data.index(0, position)
            terms.append(data[position:end].decode("ascii"))
            position = end + 1
        else:
            size = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[opcode]
            terms.append(word(data, position, size))
            position += size
    return terms


def names(terms: list) -> dict:
    """The values of the names among *terms*."""
    return {
        term[1]: value for term, value in pairwise(terms) if isinstance(term, list) and term[:1] == ["Name"]
    }


def devices(dsdt: bytes) -> dict[str, dict]:
    """The names within each device below _SB."""
    terms = parse_aml(dsdt[HEADER:])
    (scope,) = [term for term in terms if isinstance(term, list) and term[:2] == ["Scope", "_SB_"]]
    return {path: names(inside) for _, path, inside in scope[2]}


def io(base: int, count: int) -> bytes:
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, count)


def irq(number: int) -> bytes:
    return struct.pack("<BH", 0x22, 1 << number)


def test_the_rsdp_is_of_revision_2_with_both_checksums_right(placed):
    rsdp = placed.rsdp()
    assert (rsdp[15], word(rsdp, 20)) == (2, 36)
    assert sum(rsdp[:20]) & 0xFF == 0
    assert sum(rsdp) & 0xFF == 0


def test_all_tables_are_found_with_right_checksums_in_the_bios_area(placed):
    assert set(placed.tables()) == {b"RSDT", b"XSDT", b"FACP", b"APIC", b"DSDT", b"FACS"}


def test_nothing_is_written_outside_of_the_returned_range():
    system = System()
    system.memory.write(0, b"\xaa" * MIB)
    end = AcpiTables().place(system.memory, 0xF0010)
    assert system.memory.read(0, 0xF0010) == b"\xaa" * 0xF0010
    assert system.memory.read(end, MIB - end) == b"\xaa" * (MIB - end)
    assert system.memory.read(0xF0010, 8) == b"RSD PTR "


@pytest.mark.parametrize("address", [0xE0008, 0xDFFF0, 0xFFF00, 0x100000])
def test_a_place_where_nobody_looks_or_that_is_too_small_is_refused(address):
    with pytest.raises(MemoryLayoutError, match="choose a multiple of 16 between 0xe0000 and 0x100000"):
        AcpiTables().place(System().memory, address)


def test_firmware_arrives_at_the_same_tables_with_the_loader_s_commands(placed):
    system = System()
    execute_loader(AcpiTables().loader_files(), system.memory)
    by_firmware, ours = system.tables(), placed.tables()
    for signature in (b"APIC", b"DSDT", b"FACS"):
        assert by_firmware[signature] == ours[signature]
    pointers = {*range(36, 44), *range(140, 148), 9}
    for offset, byte in enumerate(ours[b"FACP"]):
        assert offset in pointers or by_firmware[b"FACP"][offset] == byte


def test_the_fadt_says_where_the_fixed_hardware_is(placed):
    fadt = placed.tables()[b"FACP"]
    assert (len(fadt), fadt[8]) == (244, 4)
    assert word(fadt, 46, 2) == 9, "SCI"
    assert (word(fadt, 48), fadt[52], fadt[53]) == (0xB2, 0xF1, 0xF0)
    assert [word(fadt, offset) for offset in range(56, 88, 4)] == [0x600, 0, 0x604, 0, 0, 0x608, 0xAFE0, 0]
    assert list(fadt[88:94]) == [4, 2, 0, 4, 4, 0]
    assert fadt[108] == 0x32, "the century's register"


def test_the_64_bit_blocks_of_the_fadt_are_those_of_the_32_bit_fields(placed):
    fadt = placed.tables()[b"FACP"]
    for number, extended in enumerate(range(148, 244, 12)):
        space, bits, offset, _, address = struct.unpack_from("<BBBBQ", fadt, extended)
        assert address == word(fadt, 56 + 4 * number)
        lengths = (fadt[88], 0, fadt[89], 0, fadt[90], fadt[91], fadt[92], fadt[93])
        assert (space, bits, offset) == (int(address != 0), 8 * lengths[number], 0)


def test_the_fadt_has_a_reset_register(placed):
    fadt = placed.tables()[b"FACP"]
    assert word(fadt, 112) & 1 << 10
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 0x0E)


def test_the_fadt_does_not_promise_what_is_not_there(placed):
    fadt = placed.tables()[b"FACP"]
    boot, flags = word(fadt, 109, 2), word(fadt, 112)
    assert boot & 1 << 0, "there are legacy devices"
    assert not boot & 1 << 1, "there is no 8042"
    assert boot & 1 << 2, "there is no VGA"
    assert not boot & 1 << 5, "there is an RTC"
    assert not flags & 1 << 4, "the power button is a fixed one"
    assert flags & 1 << 5, "there is no sleep button"
    assert not flags & 1 << 8, "the PM timer has 24 bits"
    assert not flags & 1 << 20, "the fixed hardware is there"


def test_the_madt_lists_a_processor_an_ioapic_two_overrides_and_an_nmi(placed):
    madt = placed.tables()[b"APIC"]
    assert (word(madt, 36), word(madt, 40)) == (0xFEE00000, 1)
    entries = []
    position = 44
    while position < len(madt):
        entries.append(madt[position : position + madt[position + 1]])
        position += madt[position + 1]
    assert position == len(madt)
    assert entries == [
        struct.pack("<BBBBI", 0, 8, 0, 0, 1),
        struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC00000, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 9, 9, 0x0D),
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
    ]


def test_sleep_state_5_is_type_0_and_there_is_no_other(placed):
    terms = names(parse_aml(placed.tables()[b"DSDT"][HEADER:]))
    assert terms == {"_S5_": [0, 0, 0, 0]}


def test_the_dsdt_describes_the_devices_at_fixed_ports(placed):
    found = devices(placed.tables()[b"DSDT"])
    end = b"\x79\0"
    assert found["COM1"]["_HID"] == word(bytes.fromhex("41d00501"), 0)
    assert found["COM1"]["_CRS"] == io(0x3F8, 8) + irq(4) + end
    assert found["RTC_"]["_HID"] == word(bytes.fromhex("41d00b00"), 0)
    assert found["RTC_"]["_CRS"] == io(0x70, 2) + irq(8) + end
    assert found["PM__"]["_CRS"] == io(0x600, 12) + io(0xAFE0, 4) + io(0xB2, 2) + end
    assert found["CPU0"]["_HID"] == "ACPI0007"
    assert found["CPU0"]["_UID"] == 0
    assert found["FWCF"]["_HID"] == "QEMU0002"
    assert found["FWCF"]["_CRS"] == io(0x510, 12) + end


def test_the_dsdt_leaves_fw_cfg_out_where_there_is_none():
    system = System()
    AcpiTables(fw_cfg=False).place(system.memory, BIOS_AREA_START)
    assert set(devices(system.tables()[b"DSDT"])) == {"COM1", "RTC_", "PM__", "CPU0"}


@pytest.mark.parametrize("size", [0, 1, 50, 62, 63, 64, 4000, 4092, 4093, 5000, 70_000, 1 << 20])
def test_package_lengths_count_themselves_at_every_width(size):
    encoded = aml.scope("\\_SB", *[aml.name("AAAA", aml.integer(0))] * (size // 6), b"\1" * (size % 6))
    ((kind, path, inside),) = parse_aml(encoded)
    assert (kind, path) == ("Scope", "\\_SB_")
    assert len(inside) == size // 6 * 2 + size % 6


@pytest.mark.parametrize("value", [0, 1, 2, 0xFF, 0x100, 0xFFFF, 0x10000, 0xFFFFFFFF, 1 << 32, (1 << 64) - 1])
def test_integers_keep_their_value_at_every_width(value):
    assert parse_aml(aml.integer(value)) == [value]


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("RTC", b"RTC_"),
        ("\\_S5", b"\\_S5_"),
        ("^^A.B", b"^^\x2eA___B___"),
        ("\\A.B.C", b"\\\x2f\x03A___B___C___"),
        ("\\", b"\\\0"),
    ],
)
def test_paths_are_encoded_with_their_prefixes(path, encoded):
    assert aml.name_string(path) == encoded


@pytest.mark.parametrize("path", ["com1", "TOOLONG", "1AB", "A..B", "A.", "\\^A"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ValueError, match="is no path"):
        aml.name_string(path)


def test_what_cannot_be_encoded_is_refused():
    for call in (
        lambda: aml.integer(1 << 64),
        lambda: aml.integer(-1),
        lambda: aml.eisa_id("PNP05"),
        lambda: aml.string("a\0b"),
        lambda: aml.buffer(bytes(1 << 28)),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - each has its own words
            call()


@pytest.mark.skipif(
    shutil.which("iasl") is None, reason="iasl is not installed (Debian package acpica-tools)"
)
def test_the_reference_disassembler_finds_nothing_wrong(placed, tmp_path):
    """iasl takes every table apart without a warning, and the DSDT that it shows compiles to the same AML."""
    for signature, data in placed.tables().items():
        source = tmp_path / f"{signature.decode()}.aml"
        source.write_bytes(data)
        output = _iasl("-d", source)
        assert "warning" not in output.lower()
        assert "error" not in output.lower()
        assert source.with_suffix(".dsl").exists()
    compiled = tmp_path / "again"
    output = _iasl("-p", compiled, tmp_path / "DSDT.dsl")
    assert " 0 Errors, 0 Warnings" in output
    assert compiled.with_suffix(".aml").read_bytes()[HEADER:] == placed.tables()[b"DSDT"][HEADER:]


def _iasl(*arguments: object) -> str:
    done = subprocess.run(
        ["iasl", *map(str, arguments)], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout + done.stderr
