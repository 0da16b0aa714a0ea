"""The integer program beside brute force, and beside plans with one width."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from quantline.core.errors import UserError
from quantline.planning.allocation import Unit, allocate, best_uniform, of_widths

WIDTHS = (3, 4, 8, 16)


@some.composite
def units(draw, most=4):
    made = []
    for number in range(draw(some.integers(1, most))):
        values = draw(some.integers(1, 50)) * 1000
        scale = draw(some.floats(1e-4, 1.0))
        jitter = [draw(some.floats(0.5, 2.0)) for _ in WIDTHS]
        losses = {
            bits: 0.0 if bits == 16 else scale * 4.0**-bits * factor
            for bits, factor in zip(WIDTHS, jitter, strict=True)
        }
        made.append(Unit(f"unit{number}", losses, {bits: values * bits // 8 for bits in WIDTHS}))
    return made


def every_plan(given, fixed):
    for widths in product(WIDTHS, repeat=len(given)):
        yield of_widths(given, {unit.name: bits for unit, bits in zip(given, widths, strict=True)}, fixed)


@settings(max_examples=60, deadline=None)
@given(units(), some.floats(0, 1), some.integers(0, 10_000))
def test_the_program_finds_what_brute_force_finds_both_ways_round(given, share, fixed):
    plans = list(every_plan(given, fixed))
    sizes, losses = sorted(plan.size for plan in plans), sorted(plan.loss for plan in plans)
    limit = sizes[int(share * (len(sizes) - 1))]
    found = allocate(given, fixed=fixed, size_at_most=limit)
    assert found.size <= limit
    least = min(plan.loss for plan in plans if plan.size <= limit)
    assert found.loss == pytest.approx(least, rel=1e-6, abs=1e-6 * losses[-1])  # HiGHS sees 1e-7 of the largest
    most = losses[int(share * (len(losses) - 1))]
    small = allocate(given, fixed=fixed, loss_at_most=most * (1 + 1e-9))
    assert small.size == min(plan.size for plan in plans if plan.loss <= most * (1 + 1e-9))


@settings(max_examples=40, deadline=None)
@given(units(), some.floats(0, 1))
def test_no_plan_is_worse_than_one_width_at_the_same_size(given, share):
    sizes = sorted({plan.size for plan in every_plan(given, 0)})
    limit = sizes[int(share * (len(sizes) - 1))]
    plain = best_uniform(given, size_at_most=limit)
    if plain is not None:
        assert allocate(given, size_at_most=limit).loss <= plain.loss * (1 + 1e-9)


def test_the_sensitive_unit_gets_the_bits():
    given = [
        Unit("tough", {4: 0.001, 8: 0.0001}, {4: 500, 8: 1000}),
        Unit("frail", {4: 0.1, 8: 0.001}, {4: 500, 8: 1000}),
    ]
    found = allocate(given, fixed=100, size_at_most=1600)
    assert (found.widths, found.size, found.uniform) == ({"tough": 4, "frail": 8}, 1600, None)
    assert allocate(given, size_at_most=1100).uniform == 4


def test_what_cannot_be_met_is_refused_with_what_it_needs():
    given = [Unit("one", {4: 0.1, 8: 0.01}, {4: 2**20, 8: 2**21})]
    with pytest.raises(UserError, match=r"the smallest takes 1\.00 MiB"):
        allocate(given, size_at_most=2**19)
    with pytest.raises(UserError, match=r"the best loses 0\.01"):
        allocate(given, loss_at_most=0.001)
    with pytest.raises(ValueError, match="size_at_most or loss_at_most"):
        allocate(given)
