"""Scale schedules and their templates."""

import pytest

from varestorer.tokenizer.schedule import TEMPLATES, ScaleSchedule
from varestorer.utils.errors import UserError


@pytest.mark.parametrize(("size", "tokens"), [("0.06M", 521), ("0.25M", 2521), ("0.60M", 6425), ("1M", 10521)])
def test_token_totals_of_the_square_templates(size: str, tokens: int) -> None:
    schedule = ScaleSchedule.template(size)
    assert schedule.num_tokens == tokens
    assert schedule.slices[-1].stop == tokens
    assert sum(s.stop - s.start for s in schedule.slices) == tokens


def test_square_sides_of_the_paper() -> None:
    assert [h for h, _ in ScaleSchedule.template("0.25M").scales] == [1, 2, 4, 6, 8, 12, 16, 20, 24, 32]


def test_every_template_has_a_mirrored_one() -> None:
    assert sorted(TEMPLATES)[:7] == [0.333, 0.4, 0.5, 0.571, 0.666, 0.75, 0.8]
    assert TEMPLATES[0.666] == tuple((w, h) for h, w in TEMPLATES[1.5])
    assert all(len(scales) == 13 for scales in TEMPLATES.values())


def test_the_templates_are_the_published_ones() -> None:
    """Tokens of all 13 scales, frozen: a slip in one number shows."""
    tall = {aspect: scales for aspect, scales in sorted(TEMPLATES.items()) if aspect >= 1}
    tokens = {aspect: sum(h * w for h, w in scales) for aspect, scales in tall.items()}
    assert list(tokens.values()) == [10521, 10774, 10973, 10997, 11252, 11269, 10805, 11123]
    rows = {aspect: sum(h for h, _ in scales) for aspect, scales in tall.items()}
    assert list(tall) == [1.0, 1.25, 1.333, 1.5, 1.75, 2.0, 2.5, 3.0]
    assert list(rows.values()) == [277, 316, 331, 345, 374, 399, 443, 489]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "2M"}, "schedule size must be"),
        ({"size": "1M", "aspect": 1.1}, "no template of aspect 1.1"),
        ({"sides": [4, 2]}, "must grow"),
        ({"sides": []}, "at least one scale"),
        ({"sides": [1], "size": "1M"}, "either size"),
    ],
)
def test_impossible_schedules_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScaleSchedule.build(**arguments)


def test_another_side_ends_the_schedule_in_the_same_table() -> None:
    schedule = ScaleSchedule.template("0.25M")
    smaller, larger = schedule.with_side(16), schedule.with_side(64)
    assert [h for h, _ in smaller.scales] == [1, 2, 4, 6, 8, 12, 16]
    assert len(larger) == 13 and larger.latent_size == (64, 64)
    assert smaller.position_scales == larger.position_scales == schedule.position_scales
    with pytest.raises(UserError, match="no square scale of side 10"):
        schedule.with_side(10)
