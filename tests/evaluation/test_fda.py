"""The published prompts of FDA."""

import pytest

from hqlt.models.tokenizer import ByteTokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
LONG = "".join(f"{n:05d}" for n in range(1000))  # 5000 bytes


def prompt(text: str, key: str = "device", value: str = "K1", position: int | None = None) -> str:
    from hqlt.evaluation.fda import fda_prompt

    return fda_prompt(text, key, value, ByteTokenizer(), position)


def test_a_short_document_stays_whole():
    assert prompt("\n Device: K1. Type: x.\n") == "Device: K1. Type: x. Device:"
    assert prompt("Made of DEVICE: device:Device:", key="device") == "Made of DEVICE: . Device:"
    assert prompt("nothing. \n") == "nothing. Device:"


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        (LONG[:2000] + "dEvIcE" + LONG[2006:], 1525, 2475),  # 475 before, 475 after
        (LONG[:100] + "k1" + LONG[102:2000] + "device" + LONG[2006:], 0, 950),  # near the start: more after
        (LONG[:4900] + "device" + LONG[4906:], 4425, 5000),  # near the end: less
        (LONG, 4525, 5000),  # neither key nor value: the end
    ],
)
def test_the_crop_lies_around_the_first_occurrence(text, start, end):
    assert prompt(text) == f"{text[start:end]}. Device:"


def test_a_stored_position_counts_only_where_nothing_is_found():
    assert prompt(LONG, position=1000) == f"{LONG[525:1475]}. Device:"
    found = LONG[:2000] + "device" + LONG[2006:]
    assert prompt(found, position=1000) == prompt(found)
    assert prompt("short", position=1000) == "short. Device:"
