"""``thalweg gains`` from files to table, JSON and picture."""

import json
from pathlib import Path

import pytest

from thalweg.apps.cli import main


@pytest.fixture
def curves(tmp_path: Path) -> Path:
    tables = {"fno": ([16, 64, 256], [2, 1, 0.5]), "poseidon": ([16, 64, 256], [0.5, 0.25, 0.125])}
    for name, (trajectories, error) in tables.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"trajectories": trajectories, "error": error}))
    return tmp_path


def test_gains_are_written_and_drawn(curves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--curve.{name}={curves / name}.json" for name in ("poseidon", "fno")]
    main(["gains", *words, "--ag_at=64", f"--out={curves / 'out'}"])
    report = json.loads((curves / "out" / "gains.json").read_text())
    poseidon, fno = report["gains"]
    assert (poseidon["accuracy_gain"], report["ag_samples"]) == (pytest.approx(4), 64)
    assert (poseidon["efficiency_gain"], report["eg_samples"]) == (pytest.approx(16), 256)
    assert poseidon["power_law"]["exponent"] == pytest.approx(0.5)
    assert fno["accuracy_gain"] == pytest.approx(1)
    assert (curves / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "poseidon" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--curve.poseidon={}/poseidon.json"], "the reference 'fno' has no curve"),
        (["--curve.fno={}/fno.json", "--ag_at=4096"], "covers 16 to 256 samples, not 4096"),
        ([], "curve"),
    ],
)
def test_user_errors_are_one_line(curves: Path, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["gains", *(word.format(curves) for word in words)])
