import numpy as np
import pytest
import torch

from hqlt.rl.agent import Agent
from hqlt.rl.environments import VisualMatchVectorEnv
from hqlt.rl.replay import Replay, redraw
from hqlt.rl.rollout import Rollout, roll_out
from hqlt.rl.training import make_world
from tests.rl.runs import TINY


def agent() -> Agent:
    made = Agent(TINY.agent)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(std=0.5)
    return made


def world(count: int, **options: object) -> VisualMatchVectorEnv:
    return VisualMatchVectorEnv(count, 4, autoreset_mode="Disabled", **options)


def replayed(env: VisualMatchVectorEnv, episodes: Rollout, seed: int) -> None:
    """The environment gives the same views and rewards for the same actions."""
    images, _ = env.reset(seed=seed)
    drawn = redraw(torch.from_numpy(episodes.symbols)).numpy()
    assert np.array_equal(images, drawn[:, 0])
    for t in range(episodes.actions.shape[1]):
        images, rewards, *_ = env.step(episodes.actions[:, t])
        assert np.array_equal(images, drawn[:, t + 1])
        assert np.array_equal(rewards, episodes.rewards[:, t])


@pytest.mark.parametrize("end_on_door", [False, True])
def test_a_rollout_is_what_the_environment_gave(end_on_door):
    for player in (None, agent()):
        episodes = roll_out(world(30, end_on_door=end_on_door), player, 5)
        replayed(world(30, end_on_door=end_on_door), episodes, 5)
        assert episodes.lengths.max() == episodes.actions.shape[1]
        if end_on_door and player is None:
            assert episodes.lengths.min() < episodes.lengths.max()
        last_phase = episodes.rewards[:, 19:].sum(1) > 0
        assert np.array_equal(episodes.success, last_phase)


def test_rollouts_are_reproducible_and_differ_by_seed():
    player = agent()
    first, again, other = (roll_out(world(5), player, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.actions, again.actions)
    assert not np.array_equal(first.actions, other.actions)


def greedy_actions(player: Agent, episodes: Rollout) -> np.ndarray:
    """What the agent does in these episodes, from whole sequences."""
    with torch.no_grad():
        hidden, _ = player(redraw(torch.from_numpy(episodes.symbols)))
        return player.policy(hidden[:, :-1]).argmax(-1).numpy()


def test_greedy_rollouts_are_those_of_whole_sequences():
    player = agent().eval()
    episodes = roll_out(world(9), player, 0, greedy=True)
    assert len(np.unique(episodes.actions)) > 1
    assert np.array_equal(greedy_actions(player, episodes), episodes.actions)


def test_stateless_rollouts_forget():
    player = agent().eval()
    episodes = roll_out(world(9), player, 0, greedy=True, stateless=True)
    single = redraw(torch.from_numpy(episodes.symbols[:, :-1]))
    with torch.no_grad():
        hidden, _ = player(single.flatten(0, 1)[:, None])
        alone = player.policy(hidden[:, 0]).argmax(-1).view(9, -1).numpy()
    assert np.array_equal(alone, episodes.actions)
    assert not np.array_equal(greedy_actions(player, episodes), episodes.actions)


def test_dropout_is_active_in_training_mode_only():
    player = agent()
    still = [roll_out(world(9), player.eval(), seed, greedy=True, options={"target": 0, "cue": 1}) for seed in (1, 1)]
    assert np.array_equal(still[0].actions, still[1].actions)
    noisy = roll_out(world(9), player.train(), 1, greedy=True, options={"target": 0, "cue": 1})
    assert not np.array_equal(noisy.actions, still[0].actions)


def test_a_replay_returns_what_it_was_given_and_overwrites_the_oldest():
    env = make_world(TINY, 5, "per_episode")
    replay = Replay(12, TINY.world.episode_length)
    rounds = [roll_out(env, None, seed) for seed in range(4)]
    with pytest.raises(ValueError, match="the replay is empty"):
        replay.sample(1, torch.Generator())
    for episodes in rounds:
        replay.add(episodes)
    assert len(replay) == 12
    kept = np.concatenate([r.symbols for r in rounds])[-12:]
    images = {redraw(torch.from_numpy(s)).numpy().tobytes() for s in kept}
    batch = replay.sample(400, torch.Generator().manual_seed(0))
    assert {x.numpy().tobytes() for x in batch.images} == images
    rewards = np.concatenate([r.rewards for r in rounds])[-12:].sum(1)
    assert set(batch.rewards.sum(1).tolist()) == set(rewards.tolist())
    assert batch.ends.sum(1).eq(1).all()
    assert batch.ends[:, -1].all()
    assert batch.mask.all()


def test_a_replay_masks_what_follows_an_early_end():
    env = world(40, end_on_door=True)
    replay = Replay(40, env.episode_length)
    episodes = roll_out(env, None, 0)
    replay.add(episodes)
    batch = replay.sample(200, torch.Generator().manual_seed(0))
    lengths = batch.mask.sum(1)
    assert set(lengths.tolist()) == set(episodes.lengths.tolist())
    assert torch.equal(batch.ends.argmax(1) + 1, lengths.long())


def test_a_replay_takes_25_bytes_for_a_view():
    replay = Replay(10, 780)
    assert replay.symbols.numel() * replay.symbols.element_size() == 10 * 781 * 25
