"""A model that is built on the meta device, spread and then filled has the weights of one that is built at once."""

from dataclasses import replace

import pytest
import torch

from hqlt.training.distributed import Engine, World, spread, whole
from hqlt.training.language import LanguageRecipe, Objective
from tests.training.language_runs import MEMORY, begin, finish, recipe

ALONE = World(0, 1, 1, torch.device("cpu"))


def model(made: LanguageRecipe, **changes: object) -> LanguageRecipe:
    return replace(made, model=replace(made.model, **changes))


EVERYTHING = replace(MEMORY, update_rule="gated_delta", mixer="static_scalar", short_convolution=True, output_gate=True)
RECIPES = {
    "plain": recipe(precision="float32"),
    "everything": model(
        recipe(memory=EVERYTHING, seed=5), norm="layer", mlp="gelu", rescale_residual=True, tie_embeddings=True,
        conv_initializer_range=0.3, beta_initializer_range=0.5,
    ),
    "vocabulary": model(recipe(precision="bfloat16"), vocab_size=257, num_hidden_layers=1),
}  # fmt: skip


def compare(world: World, parallel: str) -> None:
    """Every weight is that of an ordinary build, and a process holds its own part."""
    for made in RECIPES.values():
        outline = made.outline()
        assert all(p.is_meta for p in outline.parameters())
        module = spread(Objective(outline, made), made, world, Engine(parallel=parallel))
        expected = dict(made.build().named_parameters())
        found = {name.removeprefix("module.").removeprefix("model."): p for name, p in module.named_parameters()}
        assert found.keys() == expected.keys()
        for name, p in found.items():
            assert p.dtype == expected[name].dtype, name
            assert torch.equal(whole(p.detach()), expected[name].detach()), name
        assert (outline.head.weight is outline.embedding.weight) == made.model.tie_embeddings
        if parallel == "fsdp":
            held = sum(p.to_local().numel() for p in found.values())
            most = sum(-(-p.shape[0] // world.size) * p[:1].numel() for p in expected.values())
            assert held <= most < 0.6 * sum(p.numel() for p in expected.values())
    if world.size > 1:
        torch.distributed.barrier()  # the first process keeps the address book of the others


def test_in_one_process():
    compare(ALONE, "auto")


@pytest.mark.parametrize(("parallel", "local"), [("fsdp", 2), ("hsdp", 1), ("ddp", 2)])
def test_in_two_processes(parallel, local):
    assert finish(begin(compare, parallel, size=2, local=local)) == [0, 0]
