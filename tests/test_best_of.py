"""`prfl sample --best-of`: which chain is kept, that it is the same as alone, and what it costs."""

import json

import numpy as np
import pytest
import torch
from helpers import one_line, write_run
from training_runs import run

from prfl_engine import chain, flow
from prfl_engine.best_of import best_of
from prfl_engine.cli import main
from prfl_engine.data import Reader, fixed_batches, read_lists
from prfl_engine.model.checkpoint import load_reward, load_transformer
from prfl_engine.model.wan import WanTransformer
from prfl_engine.objectives import bind
from prfl_engine.seeds import Purpose, noise_like

SEEDS, STEPS, AT, COUNT = 3, 5, 2, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Samples of three seeds alone, and the best of them; the batches are of three and one samples."""
    folder = tmp_path_factory.mktemp("best")
    config = write_run(folder, rollout={"steps": STEPS}, sample={"count": COUNT, "seed": 3})
    overrides = ["eval.batch_size=3"]
    for seed in range(3, 3 + SEEDS):
        run("sample", config, f"sample.seed={seed}", *overrides, "--out", str(folder / str(seed)))
    choice = "--best-of", str(SEEDS), "--judge-at", str(AT)
    run("sample", config, *overrides, "--out", str(folder / "best"), *choice)
    metas = [json.loads((folder / f"best/sample-{i:02d}.json").read_text()) for i in range(COUNT)]
    return folder, metas


def test_the_kept_chain_is_that_of_its_seed_to_the_bit(made):
    folder, metas = made
    assert len({meta["seed"] for meta in metas}) > 1  # or the choice would not show
    for i, meta in enumerate(metas):
        names = (folder / f"{where}/sample-{i:02d}.npy" for where in ("best", meta["seed"]))
        np.testing.assert_array_equal(*map(np.load, names))


def test_the_choice_is_by_the_reward_of_the_state_at_that_step(made):
    folder, metas = made
    policy, reward = load_transformer(folder / "policy"), load_reward(folder / "reward").freeze()
    schedule = flow.make_schedule("unipc", STEPS, 5.0)
    paths = read_lists([str(folder / "val/all.list")], "val")
    for i, meta in enumerate(metas):
        batch = next(fixed_batches(Reader(policy.config), [paths[i % 3]], 1, "cpu"))
        want = []
        for seed in range(3, 3 + SEEDS):
            noise = noise_like(batch.latent, Purpose.SAMPLE, seed, i)
            state = chain.rollout(bind(policy, batch), schedule, noise, torch.tensor([AT]))
            with torch.no_grad():
                logit = reward(state.x, schedule.timesteps[[AT]], batch.text)
            want.append(logit.sigmoid().item())
        assert meta["judged"] == {"step": AT, "rewards": pytest.approx(want, rel=1e-4)}
        assert meta["seed"] == 3 + int(np.argmax(want))


@pytest.mark.parametrize("guidance", [1, 5])
def test_the_cost_that_is_printed_is_that_of_the_generator(guidance, made, tmp_path, capsys, monkeypatch):
    folder, _ = made
    counts, forward = [], WanTransformer.forward

    def counted(self, x, *rest):
        counts.append(len(x))
        return forward(self, x, *rest)

    monkeypatch.setattr(WanTransformer, "forward", counted)
    capsys.readouterr()
    run(
        "sample", folder / "config.yaml", f"data.negative_text={folder / 'val/null.npy'}",
        f"sample.guidance={guidance}", "--out", str(tmp_path / "out"), "--best-of", "4", "--judge-at", "1",
    )  # fmt: skip
    each = (1 if guidance == 1 else 2) * (4 + 4)
    assert sum(counts) == COUNT * each
    text = f"best of 4, judged after 1 of 5 steps: {each} forwards of the generator a sample, 0.40 of the "
    assert text in capsys.readouterr().err


def test_the_worst_are_dropped_and_the_rest_is_finished(made, tmp_path, capsys):
    """Two of three, the better one first, each as its seed alone; their cost."""
    folder, best = made
    capsys.readouterr()
    choice = "--best-of", str(SEEDS), "--judge-at", str(AT), "--finish", "2"
    run("sample", folder / "config.yaml", "eval.batch_size=3", "--out", str(tmp_path / "out"), *choice)
    cost = SEEDS * AT + 2 * (STEPS - AT)
    assert f"best 2 of 3, judged after 2 of 5 steps: {cost} forwards of the generator a prompt" in (
        capsys.readouterr().err
    )
    listed = (tmp_path / "out/samples.list").read_text().split()
    assert len(listed) == 2 * COUNT
    for i in range(COUNT):
        pair = [json.loads((tmp_path / f"out/sample-{2 * i + j:02d}.json").read_text()) for j in (0, 1)]
        rewards = pair[0]["judged"]["rewards"]
        assert pair[1]["judged"] == pair[0]["judged"] == best[i]["judged"]
        order = np.argsort(rewards)[::-1]
        assert [meta["seed"] - 3 for meta in pair] == order[:2].tolist()
        assert pair[0]["source"] == pair[1]["source"] == best[i]["source"]
        for j, meta in enumerate(pair):
            alone = np.load(folder / f"{meta['seed']}/sample-{i:02d}.npy")
            np.testing.assert_array_equal(np.load(tmp_path / f"out/sample-{2 * i + j:02d}.npy"), alone)


def _still(x, t, rows):
    """A velocity of zero, which leaves the noise as it is."""
    return torch.zeros_like(x)


def test_of_equal_chains_the_first_are_kept_and_put_first():
    """Every sample of the batch by itself, each with the latent of the chains that are said to be kept."""
    logits = torch.tensor([[5.0, 1, 5, 2, 3], [5, 5, 4, 2, 3], [6, 5, 5, 2, 3], [6, 0, 4, 2, 4]])
    noises = [torch.arange(5.0).view(5, 1, 1, 1, 1) + 10 * n for n in range(4)]
    schedule = flow.make_schedule("unipc", 3, 5.0)
    for finish, want in (
        (1, [[2, 1, 0, 0, 3]]),
        (2, [[2, 1, 0, 0, 3], [3, 2, 2, 1, 0]]),
        (3, [[2, 1, 0, 0, 3], [3, 2, 2, 1, 0], [0, 0, 1, 2, 1]]),
    ):
        best = best_of(_still, schedule, noises, 1, lambda x: logits[round(x[0].item() / 10)], finish)
        assert best.kept.tolist() == want
        assert torch.equal(best.latent.flatten(1).round(), 10.0 * best.kept + torch.arange(5))
        assert torch.equal(best.logits, logits)


@pytest.mark.parametrize("words, needle", [
    (["--finish", "2"], "--finish: got 2, want 1, or fewer than --best-of N"),
    (["--best-of", "2", "--judge-at", "2", "--finish", "2"], "--finish: got 2, want 1, or fewer than"),
    (["--best-of", "2", "--judge-at", "2", "--finish", "0"], "--finish: got 0, want 1, or fewer than"),
    (["--best-of", "0"], "--best-of: got 0, want"),
    (["--best-of", "4"], "--judge-at: got None, want 1 to 4 of the 5 steps"),
    (["--best-of", "4", "--judge-at", "5"], "--judge-at: got 5, want 1 to 4"),
    (["--best-of", "4", "--judge-at", "0"], "--judge-at: got 0, want 1 to 4"),
    (["--judge-at", "2"], "--judge-at: got 2, want none without --best-of"),
    (["reward.path=null", "--best-of", "4", "--judge-at", "2"], "reward.path: got null, want"),
    (["reward.draws=2", "--best-of", "4", "--judge-at", "2"], "reward.draws: got 2, want 1 with --best-of"),
    (["reward.place=host", "model.compile=true", "--best-of", "4", "--judge-at", "2"],
     "model.compile: got True, want false with reward.weights e4m3 or reward.place host"),
])  # fmt: skip
def test_mistakes_are_one_line(words, needle, made, tmp_path, capsys):
    folder, _ = made
    capsys.readouterr()
    assert main(["sample", str(folder / "config.yaml"), "--out", str(tmp_path / "out"), *words]) == 2
    assert needle in one_line(capsys)
    assert not (tmp_path / "out").exists()
