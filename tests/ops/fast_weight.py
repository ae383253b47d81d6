"""The battery that every fast-weight op passes; a subclass names the op, draws its gates and states its equations."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import EXACT, assert_close, assert_same_results, borders_of, results, uneven

LENGTHS = (1, 7, 63, 64, 65, 200)
PERIODS = (None, 1, 3, 16, 64, 67, 130)
HEADS, KEY_DIM, VALUE_DIM = 2, 8, 5


def reading(period: int | None) -> dict[str, Any]:
    return {} if period is None else {"reads": "chunk", "period": period}


class FastWeightTests:
    op: Callable[..., tuple[Tensor, Tensor]]
    columns = VALUE_DIM

    def gates(self, *shape: int) -> dict[str, Tensor]:
        """Random gates [B, T, H] in float64."""
        raise NotImplementedError

    def naive(
        self, query: np.ndarray, key: np.ndarray, value: np.ndarray, *gates: np.ndarray, state: np.ndarray, starts: list
    ) -> tuple[np.ndarray, np.ndarray]:
        """The equations for one head of one document: q, k [T, K], v [T, V], state [K, columns].

        Query t reads the state before token starts[t] is written, so starts[t] = t + 1 reads after its own.
        """
        raise NotImplementedError

    def tokens(self, batch: int, length: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        shape = (batch, length, HEADS)
        tokens = {
            "query": torch.randn(*shape, KEY_DIM, dtype=torch.float64),
            "key": torch.nn.functional.normalize(torch.randn(*shape, KEY_DIM, dtype=torch.float64), dim=-1),
            "value": torch.randn(*shape, VALUE_DIM, dtype=torch.float64),
            **self.gates(*shape),
        }
        return {name: x.to(dtype) for name, x in tokens.items()}

    def state(self, documents: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {"initial_state": torch.rand(documents, HEADS, KEY_DIM, self.columns, dtype=torch.float64).to(dtype)}

    def layout(self, packed: bool, length: int) -> tuple[int, int, dict[str, Any]]:
        """Batch, number of documents, and the option that describes them."""
        if not packed:
            return 2, 2, {}
        return 1, len(uneven(length)), {"cu_seqlens": borders_of(uneven(length))}

    def compare(self, tensors: dict[str, Tensor], tolerance: float = EXACT, **options: Any) -> None:
        """The chunked form equals the recurrence in outputs, final state and all gradients."""
        expected, actual = (
            results(lambda backend=backend, **x: self.op(**x, **options, backend=backend), tensors)
            for backend in ("reference", "chunked")
        )
        assert_same_results(actual, expected, tolerance)

    # The recurrence is the definition.

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("carried", [False, True])
    @pytest.mark.parametrize("period", [None, 1, 3, 16])
    @pytest.mark.parametrize("length", [1, 7, 20])
    def test_reference_is_the_equations(self, length, period, carried, packed):
        batch, documents, options = self.layout(packed, length)
        tokens = self.tokens(batch, length)
        state = self.state(documents) if carried else {}
        read, final = self.op(**tokens, **state, **options, **reading(period), scale=0.3, backend="reference")
        before = state.get("initial_state", torch.zeros(documents, HEADS, KEY_DIM, self.columns))
        for n in range(documents):
            row, span = n, slice(0, length)
            if packed:
                row, span = 0, slice(*options["cu_seqlens"][n : n + 2].tolist())
            size = span.stop - span.start
            starts = [t + 1 if period is None else t // period * period for t in range(size)]
            for head in range(HEADS):
                one = [x[row, span, head].numpy() for x in tokens.values()]
                expected, last = self.naive(
                    0.3 * one[0] if self.columns == VALUE_DIM else one[0],
                    *one[1:],
                    state=before[n, head].double().numpy(),
                    starts=starts,
                )
                assert_close(read[row, span, head], torch.from_numpy(expected), 1e-12, "read")
                assert_close(final[n, head], torch.from_numpy(last), 1e-12, "state")

    def test_default_scale_is_the_root_of_the_key_dimension(self):
        tokens = self.tokens(2, 9)
        assert torch.equal(self.op(**tokens)[0], self.op(**tokens, scale=KEY_DIM**-0.5)[0])

    # The chunk-parallel form agrees with it.

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("period", PERIODS)
    @pytest.mark.parametrize("length", LENGTHS)
    def test_chunked_equals_reference(self, length, period, packed):
        batch, documents, options = self.layout(packed, length)
        self.compare({**self.tokens(batch, length), **self.state(documents)}, **options, **reading(period))

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("length", LENGTHS)
    def test_chunked_equals_reference_from_an_empty_state(self, length, packed):
        batch, _, options = self.layout(packed, length)
        self.compare(self.tokens(batch, length), **options)

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("period", [None, 16])
    @pytest.mark.parametrize("length", LENGTHS)
    def test_float32(self, length, period, packed):
        batch, documents, options = self.layout(packed, length)
        tensors = {**self.tokens(batch, length, torch.float32), **self.state(documents, torch.float32)}
        self.compare(tensors, 1e-5, **options, **reading(period))

    @pytest.mark.parametrize("backend", ["reference", "chunked"])
    @pytest.mark.parametrize("period", [None, 16])
    @pytest.mark.parametrize("length", LENGTHS)
    def test_bfloat16_is_near_the_float32_reference(self, length, period, backend):
        tokens, state = self.tokens(2, length, torch.bfloat16), self.state(2, torch.float32)
        options = reading(period)
        narrow = results(lambda **x: self.op(**x, **options, backend=backend), {**tokens, **state})
        wide_tokens = {name: x.float() for name, x in tokens.items()}
        wide = results(lambda **x: self.op(**x, **options, backend="reference"), {**wide_tokens, **state})
        assert narrow["output 0"].dtype == torch.bfloat16
        assert narrow["output 1"].dtype == torch.float32
        assert_same_results(narrow, wide, 2e-2)
        assert_close(narrow["output 1"], wide["output 1"], 1e-5, "state")

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("period", [None, 1, 3, 67])
    @pytest.mark.parametrize("chunk_size", [1, 5, 16, 33, 100, 1000])
    def test_tiles_and_segments_never_change_a_result(self, chunk_size, period, packed, monkeypatch):
        batch, documents, options = self.layout(packed, 150)
        tensors = {**self.tokens(batch, 150), **self.state(documents)}
        options |= {**reading(period), "backend": "chunked"}
        default = results(lambda **x: self.op(**x, **options), tensors)
        monkeypatch.setattr("hqlt.ops.blocks.SEGMENT_BYTES", 1)
        assert_same_results(results(lambda **x: self.op(**x, **options, chunk_size=chunk_size), tensors), default)

    @pytest.mark.parametrize("length", [1, 30])
    def test_auto_agrees_with_both(self, length):
        tokens = self.tokens(2, length)
        for backend in ("reference", "chunked"):
            for actual, expected in zip(self.op(**tokens), self.op(**tokens, backend=backend), strict=True):
                assert_close(actual, expected)

    def test_gates_may_be_more_precise_than_tokens(self):
        tokens = self.tokens(2, 70, torch.bfloat16)
        gates = [name for name in tokens if name not in ("query", "key", "value")]
        tokens |= {name: tokens[name].float() for name in gates}
        self.compare(tokens, 1e-2)

    @pytest.mark.parametrize("backend", ["reference", "chunked"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_autocast_does_not_reach_inside(self, dtype, backend):
        tensors = {**self.tokens(2, 70, dtype), **self.state(2, torch.float32)}
        outside = results(lambda **x: self.op(**x, backend=backend), tensors)

        def autocast(**x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.op(**x, backend=backend)

        assert_same_results(results(autocast, tensors), outside, 1e-5)

    # What documents and calls see of each other.

    @pytest.mark.parametrize("backend", ["reference", "chunked"])
    @pytest.mark.parametrize("period", [None, 1, 16, 67])
    def test_packed_documents_equal_separate_ones(self, period, backend):
        lengths = [1, 130, 2, 64, 17]
        tokens, state = self.tokens(1, sum(lengths)), self.state(len(lengths))["initial_state"]
        options = {**reading(period), "backend": backend}
        borders = borders_of(lengths)
        read, final = self.op(**tokens, initial_state=state, cu_seqlens=borders, **options)
        for n, (a, b) in enumerate(pairwise(borders.tolist())):
            alone = {name: x[:, a:b] for name, x in tokens.items()}
            read_alone, final_alone = self.op(**alone, initial_state=state[n : n + 1], **options)
            assert_close(read[:, a:b], read_alone)
            assert_close(final[n : n + 1], final_alone)

    def test_cu_seqlens_may_be_int32(self):
        tokens, borders = self.tokens(1, 12), borders_of([5, 7])
        expected, actual = (self.op(**tokens, cu_seqlens=x)[0] for x in (borders, borders.int()))
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("period", [None, 5])
    def test_segments_with_a_carried_state_equal_the_whole(self, period):
        tokens = self.tokens(2, 80)
        whole, final = self.op(**tokens, **reading(period))
        state, parts = None, []
        for a, b in pairwise([0, 10, 15, 75, 80]):
            segment = {name: x[:, a:b] for name, x in tokens.items()}
            part, state = self.op(**segment, initial_state=state, **reading(period))
            parts.append(part)
        assert_close(torch.cat(parts, 1), whole)
        assert_close(state, final)

    @pytest.mark.parametrize("backend", ["reference", "chunked"])
    @pytest.mark.parametrize("period", [None, 4, 67])
    def test_no_gradient_to_what_a_read_may_not_see(self, period, backend):
        lengths, t = [30, 75, 45], 30 + 70
        tokens = {name: x.requires_grad_() for name, x in self.tokens(1, sum(lengths)).items()}
        read, _ = self.op(**tokens, cu_seqlens=borders_of(lengths), **reading(period), backend=backend)
        read[:, t].sum().backward()
        first_unseen = t + 1 if period is None else 30 + 70 // period * period
        for name, x in tokens.items():
            assert x.grad is not None
            after = x.grad[:, t + 1 :] if name == "query" else x.grad[:, first_unseen:]
            assert not after.any(), f"gradient of {name} to the future"
            assert not x.grad[:, :30].any(), f"gradient of {name} to another document"
            assert x.grad.any()

    # Bad input is refused by name.

    def bad(self, match: str, error: type[Exception] = ValueError, length: int = 6, batch: int = 2, **changes: Any):
        tokens = self.tokens(batch, length, torch.float32)
        with pytest.raises(error, match=match):
            self.op(**{**tokens, **changes})

    def test_bad_dtypes(self):
        shape = (2, 6, HEADS, KEY_DIM)
        self.bad("query has dtype torch.int64", TypeError, query=torch.ones(shape, dtype=torch.long))
        self.bad("key is torch.float64 but query is torch.float32", TypeError, key=torch.ones(shape).double())
        self.bad("value must be a tensor, not list", TypeError, value=[1.0])
        self.bad("beta is torch.bfloat16 but query", TypeError, beta=torch.ones(2, 6, HEADS).bfloat16())
        state = self.state(2, torch.float64)["initial_state"]
        self.bad("initial_state is torch.float64; .* torch.float32", TypeError, initial_state=state)

    def test_bad_shapes(self):
        self.bad(r"query has shape \(2, 6, 8\); expected four axes", query=torch.ones(2, 6, KEY_DIM))
        self.bad("key has dimension 3 but query has 8", key=torch.ones(2, 6, HEADS, 3))
        self.bad(r"value has shape \(2, 5, 2, 5\)", value=torch.ones(2, 5, HEADS, VALUE_DIM))
        self.bad(r"beta has shape \(2, 6, 2, 1\); expected \[B, T, H\]", beta=torch.ones(2, 6, HEADS, 1))
        self.bad(r"initial_state has shape \(1, 2, 8, .\)", initial_state=self.state(1, torch.float32)["initial_state"])
        other = {"key": torch.ones(2, 7, HEADS, KEY_DIM), "value": torch.ones(2, 7, HEADS, VALUE_DIM)}
        self.bad(r"key has shape \(2, 7, 2, 8\)", **other)
        with pytest.raises(ValueError, match=r"no tokens \(T = 0\)"):
            self.op(**{name: x[:, :0] for name, x in self.tokens(2, 3).items()})

    def test_bad_kinds(self):
        self.bad("beta must be a tensor, not list", TypeError, beta=[1.0])
        self.bad("initial_state must be a tensor, not list", TypeError, initial_state=[1.0])
        self.bad("cu_seqlens=6 must increase strictly", batch=1, cu_seqlens=torch.tensor(6))

    @pytest.mark.parametrize("borders", [[0], [0, 3], [1, 6], [0, 4, 2, 6], [0, 3, 3, 6], [0, 7], [[0, 6]]])
    def test_bad_borders(self, borders):
        self.bad("must increase strictly from 0 to the number of tokens 6", batch=1, cu_seqlens=torch.tensor(borders))

    def test_bad_kinds_of_borders(self):
        self.bad("cu_seqlens must be an int32 or int64 tensor, not list", TypeError, cu_seqlens=[0, 6])
        self.bad("not torch.float32", TypeError, cu_seqlens=torch.tensor([0.0, 6.0]))
        self.bad("the batch is 2; pack the documents into B = 1", cu_seqlens=torch.tensor([0, 6]))

    def test_bad_options(self):
        self.bad("reads='tile' is unknown; choose 'token' or 'chunk'", reads="tile")
        self.bad("period=4 has no effect with reads='token'", period=4)
        self.bad("needs a period of at least 1 token, not None", reads="chunk")
        self.bad("needs a period of at least 1 token, not 0", reads="chunk", period=0)
        self.bad("backend='cuda' is unknown; choose one of auto, reference, chunked", backend="cuda")
        self.bad("chunk_size=0 must be an int of at least 1", chunk_size=0)
