"""FW memory: which tokens a call writes into the fast weight, and which state each query reads."""

from __future__ import annotations

from torch import Tensor

from hqlt.layers.fixed import FixedSpan
from hqlt.layers.schedule import Schedule
from hqlt.layers.segments import Span
from hqlt.layers.state import MemoryState
from hqlt.layers.update_rules import UpdateRule

Gates = tuple[Tensor, Tensor | None]


def read_fw_memory(
    rule: UpdateRule,
    schedule: Schedule,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    past: MemoryState,
    span: Span | FixedSpan,
) -> tuple[Tensor, Tensor]:
    """Write and read after each token's step, the written token being ``delay`` old.

    A delayed write takes the key and value of the old token and the gates of the current one (paper Eq. 13).

    Args:
        query: raw [B, T, H, K]. keys, values: carried and new tokens, joined by ``span``.
        gates: β and log-decay of the new tokens, [B, T, H].

    Returns:
        read [B, T, H, V] and the next fast weight [N, H, K, V].
    """
    beta, log_decay = gates
    key, value = span.delayed(keys, schedule.delay), span.delayed(values, schedule.delay)
    written = span.is_written(schedule.delay)
    beta = beta if written is None else beta * written.to(beta.device)
    return rule.write_and_read(query, key, value, (beta, log_decay), past.fast_weight, span.cu_seqlens)


def read_fw_chunks(
    rule: UpdateRule,
    window: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    past: MemoryState,
    span: Span | FixedSpan,
) -> tuple[Tensor, Tensor]:
    """Read the state at the start of each query's chunk (Delayed-Chunk).

    The carried fast weight is that at the start of the current chunk: tokens of an unfinished chunk stay in KV memory
    with their gates, and are written once the chunk is complete.

    Args:
        gates: β and log-decay of carried and new tokens, joined.
        rule, query, keys, values: as :func:`read_fw_memory`.

    Returns:
        read [B, T, H, V] and the fast weight at the start of the last chunk, [N, H, K, V].
    """
    beta, log_decay = gates
    completed = span.completed(window)
    if completed is None:
        # Every query reads the carried state; gates of 0 leave that state as it is.
        # Products, not zeros: engines that share gradients need one of every parameter.
        idle = (0 * span.new(beta), None if log_decay is None else 0 * span.new(log_decay))
        return rule.write_and_read(
            query, span.new(keys), span.new(values), idle, past.fast_weight, span.cu_seqlens, window
        )
    completed = completed.to(beta.device)
    gates = (beta * completed, None if log_decay is None else log_decay * completed)
    queries = span.join(None, query)
    read, state = rule.write_and_read(queries, keys, values, gates, past.fast_weight, span.key_cu_seqlens, window)
    return span.new(read), state


def write_chunk(
    rule: UpdateRule, keys: Tensor, values: Tensor, gates: Gates, fast_weight: Tensor, complete: Tensor
) -> Tensor:
    """The fast weight [N, H, K, V] of Delayed-Chunk after a chunk, for the documents that ``complete`` it (bool [N]).

    Args:
        keys, values, gates: of the chunk's tokens, [N, S, H, …].
        fast_weight: at the start of the chunk.
    """
    beta, log_decay = gates
    complete = complete[:, None, None]
    gates = (beta * complete, None if log_decay is None else log_decay * complete)
    return rule.write_and_read(keys, keys, values, gates, fast_weight, None)[1]
