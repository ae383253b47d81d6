"""The benchmark for a GPU, run without one: checks by Triton's interpreter, budget, files, verdicts."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hqlt.analysis.cost import training_flops
from hqlt.bench import Record, markdown
from hqlt.bench.gpu import decoding, op_cases, ops, step, training
from hqlt.bench.gpu.counts import Work
from hqlt.bench.gpu.device import CudaMeter, Target
from hqlt.bench.gpu.roofline import by_launch, counted_bytes
from hqlt.bench.gpu.run import ALL, OUT_OF_TIME, Case, finished, run_cases
from hqlt.bench.gpu.summary import AIMS
from hqlt.bench.timing import Contender, Meter, contest
from hqlt.ops import delta_rule

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


def loaded(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / name
    specification = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("gpu.py")


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "gpu.json").read_text())["records"]


@without_gpu
def test_all_suites_are_checked_at_toy_sizes(script: ModuleType, tmp_path: Path, capsys) -> None:
    pytest.importorskip("triton")
    assert script.main(["--tiny", "--out", str(tmp_path)]) == 0
    found = rows(tmp_path)
    ours = [row for row in found if row["refused"].startswith("checked only")]
    assert {row["name"] for row in ours} == {
        ops.OURS, ops.APART, ops.KERNEL, ops.CHUNKED, training.HQLT, training.TRANSFORMER, decoding.GRAPH,
        decoding.PLAIN, decoding.COMPILED, "after 10 tokens", "after 90 tokens",
    }  # fmt: skip
    assert all(0 <= row["error"] < 1e-3 for row in ours)
    others = [row["refused"] for row in found if row not in ours]
    assert all(reason.startswith(("skipped: ", "not measured: ")) for reason in others)
    lines = capsys.readouterr().out.splitlines()
    cases = {row["case"] for row in found}
    assert len([line for line in lines if line.startswith("[")]) == len(cases)
    text = (tmp_path / "gpu.md").read_text()
    assert "not measured" in text
    assert "reached" not in text
    assert "`python benchmarks/gpu.py --tiny --out" in text


@without_gpu
def test_without_a_device_it_says_what_is_missing(script: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    assert script.main(["--out", str(tmp_path / "a")]) == 2
    monkeypatch.delenv("TRITON_INTERPRET")
    assert script.main(["--tiny", "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "torch.cuda.is_available() is False; --dry-run needs none" in said
    assert "TRITON_INTERPRET=1" in said
    assert not list(tmp_path.iterdir())


def test_dry_run_lists_every_case_in_order_of_importance(script: ModuleType, capsys) -> None:
    assert script.main(["--dry-run"]) == 0
    listed, table = capsys.readouterr().out.split("\n\nLaunches at ")
    lines = listed.splitlines()
    assert [line.split(":")[0] for line in lines] == sorted(
        (line.split(":")[0] for line in lines), key=script.SUITES.index
    )  # fmt: skip
    # n = 16·2048·8 rows of 6·128 + 8·128 + 3 bfloat16 numbers
    assert f"least {16 * 2048 * 8 * (14 * 128 + 3) * 2 / 1e9:.3g}" in lines[0]
    assert [f"T{n} " in line for n, line in zip(op_cases.LARGE.lengths, lines, strict=False)] == [True] * 5
    # Of the fused forward: n·(2·128 + 3·128 + 1) numbers of 2 bytes, states, angles and gains, at 4.8 TB/s.
    moved = 16 * 8192 * 8 * 641 * 2 + 2 * 16 * 8 * 128 * 128 * 4 + 4 * 8192 * 128 + 4 * 128
    fused = next(line for line in table.splitlines() if "`_hybrid`" in line).split("|")
    assert [cell.strip() for cell in (fused[3], fused[6])] == [f"{moved / 1e9:.3g}", f"{moved / 4.8e9:.3g}"]
    script.main(["--dry-run", "--only", "decode"])
    few = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert few
    assert all(line.startswith("decode: ") for line in few)


@without_gpu
def test_a_kernel_that_is_wrong_is_refused_and_fails_the_run(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    right = ops.delta_rule

    def wrong(*tokens: Tensor, backend: str = "auto", **options: object) -> tuple[Tensor, Tensor]:
        read, state = right(*tokens, backend=backend, **options)
        return (read if backend == "reference" else 1.01 * read), state

    monkeypatch.setattr(ops, "delta_rule", wrong)
    assert script.main(["--tiny", "--only", "ops", "--out", str(tmp_path)]) == 1
    refused = {row["case"]: row["refused"] for row in rows(tmp_path) if row["name"] == ops.KERNEL}
    failed = {case: why for case, why in refused.items() if not why.startswith("checked only")}
    assert len(failed) == 2
    assert all(case.startswith("delta rule") for case in failed)
    assert "its output differs by 1.0e-02 (tolerance 3e-03)" in failed[next(c for c in failed if "backward" in c)]
    assert failed[next(c for c in failed if "backward" not in c)].startswith("differs from the reference by 1.0e-02")


@without_gpu
def test_a_gradient_that_is_wrong_is_refused(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    right = ops.window_attention

    def wrong(backend: str = "auto", **named: Tensor) -> Tensor:
        if backend == "triton" and named["key"].requires_grad and torch.is_grad_enabled():
            named["key"] = 1 * named["key"]
            named["key"].register_hook(lambda grad: 1.02 * grad)
        return right(**named, backend=backend)

    monkeypatch.setattr(ops, "window_attention", wrong)
    assert script.main(["--tiny", "--only", "ops", "--out", str(tmp_path)]) == 1
    differing = [row["case"] for row in rows(tmp_path) if row["refused"].startswith("differs")]
    assert len(differing) == 2
    assert all("window" in case and "backward" in case for case in differing)


def made(name: str, seconds: float, clock: list[float], error: Exception | None = None, memory: float = 0.0) -> Case:
    def run(target: Target, rounds: float) -> list[Record]:
        clock[0] += seconds
        if error is not None:
            raise error
        return [Record(case=name, name="x", milliseconds=rounds)]

    return Case(name=name, run=run, seconds=seconds, memory=memory, rounds=3.0)


CPU = Target(device=torch.device("cpu"), dtype=torch.float32, memory=1e9)


def test_the_budget_leaves_out_what_no_longer_fits_and_a_resumed_run_does_it(tmp_path: Path) -> None:
    clock, path, told = [100.0], tmp_path / "gpu.json", []
    cases = [
        made("first", 30.0, clock),
        made("too long", 80.0, clock),
        made("broken", 10.0, clock, torch.OutOfMemoryError("out of\n memory")),
        made("too large", 1.0, clock, memory=2e9),
        made("short", 20.0, clock),
        made("late", 1.0, clock),
    ]
    options = {"path": path, "command": "c", "clock": lambda: clock[0], "tell": told.append}
    found = run_cases(cases, CPU, seconds=60.0, **options)
    assert [(r.case, r.name, r.refused) for r in found] == [
        ("first", "x", None),
        ("too long", ALL, OUT_OF_TIME),
        ("broken", ALL, "failed: OutOfMemoryError: out of memory"),
        ("too large", ALL, "skipped: it needs 2 GiB and the device has 1"),
        ("short", "x", None),
        ("late", ALL, OUT_OF_TIME),
    ]
    assert [record.went_wrong for record in found] == [False, False, True, False, False, False]
    assert told[0].startswith("[1/6] 30 s  first: x 3 ms")
    kept = finished(path)
    assert [record.case for record in kept] == ["first", "broken", "too large", "short"]
    again = run_cases(cases, CPU, seconds=1000.0, done=kept, **options)
    assert [record.case for record in again] == ["first", "broken", "too large", "short", "too long", "late"]
    assert not any(record.refused == OUT_OF_TIME for record in again)
    assert finished(tmp_path / "absent.json") == []


def test_a_killed_run_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"

    def killed(target: Target, rounds: float) -> list[Record]:
        assert [record.case for record in finished(path)] == ["first"]
        raise KeyboardInterrupt

    cases = [made("first", 1.0, [0.0]), Case(name="second", run=killed)]
    with pytest.raises(KeyboardInterrupt):
        run_cases(cases, CPU, path=path, command="c", seconds=60.0, tell=lambda _: None)
    assert [record.case for record in finished(path)] == ["first"]
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"]


class Ticks(Meter):
    """A clock that knows how long each run takes."""

    def __init__(self, spent: dict[object, float]) -> None:
        self.spent = spent

    def milliseconds(self, run) -> float:
        run()
        return self.spent[run]

    def peak_bytes(self, run) -> int:
        return 1 << 20


def test_a_contest_spares_the_others_what_one_cannot_do() -> None:
    def fast() -> None: ...

    def slow() -> None: ...

    def broken() -> None:
        raise torch.OutOfMemoryError("too much")

    contenders = [
        Contender("slow", slow),
        Contender("fast", fast, lambda: 1e-5),
        Contender("broken", broken),
        Contender("absent", broken, absent="it is not installed"),
    ]
    meter = Ticks({fast: 2.0, slow: 6.0})
    options = {"baseline": "slow", "least": 1.0, "meter": meter, "memory": True, "repeats": 5}
    by_name = {r.name: r for r in contest("case", contenders, spared=(Exception,), **options)}
    assert by_name["fast"].ratio == 3.0
    assert by_name["fast"].floors == 2.0
    assert by_name["slow"].floor == 1.0
    assert by_name["fast"].mebibytes == 1.0
    assert by_name["broken"].refused == "failed: OutOfMemoryError: too much"
    assert by_name["absent"].refused == "skipped: it is not installed"
    with pytest.raises(torch.OutOfMemoryError):
        contest("case", contenders, **options)
    untimed = contest("case", contenders[:2], meter=None)
    assert [record.refused for record in untimed] == ["checked only: there is nothing to time it on"] * 2
    assert [record.error for record in untimed] == [None, 1e-5]


@without_gpu
def test_a_timed_op_has_rates_and_shares_of_the_peaks(tmp_path: Path) -> None:
    """With the processor's clock in the place of the device's."""
    pytest.importorskip("triton")
    target = replace(Target.interpreter(), meter=Meter(), bf16_peak=1e12, bandwidth=1e9)
    (case,) = op_cases.op_cases(op_cases.TINY)["forward"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hqlt.bench.timing.WARM_UP_RUNS", 1)
        records = {r.name: r for r in case.run(target, 0.0)}
    own, op = records[ops.OURS], ops.both_memories(replace(op_cases.TINY.shape, length=40))
    assert own.milliseconds is not None
    work = op.launches[0]
    assert own.bandwidth == pytest.approx(work.moved / 1e9 / (own.milliseconds / 1e3))
    assert own.compute == pytest.approx((2 * work.tf32_flops + work.bf16_flops) / 1e12 / (own.milliseconds / 1e3))
    assert own.floor == pytest.approx(1e3 * op.least(False) / 1e9)
    assert own.tokens == 80
    assert "TB/s" in markdown([own])
    assert records[ops.APART].flops is None


def test_training_uses_the_share_of_the_peak_that_its_model_flops_take() -> None:
    target = Target(device=torch.device("cpu"), dtype=torch.bfloat16, bf16_peak=1e12)
    record = target.rated(Record(case="a", name="b", milliseconds=500.0), Work(kernel="", moved=0, bf16_flops=2e11))
    assert record.compute == pytest.approx(0.4)
    assert record.moved is None
    assert "0.4 (40%)" in markdown([record])
    assert target.rated(Record(case="a", name="b", refused="x"), Work(kernel="", moved=1)).flops is None


def test_training_is_timed_step_by_step_and_its_steps_train(monkeypatch) -> None:
    """With PyTorch's form of both memories and the processor's clock."""
    monkeypatch.setattr("hqlt.bench.timing.WARM_UP_RUNS", 1)
    right = training._with_backend
    monkeypatch.setattr(training, "_with_backend", lambda recipe, backend: right(recipe, "chunked"))
    target = Target(device=torch.device("cpu"), dtype=torch.float32, meter=Meter(), bf16_peak=1e12)
    case, _ = training.training_cases(training.TINY, 1e12)
    records = {record.name: record for record in case.run(target, 0.0)}
    own, other = records[training.HQLT], records[training.TRANSFORMER]
    model = training._configurations(training.TINY)[training.HQLT].model
    assert own.milliseconds is not None
    assert own.tokens == 48
    assert own.compute == pytest.approx(48 * training_flops(model, 24).total / 1e12 / (own.milliseconds / 1e3))
    assert own.ratio is not None
    assert other.ratio is None
    trainee = training._Trainee(training._configurations(training.TINY)[training.HQLT], (2, 24), target, False)
    losses = []
    for _ in range(6):
        trainee.step()
        losses.append(float(trainee.loss(*trainee._data).detach()))
    assert losses == sorted(losses, reverse=True)
    with torch.no_grad():
        trainee.objective.model.head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="norm is nan"):
        trainee.step()


def test_a_step_of_training_shrinks_where_memory_is_short() -> None:
    large, small = (training.training_cases(training.LARGE, memory)[0] for memory in (141e9, 80e9))
    assert large.name == "training, 16 rows of 2048"
    assert small.name == "training, 8 rows of 2048"
    assert small.memory < training.HEADROOM * 80e9 < large.memory < training.HEADROOM * 141e9


def test_the_step_of_libraries_is_the_step_of_both_memories() -> None:
    """The window wraps around; the library's delta rule is stood in for by the recurrence."""

    def recurrence(*, q: Tensor, k: Tensor, v: Tensor, output_final_state: bool, **rest: Tensor):
        return delta_rule(q, k, v, rest.pop("beta"), **rest, backend="reference")

    model = replace(decoding.TINY.model, memory=replace(decoding.TINY.model.memories[0], window=7))
    mine, theirs = (step.StepState(model, torch.device("cpu"), torch.float64, 20) for _ in range(2))
    found = step.stepped(step.library_step(recurrence), theirs)
    assert step.distance(found, step.stepped(step.own_step("reference"), mine)) < 1e-6  # features in float32
    assert step.distance(theirs.fast_weight, mine.fast_weight) < 1e-6


def test_launches_are_found_among_all_that_a_device_did() -> None:
    works = [Work(kernel="_hybrid", moved=1), Work(kernel="_hybrid", moved=1), Work(kernel="_backward", moved=1)]
    names = ["_hybrid", "fill", "_hybrid", "_backward", "sum"] * 2
    events = [(n, name, 1000 * n) for n, name in enumerate(names)]
    assert by_launch(events[::-1], works) == [[0.0, 0.005], [0.002, 0.007], [0.003, 0.008]]
    for wrong in (events[:3], [event for event in events if event[1] == "sum"], events[1:]):
        with pytest.raises(RuntimeError, match="the profiler saw"):
            by_launch(wrong, works)


def test_bytes_of_the_counter_are_read_from_what_ncu_prints() -> None:
    printed = (
        "==PROF== Connected to process 7\nhello\n"
        '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","7","_hybrid","dram__bytes.sum","byte","1,376,256,000"\n'
    )
    assert counted_bytes(printed) == 1_376_256_000
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        counted_bytes("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n")
    record = Record(case="traffic", name=ops.OURS, moved=1e9, traffic=1.25e9)
    assert "1.25" in markdown([record])


def test_aims_are_judged_by_the_records() -> None:
    def timed(case: str, name: str, **more: float | str) -> Record:
        return Record(case=case, name=name, milliseconds=1.0, tokens=100, **more)

    layer = "both memories, B16 T2048 H8 K=128 V=128, "
    records = [
        timed(layer + "forward+backward", ops.OURS, ratio=2.0),
        timed(layer.replace("2048", "8192") + "forward+backward", ops.OURS, ratio=1.2),
        timed(layer + "forward", ops.OURS, floors=1.25),
        timed("training, 16 rows of 2048", training.HQLT, ratio=1.1, compute=0.41),
        timed("training, 4 rows of 8192", training.HQLT, ratio=1.2, compute=0.45),
        timed("training, 8 rows of 16384, blocks run twice", training.HQLT, ratio=9.0, compute=0.1),
        timed("20 tokens one at a time, after contexts", "after 1,024 tokens"),
        replace(timed("20 tokens one at a time, after contexts", "after 65,536 tokens"), milliseconds=1.02),
        timed("20 tokens one at a time, against the plain step", decoding.GRAPH, ratio=5.0, baseline=decoding.PLAIN),
        timed("one token", step.OWN, ratio=2.5, baseline=step.LIBRARY),
        timed("against a compiled step", decoding.GRAPH, ratio=1.1, baseline=decoding.COMPILED),
        Record(case="traffic", name=ops.OURS, moved=2.0, traffic=3.0),
    ]
    found = [aim.row(records) for aim in AIMS]
    assert [row["measured"] for row in found] == [
        "0.50 (T2048), 0.83 (T8192)",
        "1.10 (100 tokens a step)",
        "1.20 (100 tokens a step)",
        "not measured",
        "0.41 (16 rows of 2048), 0.45 (4 rows of 8192)",
        "1.02 (slowest over fastest of 2)",
        f"5.00 (against {decoding.PLAIN}), 2.50 (against {step.LIBRARY})",
        "1.50 (by ncu)",
        "1.25 (T2048)",
    ]
    yes, no = "reached", "**not reached**"
    assert [row[" "] for row in found] == [no, yes, no, "", yes, yes, yes, no, yes]


def test_emulated_rounding_is_that_of_bfloat16() -> None:
    rounding = loaded("kernel_rounding.py")
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-6, 6, (1000,)), torch.tensor([1.00390625, 1.01171875])])
    assert torch.equal(torch.from_numpy(rounding.rounded(x.numpy(), 16)), x.bfloat16().float())
    tf32 = torch.from_numpy(rounding.rounded(x.numpy(), 13))
    assert 0 < ((tf32 - x).abs() / x.abs()).max() <= 2**-11


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_time_a_device_not_its_launches() -> None:
    meter = CudaMeter(torch.device("cuda"))
    square = torch.randn(4096, 4096, device="cuda")
    once, twice = (
        sorted(meter.milliseconds(lambda n=n: [square @ square for _ in range(n)]) for _ in range(9))[4] for n in (4, 8)
    )
    assert 1.7 < twice / once < 2.3
    assert meter.peak_bytes(lambda: torch.empty(1 << 24, dtype=torch.uint8, device="cuda")) == 1 << 24
