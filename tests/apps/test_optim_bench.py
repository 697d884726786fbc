"""``thalweg bench optim``: the search for a learning rate, the problems, the ladder as a command."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.apps import optim_trial
from thalweg.apps.cli import main
from thalweg.apps.optim_problems import PROBLEMS, Split
from thalweg.apps.optim_report import Row, markdown, mean_ranks, protocol
from thalweg.apps.optim_trial import Archive, Outcome, Trial, make_optimizer
from thalweg.apps.optim_tuning import WIDEST, Point, at_edge, best, next_point

LADDER = ["bench", "optim", "--optimizers=adamw,sgd", "--problems=quadratic,digits-mlp"]
SMALL = ["--budget=3", "--seeds=2", "--length=0.05"]


def search(score: object, decays: tuple[float, ...], budget: int) -> dict[Point, float]:
    found: dict[Point, float] = {}
    while (point := next_point(found, decays, budget)) is not None:
        found[point] = score(point)  # type: ignore[operator]
    return found


@settings(deadline=None)
@given(optimum=st.integers(-WIDEST, WIDEST), cliff=st.integers(-WIDEST, WIDEST), budget=st.integers(1, 20))
def test_search_spends_the_budget_on_different_points(optimum: int, cliff: int, budget: int) -> None:
    def score(at: Point) -> float:
        return math.inf if at[0] > cliff else abs(at[0] - optimum) + at[1]

    found = search(score, (0.0, 0.1), budget)
    assert len(found) == budget or all(math.isinf(score) for score in found.values())
    assert all(abs(k) <= WIDEST for k, _ in found)


@pytest.mark.parametrize("optimum", range(-10, 11))
def test_search_finds_the_best_rate_and_decay(optimum: int) -> None:
    found = search(lambda at: (at[0] - optimum) ** 2 + (at[1] - 0.1) ** 2, (0.0, 0.1), 12)
    assert best(found) == (optimum, 0.1)
    assert not at_edge(found, best(found))


def test_search_flees_from_rates_that_diverge() -> None:
    found = search(lambda at: math.inf if at[0] > -8 else -at[0], (0.0,), 7)
    assert best(found) == (-8, 0.0)
    assert math.isfinite(found[best(found)])


def test_best_rate_at_the_end_of_what_was_tried_is_told() -> None:
    found = search(lambda at: -at[0], (0.0,), 3)
    assert at_edge(found, best(found))


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_seed_determines_a_problem(name: str) -> None:
    one, same, other = (PROBLEMS[name].make(4, seed) for seed in (1, 1, 2))
    assert one.loss(3).item() == same.loss(3).item() != other.loss(3).item()
    assert one.score("test") == same.score("test")
    assert math.isfinite(one.score("valid"))


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_trained_parameter_takes_part(name: str) -> None:
    task = PROBLEMS[name].make(4, 0)
    task.loss(0).backward()
    trained = {n: p for n, p in task.module.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert set(task.rest) < set(trained)


def test_known_optima_score_zero() -> None:
    task = PROBLEMS["rosenbrock"].make(4, 0)
    torch.nn.init.ones_(task.module.weight)  # type: ignore[arg-type]
    assert task.score("test") == 0.0


def test_conjugate_directions_solve_the_quadratic_and_decay_does_not() -> None:
    """The origin, where weight decay leads, is about as bad as the start."""
    task = PROBLEMS["quadratic"].make(4, 0)
    options = {"max_iter": 400, "history_size": 50, "line_search_fn": "strong_wolfe", "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS(task.module.parameters(), **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = task.loss(0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert task.score("test") < 1e-4
    torch.nn.init.zeros_(task.module.weight)  # type: ignore[arg-type]
    assert task.score("test") > 0.2


def test_validation_and_test_data_differ() -> None:
    task = PROBLEMS["digits-mlp"].make(4, 0)
    assert task.score("valid") != task.score("test")


def test_least_squares_has_almost_no_excess_risk() -> None:
    """The score of the regression is the risk above the best possible one, not the loss with its noise."""
    task = PROBLEMS["regression"].make(32, 0)
    optimizer = torch.optim.LBFGS(task.module.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.stack([task.loss(step) for step in range(32)]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert task.score("test") < 0.03


def test_what_a_rule_does_not_take_is_stepped_by_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim_trial, "HIDDEN_ONLY", ("lion",))
    task = PROBLEMS["digits-mlp"].make(4, 0)
    optimizer = make_optimizer(Trial("digits-mlp", "lion", 4, 0.1, 0, 4, "valid"), task)
    hidden, rest = optimizer.param_groups
    assert (hidden["rule"], hidden["lr"], len(hidden["params"])) == ("lion", pytest.approx(1e-3), 4)
    assert (rest["rule"], rest["lr"], len(rest["params"])) == ("adamw", pytest.approx(1e-2), 2)
    assert hidden["weight_decay"] == rest["weight_decay"] == 0.1


def outcome(optimizer: str, problem: str, score: float | None) -> Outcome:
    return Outcome(Trial(problem, optimizer, 0, 0.0, 1, 4, "test"), score, 1.0, 1.0, 8, 4)


def row(optimizer: str, problem: str, *scores: float | None) -> Row:
    outcomes = [outcome(optimizer, problem, score) for score in scores]
    return Row(problem, optimizer, 1e-3, 0.0, True, 0, [], outcomes)


def test_ranks_are_means_over_problems_and_ties_share() -> None:
    rows = [
        *(row("a", "quadratic", 1.0), row("b", "quadratic", 2.0), row("c", "quadratic", 2.0)),
        *(row("a", "lora", 3.0), row("b", "lora", 1.0), row("c", "lora", None)),
    ]
    assert mean_ranks(rows) == {"a": 1.5, "b": 1.75, "c": 2.75}


def test_table_marks_best_and_edges_and_says_what_was_tuned() -> None:
    rows = [row("a", "quadratic", 1.0, 3.0), row("b", "quadratic", None, 1.0)]
    text = markdown(rows, protocol(7, 2, 1.0))
    assert "| a | 1.0 | **2^** |" in text
    assert "| b | 2.0 | inf^ |" in text
    assert "over the same 7 runs: the learning rate and the weight decay" in text


def test_ladder_is_written_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*LADDER, *SMALL, f"--out={tmp_path}"]
    main(words)
    first = json.loads((tmp_path / "results.json").read_text())
    assert [(r["problem"], r["optimizer"]) for r in first["rows"]] == [
        (problem, optimizer) for problem in ("quadratic", "digits-mlp") for optimizer in ("adamw", "sgd")
    ]
    assert all(len(r["tuning"]) == 3 and len(r["scores"]) == 2 for r in first["rows"])
    assert all(
        (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("scores", "tuning")
    )
    assert "| adamw |" in (tmp_path / "table.md").read_text()
    assert "Tuned for each optimizer" in capsys.readouterr().out

    trials = tmp_path / "trials" / "quadratic.jsonl"
    lines = trials.read_text().splitlines(keepends=True)
    trials.write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    calls = []
    run = optim_trial.run
    monkeypatch.setattr(optim_trial, "run", lambda problem, trial: calls.append(trial) or run(problem, trial))
    main([*words, "--no-plots"])
    assert [(trial.problem, trial.optimizer) for trial in calls] == [("quadratic", "sgd")]
    again = json.loads((tmp_path / "results.json").read_text())
    assert [r["scores"] for r in again["rows"]] == [r["scores"] for r in first["rows"]]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_run_that_diverges_is_kept_as_such(split: Split, tmp_path: Path) -> None:
    trial = Trial("rosenbrock", "sgd", 12, 0.0, 0, 20, split)
    assert Archive(tmp_path).get(PROBLEMS["rosenbrock"], trial).value == math.inf
    assert Archive(tmp_path).found[trial].score is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizers=adamv"], "optimizer 'adamv' is unknown. Did you mean adamw.*Allowed: all, .*lion"),
        (["--problems=rosenbrok"], "problem 'rosenbrok' is unknown. Did you mean rosenbrock.*mnist-cnn"),
        (["--optimizers=,"], "no optimizer is given, allowed: all, "),
        (["--budget=0"], "budget is 0, allowed: an integer >= 1"),
        (["--seeds=-1"], "seeds is -1, allowed: an integer >= 1"),
        (["--length=0"], r"length is 0\.0, allowed: a number > 0"),
    ],
)
def test_user_errors_name_what_is_allowed(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["bench", "optim", *words, f"--out={tmp_path}"])
