from pathlib import Path

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from hqlt.rl.environments import VisualMatchEnv, VisualMatchVectorEnv
from hqlt.rl.environments.boards import APPLE_PLACES, COLOURS, PALETTE, cell
from hqlt.rl.environments.visual_match import CUE_PLACES, DOOR_PLACES

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "rl_golden.npz")
SETS = "ABCD"


def sizes(name: str) -> dict[str, float]:
    explore, distractor, reward, apples, respawn, final = GOLDEN[f"{name}_config"].tolist()
    assert (explore, apples, reward) == (15, 10, 15)
    return {"distractor_steps": int(distractor), "respawn_every": int(respawn), "final_reward": final}


def drawn(name: str) -> dict[str, np.ndarray]:
    """What the published environment drew for the recorded episodes, as options of reset."""
    places = np.array([cell(r, c) for r, c in GOLDEN["apple_cells"]])
    grown = GOLDEN[f"{name}_apples"][:, 15]
    cue = [int(np.flatnonzero(cell(r, c) == CUE_PLACES)[0]) for r, c in GOLDEN[f"{name}_cue_rc"].tolist()]
    return {
        "target": GOLDEN[f"{name}_target"],
        "cue": np.array(cue),
        "doors": GOLDEN[f"{name}_door_colour"],
        "apples": np.stack([places[row] for row in grown]),
    }


def where(env: VisualMatchVectorEnv) -> np.ndarray:
    """Row and column of the agents."""
    return np.stack(np.divmod(env._position - env._origin, 15), 1) - 2


def test_places_are_those_of_the_published_boards():
    assert [cell(r, c) for r, c in GOLDEN["apple_cells"]] == APPLE_PLACES.tolist()
    assert [cell(r, c) for r, c in GOLDEN["door_cells"]] == DOOR_PLACES.tolist()


@pytest.mark.parametrize("name", SETS)
def test_recorded_episodes_of_the_published_environment_are_repeated_exactly(name):
    count, length = GOLDEN[f"{name}_action"].shape
    env = VisualMatchVectorEnv(count, **sizes(name))
    assert env.episode_length == length
    observations, _ = env.reset(seed=0, options=drawn(name))
    for t in range(length + 1):
        if t:
            observations, rewards, terminated, truncated, infos = env.step(GOLDEN[f"{name}_action"][:, t - 1])
            assert np.array_equal(rewards, GOLDEN[f"{name}_reward"][:, t - 1]), t
            assert np.array_equal(terminated, GOLDEN[f"{name}_done"][:, t - 1])
            assert not truncated.any()
            assert ("success" in infos) == (t == length)
        assert np.array_equal(observations.reshape(count, 75), GOLDEN[f"{name}_obs"][:, t]), t
        assert np.array_equal(PALETTE[env.symbols()].transpose(0, 2, 1), observations.reshape(count, 3, 25))
        assert np.array_equal(where(env), GOLDEN[f"{name}_agent_rc"][:, t])
    assert np.array_equal(infos["success"], GOLDEN[f"{name}_success"])
    assert infos["_success"].all()


def published_draws(index: int) -> dict[str, object]:
    """Episode ``index`` of a recorded set from numpy's legacy generators, drawn in the published order."""
    own, shared = np.random.RandomState(1000 + index), np.random.RandomState(2000 + index)
    symbols = np.array([*range(3)])
    colours = [*range(3)]
    own.shuffle(colours)
    for _ in range(2):  # the constructor builds an episode that nobody plays
        target = colours[own.choice(symbols)]
        shared.permutation(8)
        shared.permutation(22)
        shared.choice((1, 1))
        cue = shared.permutation(8)[-1]
    apples = shared.permutation(22)[12:]
    return {"target": target, "cue": int(cue), "doors": colours, "apples": APPLE_PLACES[apples]}


@pytest.mark.parametrize("name", SETS)
def test_the_published_order_of_draws_gives_the_recorded_episodes(name):
    recorded = drawn(name)
    for index in range(len(recorded["target"])):
        replayed = published_draws(index)
        for part, values in recorded.items():
            assert np.array_equal(np.sort(replayed[part]) if part == "apples" else replayed[part], values[index]), part


def play(env: VisualMatchVectorEnv, actions: np.ndarray, **reset: object) -> tuple[np.ndarray, ...]:
    """Views, rewards and ends of all steps."""
    first, _ = env.reset(**reset)
    steps = [env.step(row) for row in actions]
    views = np.stack([first, *(s[0] for s in steps)])
    return views, np.stack([s[1] for s in steps]), np.stack([s[2] for s in steps])


@pytest.mark.parametrize("end_on_door", [False, True])
def test_a_vector_is_many_single_environments(end_on_door):
    options = {"distractor_steps": 37, "respawn_every": 4, "final_reward": 7.0, "end_on_door": end_on_door}
    count = 5
    env = VisualMatchVectorEnv(count, **options, autoreset_mode="Disabled")
    rng = np.random.default_rng(3)
    actions = rng.integers(0, 4, (env.episode_length, count))
    actions[-15:] = np.array([0, 0, 0, 0, 2, 2, 2, 0, 3, 3, 3, 3, 3, 3, 3])[:, None]  # the middle door first
    actions[-15, 1] = 1  # the left one first
    actions[-15:, 4] = 1  # none
    views, rewards, ends = play(env, actions, seed=4)
    assert rewards[-15:].any()
    episodes = {"target": env.target, "cue": env.cue, "doors": env.doors, "apples": env._apples}
    for n in range(count):
        single = VisualMatchEnv(**options)
        view, _ = single.reset(seed=9, options={name: x[n] for name, x in episodes.items()})
        for t in range(env.episode_length):
            assert np.array_equal(view, views[t, n])
            view, reward, terminated, _, info = single.step(int(actions[t, n]))
            assert (reward, terminated) == (rewards[t, n], ends[t, n])
            if terminated:
                break
        assert np.array_equal(view, views[t + 1, n])
        assert ends[t:, n].all()
        assert not rewards[t + 1 :, n].any()
        assert info["success"] == bool(rewards[-15:, n].any())
        assert env.episode_length - t == ({1: 8, 4: 1}.get(n, 12) if end_on_door else 1)


def test_the_same_seed_gives_the_same_episodes_one_after_the_other():
    def run(seed):
        env = VisualMatchVectorEnv(6, 20, door_layout="per_episode")
        actions = np.random.default_rng(1).integers(0, 4, (2 * (env.episode_length + 1), 6))
        return play(env, actions, seed=seed), env.doors.copy()

    (first, doors), (again, doors_again), (other, _) = run(5), run(5), run(6)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(doors, doors_again)
    assert not np.array_equal(first[0], other[0])
    single = VisualMatchEnv(distractor_steps=20)
    views = [single.reset(seed=2)[0], single.reset(seed=2)[0]]
    assert np.array_equal(*views)


def test_a_new_episode_begins_with_the_step_after_the_last():
    env = VisualMatchVectorEnv(4, 10)
    views, rewards, ends = play(env, np.zeros((2 * env.episode_length + 2, 4), int), seed=0)
    length = env.episode_length
    assert ends.all(1).tolist() == [t % (length + 1) == length - 1 for t in range(len(ends))]
    cues = views[length + 1].reshape(4, 3, 25)
    assert all(len(np.unique(cue, axis=1).T) == 4 for cue in cues)  # floor, wall, agent and one cue
    assert not rewards[length].any()


def test_environments_that_ended_early_are_reset_one_by_one():
    env = VisualMatchVectorEnv(3, 4, end_on_door=True)
    length = env.episode_length
    actions = np.ones((2 * length + 2, 3), int)
    actions[19:23, 1] = 0  # straight to the middle door
    _, _, ends = play(env, actions, seed=0)
    assert np.flatnonzero(ends[:, 1]).tolist() == [22, 22 + length + 1]
    assert np.flatnonzero(ends[:, 0]).tolist() == [length - 1, 2 * length]


def test_door_layouts_are_of_the_object_of_the_episode_or_fixed():
    def layouts(layout, seed=0):
        env = VisualMatchVectorEnv(40, 5, door_layout=layout)
        play(env, np.zeros((env.episode_length + 1, 40), int), seed=seed)
        return env.doors

    assert len(np.unique(layouts("per_env"), axis=0)) == 1
    assert len({tuple(layouts("per_env", seed)[0]) for seed in range(40)}) == 6
    assert len(np.unique(layouts("per_episode"), axis=0)) == 6
    assert (layouts(("blue", "red", "green")) == [2, 0, 1]).all()
    env = VisualMatchVectorEnv(2, 5)
    env.reset(seed=1)
    kept = env.doors.copy()
    for _ in range(5):
        env.reset()
        assert np.array_equal(env.doors, kept)


def test_draws_are_uniform():
    env = VisualMatchVectorEnv(8000, 5, door_layout="per_episode")
    env.reset(seed=0)
    for values, kinds in ((env.target, 3), (env.cue, 8), (env.doors @ [9, 3, 1], 6)):
        counts = np.unique(values, return_counts=True)[1]
        assert len(counts) == kinds
        assert abs(counts / 8000 - 1 / kinds).max() < 0.02
    shares = np.array([(env._apples == place).any(1).mean() for place in APPLE_PLACES])
    assert abs(shares - 10 / 22).max() < 0.03
    assert abs(np.corrcoef(env.target, env.cue)[0, 1]) < 0.05


def test_a_mask_resets_some_environments_only():
    env = VisualMatchVectorEnv(3, 6, autoreset_mode="Disabled")
    env.reset(seed=0)
    for _ in range(17):
        before, *_ = env.step(np.array([0, 2, 0]))
    after, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert np.array_equal(after[[0, 2]], before[[0, 2]])
    assert not np.array_equal(after[1], before[1])
    ends = np.stack([env.step(np.zeros(3, int))[2] for _ in range(env.episode_length)])
    assert ends.argmax(0).tolist() == [18, 35, 18]


def test_a_frame_shows_board_view_and_agent():
    env = VisualMatchEnv(distractor_steps=5, render_mode="rgb_array")
    view, _ = env.reset(seed=0, options={"cue": 1, "target": 2})
    frame = env.render()
    assert frame.shape == (7 * 16, 11 * 16, 3)
    assert np.array_equal(frame[8::16, 8::16][0:5, 3:8], view.transpose(1, 2, 0))
    assert frame[8::16, 8::16][1, 5].tolist() == list(PALETTE[COLOURS.index("blue") + 2])
    assert (frame[8::16, 8::16][:, :3] < 204).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 0}, "num_envs=0 must be at least 1"),
        ({"distractor_steps": 0}, "distractor_steps=0 must be at least 1"),
        ({"explore_steps": -3}, "explore_steps=-3"),
        ({"reward_steps": 1.5}, "reward_steps=1.5 must be an int, not float"),
        ({"respawn_every": -1}, "respawn_every=-1"),
        ({"final_reward": float("nan")}, "final_reward=nan must be finite"),
        ({"final_reward": "5"}, "final_reward='5' must be a number"),
        ({"door_layout": "fixed"}, "door_layout='fixed' is unknown; choose per_env or per_episode"),
        ({"door_layout": ("red", "red", "blue")}, "must have red, green, blue, each once"),
        ({"end_on_door": 1}, "end_on_door=1 must be True or False"),
        ({"autoreset_mode": "SameStep"}, "autoreset_mode='SameStep' is not available"),
        ({"render_mode": "ansi"}, "render_mode='ansi' is unknown; choose None or 'human' or 'rgb_array'"),
    ],
)
def test_impossible_environments_are_refused(options, message):
    with pytest.raises((ValueError, TypeError)) as error:
        VisualMatchVectorEnv(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0, 4], "action 4 is none of 0 north"),
        ([0, -1], "action -1"),
        ([0], r"shape (1,); expected (2,)"),
        ([0.0, 1.0], "must be integers, not float64"),
    ],
)
def test_impossible_actions_are_refused(actions, message):
    env = VisualMatchVectorEnv(2, 5)
    env.reset(seed=0)
    with pytest.raises((ValueError, TypeError)) as error:
        env.step(np.array(actions))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"targets": 1}}, "knows no option 'targets'"),
        ({"options": {"target": 3}}, "option target=3 must be integers among [0, 1, 2]"),
        ({"options": {"doors": [0, 0, 1]}}, "has a value twice"),
        ({"options": {"cue": [1, 2, 3]}}, "option cue has shape (3,); expected (2,)"),
        ({"options": {"reset_mask": [True]}}, "must be 2 booleans"),
        ({"options": {"reset_mask": [True, False]}}, "have never begun"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_impossible_resets_are_refused(arguments, message):
    with pytest.raises((ValueError, TypeError)) as error:
        VisualMatchVectorEnv(2, 5).reset(**arguments)
    assert message in str(error.value)


def test_stepping_without_an_episode_is_refused():
    env = VisualMatchEnv(distractor_steps=1)
    with pytest.raises(ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    while not env.step(0)[2]:
        pass
    with pytest.raises(ResetNeeded):
        env.step(0)
    with pytest.raises(TypeError, match="num_envs belongs to VisualMatchVectorEnv"):
        VisualMatchEnv(num_envs=2)
