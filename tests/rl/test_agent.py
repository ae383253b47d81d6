from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hqlt.recipes.reinforcement_learning import MEMORIES, visual_match
from hqlt.rl.agent import Agent, Head
from hqlt.rl.config import AgentConfig, LSTMConfig, SACConfig
from hqlt.rl.sac import Episodes, make_optimizer, sac_loss, update
from tests.helpers import assert_close

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "rl_sacd_golden.npz")
NAMES = {
    "observ_embedder.cnn": "encoder.convolutions",
    "observ_embedder": "encoder",
    "seq_model": "memory",
    "qf1": "critics.0",
    "qf2": "critics.1",
    "qf1_target": "targets.0",
    "qf2_target": "targets.1",
    "policy": "policy",
    "fc0": "0",
    "fc1": "2",
    "last_fc": "4",
}


class Scale(nn.Module):
    """The sequence model of the recorded updates: hidden states are inputs times a learnable vector."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(100))

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        return x * self.w, None


def ours(name: str) -> str:
    for theirs, mine in NAMES.items():
        name = name.replace(f"{theirs}.", f"{mine}.")
    return name


def recorded(prefix: str) -> dict[str, Tensor]:
    found = {ours(k[3:]): torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith(f"{prefix}.")}
    return {k: x for k, x in found.items() if "policy_target" not in k}  # which nothing uses


def recorded_agent() -> Agent:
    agent = Agent(AgentConfig(memory=LSTMConfig(hidden_size=100), head_sizes=(16, 16), dropout=0.0))
    agent.memory = Scale()
    agent.load_state_dict(recorded("p0"))
    return agent


def recorded_batch() -> Episodes:
    def rows(name: str) -> Tensor:
        return torch.from_numpy(GOLDEN[name]).transpose(0, 1)

    images = rows("obs").unflatten(-1, (3, 5, 5))
    return Episodes(images, rows("act")[..., 0].long(), *(rows(k)[..., 0] for k in ("rew", "term", "mask")))


def test_gradients_are_those_of_the_published_learner():
    agent = recorded_agent()
    loss, _ = sac_loss(agent, recorded_batch(), SACConfig())
    loss.backward()
    expected = recorded("g1")
    found = {name: p.grad for name, p in agent.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 2e-5, name)


def test_three_updates_are_those_of_the_published_learner():
    agent, batch, config = recorded_agent(), recorded_batch(), SACConfig()
    optimizer = make_optimizer(agent, config)
    for step in range(3):
        found = update(agent, optimizer, batch, config)
        for name in ("critic_loss", "actor_loss", "entropy"):
            assert found[name].item() == pytest.approx(GOLDEN[f"log.{name}"][step], rel=1e-5), (name, step)
        q = (GOLDEN["log.q1"][step] + GOLDEN["log.q2"][step]) / 2
        assert found["q"].item() == pytest.approx(q, rel=1e-4)
        if step in (0, 2):
            for name, expected in recorded(f"p{step + 1}").items():
                assert_close(agent.state_dict()[name], expected, 2e-5, name)


def images(batch: int, length: int) -> Tensor:
    return torch.randint(0, 256, (batch, length, 3, 5, 5), dtype=torch.uint8)


def make(memory: str) -> Agent:
    """An agent whose weights are large enough that memory matters."""
    agent = Agent(visual_match("visual_match_750", memory).agent).eval()
    with torch.no_grad():
        for weight in agent.memory.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.15)
    return agent


@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_one_step_at_a_time_is_the_whole_sequence(memory):
    agent, seen = make(memory), images(3, 140)
    whole, _ = agent(seen)
    state, steps = None, []
    for t in range(140):
        hidden, state = agent(seen[:, t : t + 1], state)
        steps.append(hidden)
    assert_close(torch.cat(steps, 1), whole, 1e-5)
    other = seen.clone()
    other[:, 0] = images(3, 1)[:, 0]
    assert (agent(other)[0][:, 3] - whole[:, 3]).abs().max() > 1e-4, "the memory has no effect"


@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_memory_is_carried_with_dropout_on(memory):
    agent, seen = make(memory).train(), images(2, 6)

    def last(first: Tensor) -> Tensor:
        state = None
        for t in range(6):
            torch.manual_seed(t)
            frame = first if t == 0 else seen[:, t : t + 1]
            hidden, state = agent(frame, state)
        return hidden

    assert torch.equal(last(seen[:, :1]), last(seen[:, :1]))
    assert not torch.allclose(last(seen[:, :1]), last(images(2, 1)), atol=1e-4)
    torch.manual_seed(1)
    assert not torch.equal(agent(seen)[0], agent(seen)[0])


def test_the_models_have_the_published_sizes():
    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    agents = {name: Agent(AgentConfig(memory=memory)) for name, memory in MEMORIES.items()}
    assert [size(agents[n].memory) for n in ("transformer", "deltanet", "hqlt")] == [242_800, 582_250, 612_250]
    agent = agents["hqlt"]
    assert size(agent.encoder) == 15_132
    assert [size(head) for head in (agent.policy, *agent.critics)] == [92_676] * 3


def test_heads_begin_as_published():
    head = Head(100, (256, 256), 3e-3)
    assert head[2].weight.abs().max().item() == pytest.approx(1 / 16, rel=1e-2)
    assert (head[0].bias == 0.1).all()
    assert head[4].weight.abs().max().item() == pytest.approx(3e-3, rel=2e-2)


def test_padding_after_an_episode_has_no_effect():
    agent = recorded_agent()
    batch = recorded_batch()
    rows = batch.mask.sum(1) == 13
    ragged = sac_loss(agent, batch, SACConfig())[0]
    noise = Episodes(batch.images.clone(), *list(vars(batch).values())[1:])
    for row in (~rows).nonzero().flatten():
        noise.images[row, int(batch.mask[row].sum()) + 1 :] = 255
    assert torch.equal(sac_loss(agent, noise, SACConfig())[0], ragged)
    noise.images[0, 5] = 255
    assert not torch.equal(sac_loss(agent, noise, SACConfig())[0], ragged)
