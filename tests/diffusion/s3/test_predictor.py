"""The predictor of schedule quality: what it reads, which pairs it learns from, and how well it ranks."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from random_schedules import random_schedule
from torch.utils.data import DataLoader

from thalweg.core_optim.config import OptimConfig
from thalweg.diffusion.s3.module import PredictorModule
from thalweg.diffusion.s3.predictor import (
    Ensemble,
    FitConfig,
    fit,
    fit_tokens,
    kendall_tau,
    make_ranker,
    targets,
    training_data,
)
from thalweg.diffusion.s3.ranker import hinge_loss, usable_pairs
from thalweg.diffusion.s3.tokens import feature_names, pad, token_batch, tokens
from thalweg.diffusion.schedules import Flow, VPLinear
from thalweg.diffusion.solvers.schedule import Derivative, Node, Scale, SolverSchedule, Step

QUICK = FitConfig(members=2, hidden=8, layers=1, steps=5)


def drawn(count: int, seed: int = 0) -> list[SolverSchedule]:
    """Random schedules with 5 to 8 evaluations."""
    rng = np.random.default_rng(seed)
    return [random_schedule(VPLinear(), 5 + i % 4, rng) for i in range(count)]


def quality(schedule: SolverSchedule) -> float:
    """A made-up score that decisions tell: long steps are bad, and more so at first order."""
    steps = zip(schedule.steps[:-1], schedule.nodes[:-1], schedule.nodes[1:-1])
    return sum((b.lam - a.lam) ** 2 * (2.0 if step.order == 1 else 1.0) for step, a, b in steps)


def amplification(schedule: SolverSchedule) -> float:
    """A made-up score that weights tell: long steps are bad, and more so with large weights."""
    found = dict(zip(feature_names(), tokens(schedule)[:-1].T, strict=True))
    return float(sum(found["h"] ** 2 * np.abs(found[f"weight_{lag}"]) for lag in range(4)).sum())


@pytest.fixture(scope="module")
def schedules() -> list[SolverSchedule]:
    return drawn(40)


@pytest.fixture(scope="module")
def fitted(schedules: list[SolverSchedule]) -> Ensemble:
    return fit(schedules, [quality(s) for s in schedules], config=QUICK)


@pytest.mark.parametrize(("decisions", "score"), [(False, amplification), (True, quality)])
def test_held_out_schedules_are_ranked(decisions: bool, score: Callable[[SolverSchedule], float]) -> None:
    known, new = drawn(200, seed=1), drawn(120, seed=2)
    ensemble = fit(known, [score(s) for s in known], config=FitConfig(decisions=decisions, steps=150))
    predicted, spread = ensemble.predict(new)
    truth = np.log([score(s) for s in new])
    assert kendall_tau(predicted, truth) > 0.8
    assert np.abs(predicted - truth).mean() < 0.25 * np.std(truth)
    assert (spread > 0).all()


def test_features_have_names_and_are_finite(schedules: list[SolverSchedule]) -> None:
    for decisions in (False, True):
        features, mask = token_batch(schedules, decisions=decisions)
        assert features.shape == (40, 8, len(feature_names(decisions)))
        assert np.isfinite(features).all()
        assert mask.sum(1).tolist() == [len(s.steps) for s in schedules]
        assert (features[~mask] == 0).all()


def test_features_say_what_a_step_does() -> None:
    lam = (-2.0, -1.0, 0.0, 1.5)
    nodes = [Node(alpha=1 / math.hypot(1, math.exp(-v)), sigma=1 / math.hypot(1, math.exp(v))) for v in lam]
    first = Derivative(k=1, nodes=(1,), scale=Scale(kind="bh1"))
    steps = (
        Step(start=0, prediction="noise", order=1),
        Step(start=0, prediction="data", order=1),
        Step(start=2, prediction="data", order=2, derivatives=(first,)),
    )
    schedule = SolverSchedule(nodes=tuple(nodes), steps=steps)
    found = dict(zip(feature_names(True), tokens(schedule, decisions=True).T, strict=True))
    np.testing.assert_allclose(found["lam"], lam[:-1], atol=1e-12)
    np.testing.assert_allclose(found["h"], np.diff(lam), atol=1e-12)
    np.testing.assert_allclose(found["sigma"], [n.sigma for n in nodes[:-1]])
    np.testing.assert_allclose(found["last_sigma"], nodes[-1].sigma)
    assert found["prediction_noise"].tolist() == [1, 0, 0]
    assert found["order_2"].tolist() == [0, 0, 1]
    assert found["active"].tolist() == [0, 0, 1]
    assert found["start_distance"].tolist() == [0, 1, 0]
    assert found["scale_c"].tolist() == [0, 0, 1 / 3]  # z is -h for data prediction
    assert found["nfe"].tolist() == [3, 3, 3]
    shares = sum(found[f"weight_{lag}"] for lag in range(4))
    np.testing.assert_allclose(shares, 1, atol=1e-12)


def test_equal_coefficients_have_equal_features() -> None:
    noise, data = (
        SolverSchedule(
            nodes=(Node(alpha=0.2, sigma=0.8), Node(alpha=0.7, sigma=0.3)),
            steps=(Step(start=0, prediction=kind, order=1),),
        )
        for kind in ("noise", "data")
    )
    np.testing.assert_allclose(tokens(noise), tokens(data), atol=1e-12)
    assert not np.allclose(tokens(noise, decisions=True), tokens(data, decisions=True))


def test_pure_noise_and_pure_data_have_finite_features() -> None:
    flow = Flow()
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no schedules"):
        token_batch([])
    times = (1.0, *np.sort(rng.uniform(0.1, 0.9, 3))[::-1], 0.0)
    nodes = tuple(Node(alpha=float(flow.alpha(t)), sigma=float(flow.sigma(t))) for t in times)
    steps = tuple(Step(start=i, prediction="data", order=1) for i in range(4))
    assert np.isfinite(tokens(SolverSchedule(nodes=nodes, steps=steps), decisions=True)).all()


def test_padding_changes_nothing(fitted: Ensemble, schedules: list[SolverSchedule]) -> None:
    sequences = [tokens(s) for s in schedules]
    close, wide = (fitted.predict_tokens(*pad(sequences, n)) for n in (None, 13))
    alone = [fitted.predict([s])[0][0] for s in schedules]
    features, mask = pad(sequences, 13)
    features[~mask] = 1e6
    junk = fitted.predict_tokens(features, mask)[0]
    for other in (wide[0], alone, junk):
        np.testing.assert_allclose(other, close[0], atol=1e-5)
    np.testing.assert_allclose(wide[1], close[1], atol=1e-5)
    with pytest.raises(ValueError, match="has 8 steps, allowed: 7"):
        pad(sequences, 7)


def test_pairs_follow_a_permutation_of_the_schedules() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, noise = torch.rand(2, 30, generator=generator)
    order = torch.randperm(30, generator=generator)
    pairs = usable_pairs(scores, 0.2 * noise)
    assert torch.equal(usable_pairs(scores[order], 0.2 * noise[order]), pairs[order][:, order])
    assert not (pairs & pairs.T).any()
    assert pairs.any()


def test_noise_makes_ties() -> None:
    scores, noise = torch.tensor([1.0, 1.1, 2.0, torch.inf, torch.inf]), torch.full((5,), 0.1)
    assert usable_pairs(scores, 0 * noise).sum() == 9
    pairs = usable_pairs(scores, noise)
    assert not pairs[0, 1]
    assert pairs[0, 2]
    assert pairs[2, 3]
    assert not pairs[3, 4]
    assert not pairs[4, 3]
    assert not usable_pairs(scores, noise, threshold=100.0)[:3, :3].any()


def test_hinge_loss_by_hand() -> None:
    pairs = usable_pairs(torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3))  # 0 beats 1 and 2
    predicted = torch.tensor([[0.0, 0.25, 3.0], [0.0, -1.0, 3.0]])
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 0.0]])
    torch.testing.assert_close(hinge_loss(predicted, pairs, weights), torch.tensor([0.375, 2.0]))


def test_targets_are_logarithms() -> None:
    values, sd = targets([1.0, math.e, math.inf], [0.1, 0.2, math.nan])
    assert values.tolist() == [0, 1, math.inf]
    np.testing.assert_allclose(sd, [0.1, 0.2 / math.e, 0])
    assert targets([-1.0, 2.0], log=False)[0].tolist() == [-1, 2]


@pytest.mark.parametrize(
    ("scores", "noise", "message"),
    [
        ([1.0, 2.0, math.nan], 0.0, "without nan"),
        ([1.0, 2.0, 0.0], 0.0, "must be positive .* found 0.0; set log=False"),
        ([1.0, 2.0, 3.0], -1.0, "noise must be finite and 0 or more"),
        ([1.0, 2.0], 0.0, "2 scores for 3 schedules"),
        ([1.0, 1.1, 1.2], 1.0, "no two of 3 scores differ"),
        ([math.inf] * 3, 0.0, "no two of 3 scores differ"),
    ],
)
def test_bad_scores_are_refused(scores: list[float], noise: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(drawn(3), scores, noise, QUICK)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="members is 0, allowed: 1 or more"):
        FitConfig(members=0)
    with pytest.raises(ValueError, match="threshold is -1"):
        FitConfig(threshold=-1)


def test_failures_rank_last(schedules: list[SolverSchedule]) -> None:
    scores = np.array([quality(s) for s in schedules])
    bad = np.array([s.nfe == 5 for s in schedules])
    scores[bad] = math.inf
    predicted = fit(schedules, scores, config=FitConfig(steps=60, hidden=16, layers=1)).predict(schedules)[0]
    assert np.isfinite(predicted).all()
    assert predicted[bad].min() > np.median(predicted[~bad])


def test_the_seed_decides(schedules: list[SolverSchedule], fitted: Ensemble) -> None:
    scores = [quality(s) for s in schedules]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = fit(schedules, scores, config=QUICK)
    assert torch.equal(before, torch.get_rng_state())
    other = fit(schedules, scores, config=FitConfig(members=2, hidden=8, layers=1, steps=5, seed=1))
    first, second, third = (e.predict(schedules)[0] for e in (fitted, again, other))
    assert np.array_equal(first, second)
    assert not np.allclose(first, third)


def test_members_learn_apart(schedules: list[SolverSchedule]) -> None:
    """Their gradients do not mix: a member whose data vanish stays where it began, up to weight decay."""
    features, mask = token_batch(schedules)
    data, _, _ = training_data(features, mask, [quality(s) for s in schedules], 0.0, QUICK)
    ranker = make_ranker(QUICK)
    predicted = ranker(data["tokens"], data["mask"])
    hinge = hinge_loss(predicted, usable_pairs(data["scores"], data["noise"]), data["weights"].T)
    hinge[0].backward()
    for parameter in ranker.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[1].any()
    assert data["weights"].sum(0).tolist() == [40, 40]  # one draw per schedule and member
    assert not torch.equal(data["weights"][:, 0], data["weights"][:, 1])


def test_saved_and_loaded_predictors_agree(
    fitted: Ensemble,
    schedules: list[SolverSchedule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    path = tmp_path / "predictor.safetensors"
    fitted.save(path)
    loaded = Ensemble.load(path)
    assert loaded.config == fitted.config
    for found, expected in zip(loaded.predict(schedules), fitted.predict(schedules), strict=True):
        assert np.array_equal(found, expected)


def test_a_file_of_something_else_is_refused(tmp_path: Path, fitted: Ensemble) -> None:
    from thalweg.checkpoints.tensors import read_metadata, save

    save({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no predictor: its header lacks center, config"):
        Ensemble.load(tmp_path / "other.safetensors")
    fitted.save(tmp_path / "p.safetensors")
    header = read_metadata(tmp_path / "p.safetensors") | {"features": ["lam"]}
    save(fitted.ranker.state_dict(), tmp_path / "q.safetensors", header)
    with pytest.raises(ValueError, match=r"made for the features \['lam'\]"):
        Ensemble.load(tmp_path / "q.safetensors")


def test_lightning_trains_the_same_network(schedules: list[SolverSchedule], tmp_path: Path) -> None:
    config = FitConfig(members=2, hidden=8, layers=1)
    features, mask = token_batch(schedules)
    data, _, _ = training_data(features, mask, [quality(s) for s in schedules], 0.0, config)
    ranker = make_ranker(config)
    ranker.standardise_by(data["tokens"], data["mask"])
    rows = [{name: values[i] for name, values in data.items()} for i in range(len(schedules))]
    module = PredictorModule(ranker, OptimConfig(lr=3e-2), config)
    loader = DataLoader(rows, batch_size=40)
    trainer = L.Trainer(
        max_epochs=60,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    before = trainer.validate(module, loader, verbose=False)[0]["val/tau"]
    trainer.fit(module, loader, loader)
    after = trainer.validate(module, loader, verbose=False)[0]["val/tau"]
    assert after > max(0.7, before + 0.3)


def test_features_alone_are_enough(schedules: list[SolverSchedule], fitted: Ensemble) -> None:
    features, mask = token_batch(schedules)
    scores = [quality(s) for s in schedules]
    found = fit_tokens(features, mask, scores, 0.0, QUICK).predict_tokens(features, mask)
    np.testing.assert_array_equal(found[0], fitted.predict(schedules)[0])
