import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from hqlt.rl.environments import KeyToDoorEnv, KeyToDoorVectorEnv, TMazeEnv, TMazeVectorEnv
from hqlt.rl.environments.boards import PALETTE, Symbol

IDS = ("VisualMatch", "KeyToDoor", "TMazePassive", "TMazeActive")
NORTH, SOUTH, WEST, EAST = range(4)
AHEAD, UP, BACK, DOWN = range(4)


@pytest.mark.parametrize("name", IDS)
def test_gymnasium_finds_and_accepts_the_environments(name, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # the check opens a window
    env = gymnasium.make(f"hqlt/{name}-v0")
    check_env(env.unwrapped)
    vector = gymnasium.make_vec(f"hqlt/{name}-v0", num_envs=3, vectorization_mode="vector_entry_point")
    observations, _ = vector.reset(seed=0)
    assert observations in vector.observation_space
    alone, _ = env.reset(seed=0)
    assert alone in env.observation_space
    assert observations.shape == (3, *alone.shape)


def see(observation: np.ndarray, row: int, column: int) -> int:
    """The first symbol of the colour that a cell of the view has."""
    return int((observation[:, row, column] == PALETTE).all(1).argmax())


@pytest.mark.parametrize("takes_key", [True, False])
def test_a_door_opens_once_and_with_the_key_only(takes_key):
    env = KeyToDoorEnv(distractor_steps=3, final_reward=9.0)
    view, _ = env.reset(seed=0, options={"key": 2, "start": 2})  # both in the middle column
    assert see(view, 2, 2) == Symbol.AGENT
    seen = []
    for _ in range(15):
        view, reward, *_ = env.step(NORTH if takes_key else SOUTH)
        assert reward == 0
        seen.append((see(view, 0, 2), see(view, 1, 2)))
    if takes_key:  # from row 4 to the key in row 1, where the wall above flashes
        floor, wall = Symbol.FLOOR, Symbol.WALL
        taken = [(floor, Symbol.INDICATOR)] + [(floor, wall)] * 11
        assert seen[:-1] == [(Symbol.KEY, floor), (wall, Symbol.KEY), *taken]
    for _ in range(3):
        view, *_ = env.step(SOUTH)
    assert see(view, 0, 2) == Symbol.OPEN_DOOR or not takes_key
    actions = [NORTH, NORTH, NORTH, SOUTH, NORTH, NORTH, NORTH, WEST, SOUTH, SOUTH]
    results = [env.step(a) for a in actions]
    rewards = [r[1] for r in results]
    assert rewards == ([0, 9.0] + [0] * 8 if takes_key else [0] * 10)
    assert results[-1][2]
    assert results[-1][4] == {"success": takes_key}
    assert [r[2] for r in results[:-1]] == [False] * 9


def test_the_agent_stays_on_the_board():
    env = KeyToDoorVectorEnv(1, distractor_steps=1, reward_steps=40)
    env.reset(seed=0, options={"key": 1, "start": 1})
    for action in [NORTH] * 15 + [SOUTH] + [NORTH] * 10 + [WEST] * 15 + [NORTH] * 3:
        env.step(np.array([action]))
    assert np.divmod(env._position - env._origin, 15)[0].tolist() == [2]
    assert np.divmod(env._position - env._origin, 15)[1].tolist() == [2]


def test_a_vector_of_key_to_door_is_many_single_environments():
    env = KeyToDoorVectorEnv(6, 12)
    first, _ = env.reset(seed=1)
    actions = np.random.default_rng(0).integers(0, 4, (env.episode_length, 6))
    episodes = {"key": env.key.copy(), "start": env.start.copy(), "apples": env._apples.copy()}
    steps = [env.step(a) for a in actions]
    for n in range(6):
        single = KeyToDoorEnv(distractor_steps=12)
        view, _ = single.reset(options={name: x[n] for name, x in episodes.items()})
        assert np.array_equal(view, first[n])
        for action, step in zip(actions[:, n], steps, strict=True):
            view, reward, terminated, _, _ = single.step(int(action))
            assert np.array_equal(view, step[0][n])
            assert (reward, terminated) == (step[1][n], step[2][n])


@pytest.mark.parametrize(("active", "goal"), [(False, 1), (False, -1), (True, 1), (True, -1)])
def test_the_best_walk_through_a_t_maze(active, goal):
    env = TMazeEnv(corridor_length=4, active=active)
    views = [env.reset(seed=0, options={"goal": goal})[0].tolist()]
    actions = [BACK, AHEAD] * active + [AHEAD] * 4 + [UP if goal > 0 else DOWN]
    results = [env.step(a) for a in actions]
    views += [r[0].tolist() for r in results]
    assert views == [[0, 0]] * active + [[0, goal]] + [[0, 0]] * (3 + active) + [[1, 0], [1, goal]]
    assert [r[1] for r in results] == [0] * (len(actions) - 1) + [1.0]
    assert [r[2] for r in results] == [False] * (len(actions) - 1) + [True]
    assert results[-1][4] == {"success": True}


@pytest.mark.parametrize("active", [False, True])
def test_a_t_maze_charges_delay_and_wrong_turns(active):
    env = TMazeVectorEnv(2, corridor_length=3, active=active)
    env.reset(seed=0, options={"goal": 1})
    length = env.episode_length
    assert length == 4 + 2 * active
    straight = [AHEAD] * (length - 1) + [DOWN]
    lazy = [UP] * length
    rewards = np.stack([env.step(np.array(pair))[1] for pair in zip(straight, lazy, strict=True)])
    assert rewards[:, 0].tolist() == [0.0] * length
    behind = [t - active > active for t in range(1, length)]
    assert np.allclose(rewards[:-1, 1], [-b / (length - 1) for b in behind])
    assert rewards[-1, 1] == 0
    first = env.step(np.zeros(2, int))
    assert not first[1].any()
    assert not first[2].any()


def test_a_t_maze_refuses_what_it_does_not_have():
    for options, message in (
        ({"corridor_length": 0}, "corridor_length=0"),
        ({"active": None}, "active=None must be True or False"),
        ({"render_mode": "ansi"}, "render_mode='ansi' is unknown"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            TMazeVectorEnv(2, **options)
    env = TMazeVectorEnv(2)
    with pytest.raises(ValueError, match="option goal=0 must be integers among"):
        env.reset(options={"goal": 0})
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action 5 is none of 0 ahead"):
        env.step(np.array([5, 0]))
