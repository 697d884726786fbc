"""The command line answers fast, names what is wrong in one line, and expands our own options."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from thalweg.apps import cli, trainer_cli
from thalweg.apps.errors import explain


def fails(argv: list[str]) -> str:
    """Message of a command that must fail with one line."""
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    message = str(caught.value.code)
    assert message.startswith("error: ")
    return message


def test_help_takes_less_than_a_second_and_lists_every_verb() -> None:
    command = [sys.executable, "-m", "thalweg.apps", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    for verb in (*cli.TRAINER, *cli.VERBS):
        assert f"  {verb} " in out.stdout
    assert seconds < 1.0


@pytest.mark.parametrize("verb", [v for v, (target, _) in cli.VERBS.items() if isinstance(target, str)])
def test_every_verb_explains_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code in (0, None)
    text = capsys.readouterr().out
    assert f"thalweg {verb}" in text
    assert "(type: " in text


@pytest.mark.parametrize("sub", cli.VERBS["data"][0])
def test_every_data_verb_explains_its_options(sub: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data", sub, "--help"])
    assert f"thalweg data {sub}" in capsys.readouterr().out


def test_mistyped_commands_name_the_near_match() -> None:
    assert "unknown command 'fti'. Did you mean fit?" in fails(["fti"])
    assert "Did you mean generate?" in fails(["data", "genrate"])
    assert "Did you mean poseidon?" in fails(["fit", "--app", "posedon"])
    assert "Shipped ones: " in fails(["fit", "--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--model.init_args.optim.weigth_decay=1", "Did you mean weight_decay"),
        ("--data.init_args.batchsize=3", "Did you mean batch_size"),
        ("--trainer.max_stps=3", "Did you mean max_steps"),
        ("--modle=foo", "Did you mean model"),
        ("--data.init_args.batch_size=many", "many"),
    ],
)
def test_a_typo_in_a_config_names_the_near_match(flag: str, expected: str) -> None:
    message = fails(["fit", "--app", "poseidon", flag])
    assert expected in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data", "generate", "ACE", "--resolutoin=8"], "Did you mean resolution?"),
        (["evaluate", "--ckpt=a", "--dataset=b", "--wieghts=raw"], "Did you mean weights?"),
    ],
)
def test_a_typo_in_a_verbs_option_names_the_near_match(words: list[str], expected: str) -> None:
    assert expected in fails(words)


def test_switches_need_no_value() -> None:
    defaults = {"plots": True, "overwrite": False, "limit": None}
    argv = ["--plots", "x", "--no-overwrite", "--no_plots", "--plots", "false", "--plots=true", "--limit"]
    expected = ["--plots=true", "x", "--overwrite=false", "--plots=false", *argv[4:]]
    assert cli.spell_out_switches(argv, defaults) == expected
    assert cli.spell_out_switches([], defaults) == []


def test_switches_reach_the_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "generate", "Poisson-Gauss", f"--out={tmp_path}", "--samples=3", "--resolution=16"]
    command = [*words, "--no-progress"]
    cli.main(command)
    assert capsys.readouterr().err == ""
    fails([*command, "--seed=1"])
    cli.main([*command, "--seed=1", "--overwrite"])


@pytest.mark.parametrize("words", [["--help"], ["data", "list"], ["apps", "poseidon"]])
def test_a_reader_that_leaves_early_gets_no_traceback(words: list[str]) -> None:
    command = [sys.executable, "-m", "thalweg.apps", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (1, 141)


@pytest.mark.parametrize("words", [["apps"], ["data", "list"], ["data", "generate", "ACE"], ["fit"]])
def test_ctrl_c_is_one_line_and_status_130(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("load", "pick_subverb"):
        monkeypatch.setattr(cli, name, interrupted)
    monkeypatch.setattr(trainer_cli, "expand", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["stopped"]


def test_explain_keeps_the_telling_line_only() -> None:
    noise = (
        "Parser key \"model\":\n  Does not validate\n  Errors:\n    - Expected a <class 'int'>. Got: foo\n"
    )
    assert explain(noise) == "Expected a <class 'int'>. Got: foo"


def test_app_expands_to_its_config_before_other_overlays() -> None:
    words = trainer_cli.expand(
        "fit", ["--config", "trainer/cpu.yaml", "--app", "poseidon", "--trainer.max_steps=1"]
    )
    assert words[0] == "--config"
    assert words[1].endswith("poseidon/tiny.yaml")
    assert words[3].endswith("trainer/cpu.yaml")
    assert words[-1] == "--trainer.max_steps=1"


def test_shipped_configs_are_found_with_and_without_the_folder_name() -> None:
    assert trainer_cli.find_config("configs/trainer/cpu.yaml").samefile(
        trainer_cli.find_config("trainer/cpu.yaml")
    )


def test_resume_uses_the_saved_config_and_the_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        trainer_cli.find_run(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"")
    words = trainer_cli.expand("fit", [f"--resume={tmp_path}", "--trainer.max_steps=9"])
    assert words == [
        *("--config", str(tmp_path / "config.yaml")),
        *("--ckpt_path", str(tmp_path / "checkpoints" / "last.ckpt"), "--trainer.max_steps=9"),
    ]
    with pytest.raises(ValueError, match="not a run folder"):
        trainer_cli.find_run(str(tmp_path / "checkpoints"))


def test_the_last_run_is_the_one_that_wrote_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nothing to resume: no run with a checkpoint under runs/"):
        trainer_cli.find_run("last")
    for when, name in enumerate(("b", "a", "no_run")):
        path = tmp_path / "runs" / name / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (when, when))
        if name != "no_run":
            (tmp_path / "runs" / name / "config.yaml").write_text("{}")
    assert trainer_cli.find_run("last")[1] == Path("runs/a/checkpoints/last.ckpt")
