"""What benchmarks/best_of.py picks, counts and refuses, on tiny models."""


import pytest
import torch
from helpers import tiny_config, tiny_model, tiny_reward, write_data

from prfl_bench import best_of as bench
from prfl_bench.best_of import ALL, Subject, explore, gate, pick, rows, table
from prfl_engine import chain, flow
from prfl_engine.data import Reader, fixed_batches, read_lists
from prfl_engine.objectives import bind


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    config = tiny_config()
    data = write_data(tmp_path_factory.mktemp("data"), config, 3)
    batch = next(fixed_batches(Reader(config), read_lists([str(data)], "list"), 3, "cpu"))
    schedule = flow.make_schedule("unipc", 4, 1.0)
    subject = Subject(tiny_model(config).eval(), tiny_reward(config).freeze(), schedule, (201, 600), 0)
    return subject, batch, explore(subject, batch, 0, 4, [3, 1])


def test_all_chains_are_finished_and_judged_on_the_way(explored):
    subject, batch, chains = explored
    assert list(chains.judged) == [1, 3, ALL]
    assert chains.latent.shape == (4, *batch.latent.shape)
    for n in (0, 3):
        noise, velocity = subject.noise(batch, 0, n), bind(subject.model, batch)
        assert torch.equal(chain.sample(velocity, subject.schedule, noise), chains.latent[n])
        x = chain.rollout(velocity, subject.schedule, noise, torch.tensor([3] * 3)).x
        with torch.no_grad():
            want = subject.reward(x, subject.schedule.timesteps[[3] * 3], batch.text)
        assert torch.equal(chains.judged[3][n], want)
    assert not torch.equal(chains.judged[ALL], chains.reward)  # under other noise


def test_the_gate(explored, capsys):
    subject, batch, chains = explored
    gate(subject, batch, chains, 1)
    assert "best of 4 at step 1 keeps the same chains, error 0.0e+00" in capsys.readouterr().out
    wrong = {step: -values if step == 1 else values for step, values in chains.judged.items()}
    with pytest.raises(SystemExit, match="gate failed: kept"):
        gate(subject, batch, chains._replace(judged=wrong), 1)
    with pytest.raises(SystemExit, match="gate failed: kept"):
        gate(subject, batch, chains._replace(latent=chains.latent + 1e-3), 1)


def test_a_smaller_number_takes_the_mean_of_its_groups():
    judged = torch.tensor([[0.0, 5], [1, 4], [3, 2], [2, 3]])
    values = torch.tensor([[10.0, 50], [11, 51], [12, 52], [13, 53]])
    assert pick(values, judged, 4).tolist() == [12, 50]
    assert pick(values, judged, 2).tolist() == [(11 + 12) / 2, (50 + 53) / 2]
    assert pick(values, judged, 3).tolist() == [12, 50]  # the fourth makes no group
    assert pick(values, judged, 1).tolist() == values.mean(0).tolist()


def test_the_rows():
    g = torch.Generator().manual_seed(0)
    reward, distance = (torch.rand(4, 9, generator=g) for _ in range(2))
    found = rows({2: -distance, ALL: reward}, reward, distance, [4, 2], 10)
    assert [(r["N"], r["judged"], r["forwards"], r["of_all"]) for r in found] == [
        (1, ALL, 10, 10), (2, 2, 12, 20), (2, ALL, 20, 20), (4, 2, 16, 40), (4, ALL, 40, 40),
    ]  # fmt: skip
    one, _, _, early, whole = found
    assert one["reward"] == pytest.approx(reward.mean().item()) and one["reward_p"] is None
    assert early["distance"] == pytest.approx(distance.min(0).values.mean().item())
    assert whole["reward"] == pytest.approx(reward.max(0).values.mean().item())
    assert whole["reward_p"] < 0.05 < whole["distance_p"]
    lines = list(table(found))
    assert len({len(line) for line in lines}) == 1 and lines[0].split()[:3] == ["N", "judged", "after"]
    assert lines[4].split()[:4] == ["4", "2", "16", "0.40"]


@pytest.mark.parametrize("words, needle", [
    (["--counts", "1"], "--counts: got"),
    (["--counts", "0", "4"], "--counts: got"),
    (["--judge-at", "20"], "--judge-at: got 20, want 1 to 19"),
])  # fmt: skip
def test_mistakes_are_refused_before_anything_is_loaded(words, needle, tmp_path):
    (tmp_path / "prfl").mkdir()
    lines = "model: {path: nowhere}\nrollout: {steps: 20}\ntrain: {device: cpu}\n"
    (tmp_path / "prfl/config.yaml").write_text(lines)
    with pytest.raises((SystemExit, ValueError), match=needle):
        bench.main([str(tmp_path), *words])
