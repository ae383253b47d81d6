import pytest

from hqlt import MemoryConfig
from hqlt.layers import Schedule
from tests.helpers import only_memory


def schedule(**options) -> Schedule:
    return Schedule.of(MemoryConfig(**options))


@pytest.mark.parametrize("window", [1, 2, 5, 16])
def test_the_table(window):
    for t in range(3 * window + 2):
        sliding = max(0, t - window + 1)
        anchored = window * (t // window)
        cases = {
            "synchronous": (schedule(window=window), sliding, t + 1),
            "streaming": (schedule(window=window, schedule="delayed_streaming"), sliding, max(0, t + 1 - window)),
            "chunk": (schedule(window=window, schedule="delayed_chunk"), anchored, anchored),
            "unbounded": (schedule(window=None), 0, t + 1),
            "attention only": (schedule(window=window, update_rule=None), sliding, 0),
            "fast weight only": (schedule(**only_memory()), t + 1, t + 1),
        }
        for delay in range(window + 1):
            overlap = schedule(window=window, schedule="overlap", delay=delay)
            cases[f"overlap {delay}"] = (overlap, sliding, max(0, t + 1 - delay))
        for name, (found, kv_start, fw_end) in cases.items():
            assert (found.kv_start(t), found.fw_end(t)) == (kv_start, fw_end), f"{name} at {t}"


@pytest.mark.parametrize("window", [1, 2, 5])
def test_delayed_memories_partition_the_past_and_synchronous_ones_share_it(window):
    for t in range(4 * window):
        for kind in ("delayed_streaming", "delayed_chunk"):
            delayed = schedule(window=window, schedule=kind)
            assert delayed.kv_start(t) == delayed.fw_end(t)
        assert schedule(window=window).fw_end(t) == t + 1
        for delay in range(window + 1):  # no token is in neither memory
            overlap = schedule(window=window, schedule="overlap", delay=delay)
            assert overlap.fw_end(t) >= overlap.kv_start(t)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "delayed_streaming"},
        {"schedule": "delayed_chunk"},
        *({"schedule": "overlap", "delay": delay} for delay in range(6)),
        {"window": None},
        {"update_rule": None},
    ],
)
def test_a_state_keeps_what_later_reads_and_writes_need_and_no_more(options):
    found = schedule(**{"window": 5, **options})
    for position in range(20):
        first_read = found.kv_start(position)  # by the next token
        # The oldest token that FW memory still lacks; a complete chunk is written at once.
        first_write = found.fw_end(position) if found.anchored else found.fw_end(position - 1)
        needed = min(position, first_read, first_write if found.fw_memory else first_read)
        assert found.held(position) == position - needed


def test_fast_weight_only_keeps_no_tokens():
    assert [schedule(**only_memory()).held(n) for n in (0, 1, 50)] == [0, 0, 0]
