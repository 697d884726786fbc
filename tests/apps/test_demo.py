"""The demo: its plan, its scheduling, and (slow) the whole of it at the smallest sizes."""

import json
from pathlib import Path

import pytest

from thalweg.apps.demo import MODELS, Plan, Step, demo, keep_plan, plan_steps, run_steps


def step(folder: Path, name: str, *argv: str, needs: tuple[str, ...] = ()) -> Step:
    return Step(name=name, argv=argv, done=folder / f"{name}.json", needs=needs)


def test_steps_need_only_steps_of_the_plan_and_nothing_waits_for_ever() -> None:
    steps = plan_steps(Path("out"), Plan())
    names = [s.name for s in steps]
    assert len(set(names)) == len(names)
    made: set[str] = set()
    while len(made) < len(steps):
        ready = {s.name for s in steps if s.name not in made and made.issuperset(s.needs)}
        assert ready
        made |= ready


def test_every_model_learns_from_every_number_of_trajectories_with_equal_steps() -> None:
    plan = Plan(steps=7)
    fits = {s.name: s.argv for s in plan_steps(Path("out"), plan) if s.argv[0] == "fit"}
    for model in MODELS:
        for count in plan.trajectories:
            argv = fits[f"fit_{model}_{count}"]
            assert f"--data.init_args.num_trajectories={count}" in argv
            assert "--trainer.max_steps=7" in argv


def test_a_step_starts_after_what_it_needs_and_is_not_run_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = step(tmp_path, "late", "apps", "poseidon", needs=("early",))
    early = step(tmp_path, "early", "apps")
    run_steps([late, early], tmp_path, cores=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "$ thalweg apps"
    assert lines[1].startswith("  early")
    assert lines[2] == "$ thalweg apps poseidon"
    assert json.loads(late.done.read_text())["argv"] == ["apps", "poseidon"]
    assert "poseidon" in (tmp_path / "early.log").read_text()
    run_steps([late, early], tmp_path, cores=2)
    assert capsys.readouterr().out == ""


def test_a_failing_step_names_its_log_and_what_it_said(tmp_path: Path) -> None:
    bad = step(tmp_path, "bad", "data", "info", str(tmp_path / "missing.nc"))
    with pytest.raises(ValueError, match=r"bad failed, see .*bad\.log:\n(.|\n)*missing\.nc"):
        run_steps([bad], tmp_path, cores=1)
    assert not bad.done.exists()


def test_other_sizes_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "steps" / "plan.json"
    path.parent.mkdir()
    keep_plan(Plan(), path)
    keep_plan(Plan(), path)
    with pytest.raises(ValueError, match=r"steps=300 \(now 5\); add --fresh"):
        keep_plan(Plan(steps=5), path)


@pytest.mark.slow
def test_the_whole_demo_at_small_sizes(tmp_path: Path) -> None:
    plan = Plan(
        resolution=16,
        pretraining=4,
        downstream=6,
        val=1,
        test=2,
        trajectories=(1, 3),
        pretraining_steps=4,
        steps=3,
        digits_epochs=1,
        online_epochs=1,
        judged=12,
        nfe=(3,),
        schedules=10,
        fitted=6,
    )
    demo(str(tmp_path), plan=plan)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") >= 8
    assert 'src="data:image/png;base64,' in page
    errors = json.loads((tmp_path / "summary.json").read_text())["median_relative_l1_error_percent"]
    assert set(errors) == set(MODELS)
    assert all(0 < error < 1000 for by in errors.values() for error in by.values())
