"""``thalweg optim list`` and ``explain``: complete, and equal to the page of the documentation."""

import typing
from pathlib import Path

import pytest

from thalweg.apps import optim_catalog as catalog
from thalweg.apps.cli import main
from thalweg.core_optim import registry
from thalweg.core_optim.config import ScheduleConfig
from thalweg.core_optim.schedules import factor

PAGE = Path(__file__).parents[2] / "docs" / "core_optim.md"


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["optim", *words])
    return capsys.readouterr().out


def test_list_names_all_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "list").splitlines()
    first = [line.split()[0] for line in lines if line.strip()]
    assert set(first) >= {*registry.RULES, *catalog.WRAPPERS, *catalog.SCHEDULES}


@pytest.mark.parametrize("name", registry.RULES)
def test_explanation_of_a_rule_is_complete(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rule = registry.rule(name)
    out = shown(capsys, "explain", name)
    assert all((rule.title, rule.summary, rule.source, rule.equations, rule.state_size))
    assert all(line.strip() in out for line in rule.equations.splitlines())
    assert out.startswith(f"{rule.title} ({name}): {rule.summary}\nsource: {rule.source}\n")
    words = out.split()
    assert all(option in words for option in rule.options)
    assert all(state in words for state, *_ in catalog.states(rule))


@pytest.mark.parametrize("name", catalog.WRAPPERS)
def test_explanation_of_a_wrapper_is_complete(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "explain", name)
    assert catalog.WRAPPERS[name].source in out
    assert catalog.WRAPPERS[name].load().__name__ in out
    assert catalog.WRAPPERS[name].about().splitlines()[0] in out


@pytest.mark.parametrize("word", ["AdamW", "adamw", "ADAMW"])
def test_the_class_is_a_name_too(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "explain", word).startswith("AdamW (adamw)")


def test_brackets_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    assert "[u g > 0]" in shown(capsys, "explain", "cadamw")
    assert "two numbers in [0, 1)" in shown(capsys, "explain", "cadamw")


def test_schedules_are_those_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(catalog.SCHEDULES) == set(typing.get_args(typing.get_type_hints(ScheduleConfig)["name"]))
    out = shown(capsys, "explain", "cyclic")
    assert "cycle_rise" in out
    assert "decay_ratio" not in out


@pytest.mark.parametrize("name", ["cosine", "linear", "linear-to-zero", "one-minus-sqrt", "power"])
def test_formula_of_a_schedule_is_its_code(name: str) -> None:
    import math

    final = 0.0 if name == "linear-to-zero" else 0.1
    config = ScheduleConfig(name=name, final_ratio=final)  # type: ignore[arg-type]
    formula = catalog.SCHEDULES[name][0].replace("^", "**").replace(") (", ") * (").replace("pi s", "pi * s")
    for step in range(9):
        known = {"f": final, "s": step / 8, "power": 2.0, **vars(math)}
        assert eval(formula, known) == pytest.approx(factor(config, step, 8))


def test_sizes_in_the_table_are_those_of_the_states() -> None:
    numbers = {entry.name: entry.state for entry in catalog.rules()}
    for name in ("adamw", "diffgrad", "lion", "nadamw", "adabelief", "adamp"):
        total = sum(share for *_, share in catalog.states(registry.rule(name)))
        assert total == pytest.approx(float(numbers[name].split()[0]))


def test_page_has_the_table_of_the_registry() -> None:
    table = catalog.markdown()
    assert table in PAGE.read_text(), "replace the table by the output of: thalweg optim list --markdown"
    for name, (formula, _, _) in catalog.SCHEDULES.items():
        assert f"| `{name}` | {formula} |" in PAGE.read_text()


def test_markdown_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "list", "--markdown").strip() == catalog.markdown()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["explain", "adamv"],
            "optimizer 'adamv' is unknown. Did you mean adamw.*Known: .*inverse-sqrt",
        ),
        (["explain", "invers-sqrt"], "Did you mean inverse-sqrt"),
        (["expain", "adamw"], "Did you mean explain"),
        (["explain"], "name"),
    ],
)
def test_user_errors_offer_what_is_near(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["optim", *words])
