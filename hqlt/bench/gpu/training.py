"""Steps of training a language model on a device, as :mod:`hqlt.training.pretraining` makes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hqlt.analysis.cost import training_flops
from hqlt.analysis.footprint import training_bytes
from hqlt.bench.gpu.counts import Work
from hqlt.bench.gpu.device import Target
from hqlt.bench.gpu.ops import library_absent
from hqlt.bench.gpu.run import Case
from hqlt.bench.record import Record
from hqlt.bench.timing import Contender, contest, distance
from hqlt.config import ModelConfig
from hqlt.models.language_model import LanguageModel
from hqlt.ops.backend import Call
from hqlt.recipes.language_model import language_model
from hqlt.training.language import LanguageRecipe, Objective
from hqlt.training.optimizer import make_adamw

HQLT, LIBRARIES, TRANSFORMER = "HQLT", "HQLT, kernels of libraries", "Transformer++"
# Of the gradient of all weights, relative in norm, under bfloat16 autocast; 0.9 · 10⁻² in 24 layers on a CPU.
TOLERANCE = 3e-2
REPEATS = 15
HEADROOM = 0.85  # of the device's memory


@dataclass(frozen=True, kw_only=True)
class TrainingSizes:
    """What the cases of training are drawn from.

    Attributes:
        hybrid, transformer: recipes by name. changes: to their models.
        lengths: T, in order of importance. tokens: of a step, fewer where memory is short; recomputed: of a step of the
            longest rows with activation checkpointing, which makes room for more of them.
        checked: tokens of which the gradient is compared.
    """

    hybrid: str
    transformer: str
    lengths: tuple[int, ...]
    tokens: int
    recomputed: int
    checked: int
    changes: dict[str, Any]


LARGE = TrainingSizes(
    hybrid="340m_synchronous",
    transformer="340m_transformer",
    lengths=(2048, 8192, 16384),
    tokens=32768,
    recomputed=131072,
    checked=256,
    changes={},
)
TINY = TrainingSizes(
    hybrid="cpu_synchronous",
    transformer="cpu_transformer",
    lengths=(24,),
    tokens=48,
    recomputed=48,
    checked=20,
    changes={"num_hidden_layers": 1, "vocab_size": 64},
)


def training_cases(sizes: TrainingSizes, memory: float) -> list[Case]:
    """HQLT beside Transformer++ at each length, and at the longest once more with activation checkpointing."""
    cases = [_case(sizes, length, sizes.tokens, False, memory) for length in sizes.lengths]
    return [*cases, _case(sizes, max(sizes.lengths), sizes.recomputed, True, memory)]


def _configurations(sizes: TrainingSizes) -> dict[str, LanguageRecipe]:
    hybrid, transformer = (language_model(name) for name in (sizes.hybrid, sizes.transformer))
    recipes = {HQLT: _with_backend(hybrid, "triton"), LIBRARIES: _with_backend(hybrid, "fla"), TRANSFORMER: transformer}
    return {name: replace(r, model=replace(r.model, **sizes.changes)) for name, r in recipes.items()}


def _with_backend(recipe: LanguageRecipe, backend: str) -> LanguageRecipe:
    memories = tuple(replace(memory, backend=backend) for memory in recipe.model.memories[:1])
    return replace(recipe, model=replace(recipe.model, memory=memories[0]))


def needed(models: list[ModelConfig], length: int, tokens: int, recomputes: bool) -> float:
    """Bytes of these models, trained in turns on so many tokens a step: all weights, one's activations."""
    parts = [training_bytes(m, tokens // length, length, activation_checkpointing=recomputes) for m in models]
    return sum(p.weights + p.gradients + p.optimizer for p in parts) + max(
        p.gathered + p.activations + p.logits for p in parts
    )


def _case(sizes: TrainingSizes, length: int, tokens: int, recomputes: bool, memory: float) -> Case:
    recipes = _configurations(sizes)
    models = [recipe.model for recipe in recipes.values()]
    while tokens > length and needed(models, length, tokens, recomputes) > HEADROOM * memory:
        tokens //= 2
    label = f"training, {tokens // length} rows of {length}" + (", blocks run twice" if recomputes else "")

    def run(target: Target, rounds: float) -> list[Record]:
        shape = (tokens // length, length)
        trainees = {name: _Trainee(recipe, shape, target, recomputes) for name, recipe in recipes.items()}
        records = contest(
            label,
            [_contender(name, trainee, sizes.checked) for name, trainee in trainees.items()],
            baseline=TRANSFORMER,
            tokens=tokens,
            repeats=REPEATS,
            seconds=rounds,
            memory=True,
            meter=target.meter,
            spared=(Exception,),
        )
        return [target.rated(record, _model_work(recipes[record.name].model, length, tokens)) for record in records]

    flops = {name: training_flops(recipe.model, length).total * tokens / 1e12 for name, recipe in recipes.items()}
    return Case(
        name=label,
        run=run,
        work=", ".join(f"{name} {flops[name]:.3g} TFLOP" for name in (HQLT, TRANSFORMER)),
        memory=needed(models, length, tokens, recomputes),
        seconds=60.0,
        rounds=15.0,
    )


def _model_work(model: ModelConfig, length: int, tokens: int) -> Work:
    """FLOPs that the model takes, not those that its kernels or a repeated forward pass make beside: their share of
    the peak is the MFU."""
    return Work(kernel="training", moved=0.0, bf16_flops=training_flops(model, length).total * tokens)


class _Trainee:
    """A model in training, built when it is first needed; :meth:`step` is one update."""

    def __init__(self, recipe: LanguageRecipe, shape: tuple[int, int], target: Target, recomputes: bool) -> None:
        precision = "bfloat16" if target.dtype == torch.bfloat16 else "float32"
        self.recipe, self.shape, self.target = replace(recipe, precision=precision), shape, target
        self._recomputes = recomputes
        self._objective: Objective | None = None

    @property
    def objective(self) -> Objective:
        if self._objective is None:
            torch.manual_seed(0)
            with self.target.device:
                model = LanguageModel(self.recipe.model)
                self._data = torch.randint(self.recipe.model.vocab_size, (2, *self.shape))
            model.gradient_checkpointing = self._recomputes
            self._objective = Objective(model, self.recipe).train()
            self._optimizer = make_adamw(model, self.recipe.training)
        return self._objective

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = self.objective(ids, targets, None, None, ids.numel())[0]
        return found

    def step(self) -> None:
        """Gradients, their norm, clipping, the optimiser."""
        objective = self.objective
        self.loss(*self._data).backward()
        gradients = [p.grad for p in objective.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):  # the trainer too waits for it
            raise FloatingPointError(f"the gradient's norm is {float(norm)}")
        nn.utils.clip_grads_with_norm_(list(objective.parameters()), self.recipe.training.clip or 1.0, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def error(self, checked: int) -> float:
        """Of the gradient of all weights on some tokens, against the recurrences in float64."""
        model = self.objective.model
        ids, targets = self._data[:, :1, :checked]
        found = torch.autograd.grad(self.loss(ids, targets), list(model.parameters()))
        memories = tuple(replace(memory, backend="reference") for memory in model.config.memories)
        with self.target.device:
            exact = LanguageModel(replace(model.config, memory=memories)).double()
        exact.load_state_dict(model.state_dict())
        loss = exact.target_loss(exact.hidden_states(ids)[0], targets, ids.numel())
        expected = torch.autograd.grad(loss, list(exact.parameters()))
        return distance(*(torch.cat([g.flatten().double() for g in given]) for given in (found, expected)))


def _contender(name: str, trainee: _Trainee, checked: int) -> Contender:
    memory = trainee.recipe.model.memories[0]
    call = Call(trainee.target.device.type, torch.bfloat16, checked, memory.key_dim, memory.value_dim)
    absent = library_absent(call) if name == LIBRARIES else None
    return Contender(name, trainee.step, lambda: trainee.error(checked), TOLERANCE, absent)
