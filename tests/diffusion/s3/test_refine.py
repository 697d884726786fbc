"""Gradient refinement: what holds whatever the numbers are, and that errors fall."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import golden_files
from solver_runs import golden
from torch import Tensor

from thalweg.diffusion.s3.descent import Settings, freeze, rollout
from thalweg.diffusion.s3.examples import Examples, distances, evaluate
from thalweg.diffusion.s3.parameters import Parameters, family_of
from thalweg.diffusion.s3.refine import refine
from thalweg.diffusion.schedules import VE, Flow, NoiseSchedule, VPCosine, VPDiscrete, VPLinear
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.linear import LinearSchedule, totals
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, SolverSchedule, Step
from thalweg.diffusion.solvers.scheduler import SearchedScheduler
from thalweg.diffusion.solvers.v3 import V3
from thalweg.diffusion.toy import GaussianMixture, exact_states

NOISES = [VPLinear(), VPCosine(), VPDiscrete(), VE(), Flow(shift=3.0)]
QUICK = Settings(iterations=60, learning_rates=(0.02,), evaluate_every=5)


def start(noise: NoiseSchedule, count: int = 5, order: int = 2) -> SolverSchedule:
    grid = "uniform_t" if noise.kind == "flow" else "karras"
    return named("adams", nodes(noise, count, grid), order=order, prediction="data")  # type: ignore[return-value]


def gaussian(x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    """Data prediction of a Gaussian with mean 0.5 and a variance of its own in each dimension."""
    variance = torch.linspace(0.05, 0.5, x.shape[1], dtype=x.dtype)
    return 0.5 + variance * alpha / (variance * alpha**2 + sigma**2) * (x - 0.5 * alpha)


def gaussian_examples(noise: NoiseSchedule, count: int, seed: int) -> Examples:
    """Exact: x / sqrt(variance of x) about its mean stays."""
    node = nodes(noise, 3, "uniform_t")[0]
    variance = torch.linspace(0.05, 0.5, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = node.sigma * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    scale = (variance / (node.alpha**2 * variance + node.sigma**2)).sqrt()
    return Examples(x_T=x, target=0.5 + scale * (x - 0.5 * node.alpha))


def shaken(noise: NoiseSchedule, **options: bool) -> Parameters:
    """Parameters far from where they began."""
    parameters = Parameters(start(noise), noise, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters.parameters():
            if p.requires_grad:
                p += 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return parameters


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.kind)
def test_at_first_the_parameters_are_the_start(noise: NoiseSchedule) -> None:
    begin = start(noise)
    parameters = Parameters(begin, noise)
    found = freeze(parameters)
    assert found is not None
    np.testing.assert_allclose([n.sigma for n in found.nodes], [n.sigma for n in begin.nodes], rtol=1e-9)
    np.testing.assert_allclose(found.compile().C_pred, begin.compile().C_pred, atol=1e-8)
    labels = parameters.labels()
    assert labels is not None
    np.testing.assert_allclose(labels.detach(), [n.label for n in begin.nodes[:-1]], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        [n.label for n in found.nodes[:-1]], [n.label for n in begin.nodes[:-1]], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.kind)
def test_any_parameters_are_a_schedule_with_the_right_sums(noise: NoiseSchedule) -> None:
    parameters = shaken(noise, free_start=noise.kind != "flow", offsets=True)
    found = freeze(parameters)
    assert found is not None
    assert np.all(np.diff([n.lam for n in found.nodes]) > 0)
    assert np.all(np.diff([n.t for n in found.nodes]) < 0)
    np.testing.assert_allclose([sum(row) for row in found.weights], totals(found.nodes), atol=1e-12)
    alpha, sigma = (a.detach() for a in parameters.levels())
    for row, frozen in zip(parameters.weights(alpha, sigma), found.weights, strict=True):
        np.testing.assert_allclose(row.detach(), frozen, atol=1e-9)
    assert found.nodes[-1] == start(noise).nodes[-1]
    assert found.nodes[-2].t >= noise.t_end * (1 - 1e-9)  # type: ignore[operator]


def test_fixed_ends_stay() -> None:
    noise = VPLinear()
    kept = nodes(noise, 5, "uniform_t", end="keep")
    parameters = Parameters(named("adams", kept, order=2, prediction="data"), noise)
    with torch.no_grad():
        parameters.logits += torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0])
    found = freeze(parameters)
    assert found is not None
    for k in (0, -1):
        assert (found.nodes[k].alpha, found.nodes[k].sigma) == pytest.approx((kept[k].alpha, kept[k].sigma))
    assert not parameters.log_range.requires_grad


@pytest.mark.parametrize("recompute", [False, True])
def test_the_rollout_is_the_plain_sampler(recompute: bool) -> None:
    noise = VPLinear()
    parameters, examples = shaken(noise, offsets=True), gaussian_examples(noise, 8, 0)
    schedule = freeze(parameters)
    assert schedule is not None

    def node_data(x: Tensor, node: Node) -> Tensor:
        return gaussian(x, torch.tensor(node.alpha), torch.tensor(node.sigma), None)

    result = rollout(parameters, gaussian, examples, recompute=recompute)
    torch.testing.assert_close(result, sample(schedule, node_data, examples.x_T)[-1], atol=1e-6, rtol=1e-6)


def test_checkpointing_gives_equal_gradients() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
    noise, calls = VPDiscrete(), []

    def denoiser(x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        calls.append(1)
        told = (label / 1000).expand(len(x), 1)
        return network(torch.cat([x / (alpha**2 + sigma**2).sqrt(), told], 1))

    gradients, counts = [], []
    for recompute in (False, True):
        parameters, examples = shaken(noise, offsets=True), gaussian_examples(noise, 8, 0)
        calls.clear()
        result = rollout(parameters, denoiser, examples, recompute=recompute)
        loss = distances(result, examples.target).mean()
        gradients.append(torch.autograd.grad(loss, [p for p in parameters.parameters() if p.requires_grad]))
        counts.append(len(calls))
    assert counts == [5, 10]
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_gradients_are_those_of_differences() -> None:
    noise, examples = VPLinear(), gaussian_examples(VPLinear(), 6, 0)
    parameters = shaken(noise, free_start=True)
    free = [p for p in parameters.parameters() if p.requires_grad]

    def loss() -> Tensor:
        return distances(rollout(parameters, gaussian, examples), examples.target).mean()

    for p, gradient in zip(free, torch.autograd.grad(loss(), free), strict=True):
        values, slopes = p.detach().view(-1), []
        for k in range(len(values)):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    values[k] += step
                    ends.append(float(loss()))
                    values[k] -= step
            slopes.append((ends[0] - ends[1]) / 2e-5)
        np.testing.assert_allclose(gradient.view(-1), slopes, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.kind)
def test_on_a_gaussian_the_error_nearly_goes(noise: NoiseSchedule) -> None:
    train, validation, test = (
        gaussian_examples(noise, count, seed) for seed, count in enumerate((64, 64, 64))
    )
    settings = replace(QUICK, iterations=300, learning_rates=(0.05,))
    begin = start(noise)
    found = refine(begin, gaussian, train, validation, noise_schedule=noise, settings=settings)
    assert evaluate(found.schedule, gaussian, test) < 0.06 * evaluate(begin, gaussian, test)
    assert found.error == evaluate(found.schedule, gaussian, validation)
    assert found.schedule.nfe == 5


def test_the_loss_of_logarithms_goes_nearer_to_nought() -> None:
    noise = Flow(shift=3.0)
    train, validation, test = (gaussian_examples(noise, 64, seed) for seed in range(3))
    settings = Settings(iterations=300, learning_rates=(0.05,), loss="log")
    found = refine(start(noise), gaussian, train, validation, settings=settings)
    assert evaluate(found.schedule, gaussian, test) < 0.005 * found.start_error


def test_the_result_is_decided_by_the_seed_and_runs_in_the_scheduler() -> None:
    noise = VPDiscrete()
    train, validation = gaussian_examples(noise, 32, 0), gaussian_examples(noise, 32, 1)
    settings = replace(QUICK, iterations=20, batch_size=16, jitter=0.01, learning_rates=(0.02, 0.01))
    twice = [
        refine(
            [start(noise), start(noise, order=1)],
            gaussian,
            train,
            validation,
            settings=settings,
            noise_schedule=noise,
        )
        for _ in range(2)
    ]
    assert twice[0].schedule == twice[1].schedule
    assert twice[0].runs == twice[1].runs
    schedule = SolverSchedule.from_dict(twice[0].schedule.to_dict())
    assert schedule == twice[0].schedule
    scheduler = SearchedScheduler.from_schedules([schedule], prediction_type="sample")
    x = validation.x_T
    for label, node in zip(scheduler.timesteps, schedule.nodes):
        x = scheduler.step(
            gaussian(x, torch.tensor(node.alpha), torch.tensor(node.sigma), None), label, x
        ).prev_sample
    assert float(distances(x, validation.target).quantile(0.5)) == pytest.approx(twice[0].error, rel=1e-4)


def test_nothing_worse_than_the_start_is_taken() -> None:
    noise = VPLinear()
    train, validation = gaussian_examples(noise, 16, 0), gaussian_examples(noise, 16, 1)
    train = replace(train, target=train.target + 3.0)  # to learn is to err
    begin = start(noise)
    found = refine(begin, gaussian, train, validation, settings=QUICK)
    assert found.schedule.weights == LinearSchedule.of(begin).weights
    assert found.error == found.start_error


def test_label_offsets_find_what_the_network_was_really_told() -> None:
    """A network whose labels are shifted: x0 of another noise level than the node's."""
    noise = VPLinear()

    def wrong(x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        log_alpha = -(label**2) * (noise.beta_1 - noise.beta_0) / 4 - label * noise.beta_0 / 2
        return gaussian(x, torch.exp(log_alpha), (-torch.expm1(2 * log_alpha)).sqrt(), label)

    train, validation = gaussian_examples(noise, 64, 0), gaussian_examples(noise, 64, 1)
    begin = start(noise, count=3)
    nodes_ = tuple(replace(n, label=n.label and min(1.0, n.label + 0.05)) for n in begin.nodes)
    shifted = replace(begin, nodes=nodes_)
    kept = freeze(Parameters(shifted, noise))
    assert kept is not None
    expected = [n.label for n in nodes_[:-1]]
    np.testing.assert_allclose([n.label for n in kept.nodes[:-1]], expected, atol=1e-4)
    settings = replace(QUICK, offsets=True, iterations=200)
    found = refine(shifted, wrong, train, validation, noise_schedule=noise, settings=settings)
    told = [n.label for n in found.schedule.nodes[:-1]]
    assert found.error < 0.2 * found.start_error
    assert max(abs(a - b) for a, b in zip(told, expected, strict=True)) > 1e-3  # type: ignore[operator]


def test_conditions_go_with_their_starts() -> None:
    noise = VPLinear()
    examples = gaussian_examples(noise, 32, 0)
    condition = torch.linspace(-1, 1, 32, dtype=torch.float64)[:, None]
    examples = replace(examples, target=examples.target + condition, condition=condition)

    def denoiser(x: Tensor, alpha: Tensor, sigma: Tensor, label: None, condition: Tensor) -> Tensor:
        return gaussian(x - alpha * condition, alpha, sigma, label) + condition

    expected = evaluate(start(noise), denoiser, examples)
    assert evaluate(start(noise), denoiser, examples, batch_size=5) == pytest.approx(expected, rel=1e-12)
    settings = replace(QUICK, batch_size=8)
    assert refine(start(noise), denoiser, examples, examples, settings=settings).error < 0.5 * expected


def test_faults_are_named() -> None:
    noise, examples = VPLinear(), gaussian_examples(VPLinear(), 4, 0)
    with pytest.raises(ValueError, match="loss is 'l1', allowed: l2, mse, log"):
        Settings(loss="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iterations is 0, allowed: 1 or more"):
        Settings(iterations=0)
    with pytest.raises(ValueError, match="nothing to refine"):
        refine([], gaussian, examples, examples)
    with pytest.raises(ValueError, match="one shape with at least one"):
        Examples(x_T=examples.x_T, target=examples.target[:2])
    with pytest.raises(ValueError, match="offsets of labels need the noise schedule"):
        Parameters(start(noise), offsets=True)
    with pytest.raises(ValueError, match=r"cannot move; set free_start=False"):
        Parameters(start(Flow()), free_start=True)
    levels = nodes(noise, 3, "karras")
    steps = tuple(Step(start=i, prediction="v3", order=1) for i in range(2))
    tilted = SolverSchedule(nodes=tuple(levels[:3]), steps=steps, v3=V3(l=0.5, s=-0.2))
    with pytest.raises(ValueError, match="sum"):
        Parameters(tilted)
    with pytest.raises(ValueError, match="nodes follow no known rule"):
        family_of([Node(alpha=0.5, sigma=2.0), Node(alpha=0.9, sigma=0.3)])


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["gm16_vp_linear", "gm16_flow"])
def test_on_golden_problems_the_error_is_a_fifth_of_the_best_known_solvers(problem: str) -> None:
    if not golden_files("s3", "search.json"):
        pytest.skip("golden search problems are not there")
    values, arrays = golden("search")
    toy = golden("toy")[1]
    names = ("weights", "means", "covariances")
    mixture = GaussianMixture.from_dict({name: toy[f"mix.gm16.{name}"].numpy() for name in names})
    noise = NoiseSchedule.from_dict(values["problems"][problem]["schedule"])

    def denoiser(x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        return mixture.data(x, alpha, sigma)

    train, test = (
        Examples(x_T=arrays[f"{problem}.{part}_x_T"], target=arrays[f"{problem}.{part}_exact"])
        for part in ("train", "test")
    )
    node = nodes(noise, 1, "uniform_t")
    again = exact_states(mixture, test.x_T[:2], [node[0].alpha, 1.0], [node[0].sigma, 0.0])[-1]
    torch.testing.assert_close(again, test.target[:2], atol=1e-8, rtol=0)
    begin = [
        named("adams", nodes(noise, 5, "quadratic_t", t_end=0.03), order=order, prediction="data")
        for order in (1, 2, 3)
    ]
    found = refine(
        begin, denoiser, train.pick(slice(0, 192)), train.pick(slice(192, 256)), noise_schedule=noise
    )
    bar = values["problems"][problem]["nfe"]["5"]["bar"]["beat_baseline"]
    assert evaluate(found.schedule, denoiser, test) < 0.2 * bar
