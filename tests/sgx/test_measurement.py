"""MRENCLAVE is the SHA-256 of the steps that built the enclave."""

from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st
from signing import CHUNK, MODE64BIT, PAGE, REG_R, REG_RX, TCS, Page, mrenclave, secinfo, secs_page

from lasskvm.sgx import measurement
from lasskvm.sgx.secs import Secs

BASE, SIZE = 0x7000_0000, 0x10000


def created() -> Secs:
    secs = Secs.created(secs_page(SIZE, BASE, ssa_frame_size=2), eid=1)
    measurement.measure_create(secs)
    return secs


def built(*pages: Page) -> Secs:
    secs = created()
    for page in pages:
        measurement.measure_add(secs, page.offset, secinfo(page.flags))
        for start in range(0, PAGE, CHUNK) if page.is_measured else ():
            measurement.measure_extend(secs, page.offset + start, page.content[start : start + CHUNK])
    return secs


def test_nothing_measured_is_the_digest_of_nothing():
    secs = Secs.created(secs_page(SIZE, BASE), eid=1)
    secs.mrenclave = measurement.begin()
    assert measurement.digest(secs) == hashlib.sha256().digest()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=64, max_size=64), max_size=12))
def test_any_blocks_have_the_digest_that_the_library_gives(blocks: list[bytes]):
    secs = Secs.created(secs_page(SIZE, BASE), eid=1)
    secs.mrenclave = measurement.begin()
    for block in blocks:
        measurement.extend(secs, block)
    assert measurement.digest(secs) == hashlib.sha256(b"".join(blocks)).digest()


def test_an_enclave_of_several_pages_has_the_mrenclave_that_its_developer_computes():
    pages = (
        Page(0, REG_RX, bytes(range(256)) * 16),
        Page(0x1000, TCS, b"\x01" * PAGE),
        Page(0x5000, REG_R, is_measured=False),
    )
    assert measurement.digest(built(*pages)) == mrenclave(SIZE, 2, pages)


def test_the_order_of_the_pages_counts():
    first, second = Page(0, REG_RX), Page(0x1000, REG_RX)
    assert measurement.digest(built(first, second)) != measurement.digest(built(second, first))


def test_reserved_ends_of_secinfo_are_not_measured():
    one, other = created(), created()
    measurement.measure_add(one, 0, secinfo(REG_R))
    measurement.measure_add(other, 0, secinfo(REG_R)[:48] + b"\xff" * 16)
    assert measurement.digest(one) == measurement.digest(other)


def test_the_digest_can_be_asked_for_in_the_middle():
    secs = created()
    assert measurement.digest(secs) == mrenclave(SIZE, 2, ())
    measurement.measure_add(secs, 0, secinfo(REG_R))
    assert measurement.digest(secs) == mrenclave(SIZE, 2, [Page(0, REG_R, is_measured=False)])


def test_a_measurement_goes_on_after_the_secs_was_a_page_in_between():
    secs = Secs.parse(built(Page(0, REG_R)).pack())
    measurement.measure_add(secs, 0x1000, secinfo(REG_RX))
    assert measurement.digest(secs) == mrenclave(
        SIZE, 2, [Page(0, REG_R), Page(0x1000, REG_RX, is_measured=False)]
    )


def test_the_base_address_is_not_part_of_the_identity():
    elsewhere = Secs.created(secs_page(SIZE, BASE + SIZE, ssa_frame_size=2, attributes=MODE64BIT), eid=2)
    measurement.measure_create(elsewhere)
    assert measurement.digest(elsewhere) == measurement.digest(created())
