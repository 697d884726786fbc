"""What is sent to the Hub, without one: the files of a scheduler, and of a pipeline with it."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMPipeline
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from pipeline_schedules import STEPS, searched
from tiny_pipelines import build, inputs

from thalweg.diffusion.solvers.scheduler import SearchedScheduler


@dataclass
class FakeHub:
    """Keeps what is uploaded in a folder per repository."""

    root: Path
    calls: list[tuple[str, str]] = field(default_factory=list)

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("create_repo", repo_id))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(
        self, *, repo_id: str, folder_path: str, path_in_repo: str | None, **options: Any
    ) -> str:
        self.calls.append(("upload_folder", options["commit_message"]))
        target = self.root / repo_id / (path_in_repo or "")
        shutil.copytree(folder_path, target, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def files(self, repo_id: str) -> set[str]:
        folder = self.root / repo_id
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub_utils, "create_repo", fake.create_repo)
    monkeypatch.setattr(hub_utils, "upload_folder", fake.upload_folder)
    card = ModelCard("---\nlibrary_name: diffusers\n---\n")
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda repo_id, **_: card)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.load_or_create_model_card", lambda *a, **_: card)
    return fake


def test_a_scheduler_is_pushed_as_one_file_that_others_load(hub: FakeHub, tmp_path: Path) -> None:
    scheduler = searched(build("ddpm", tmp_path).scheduler)
    assert scheduler.push_to_hub("me/schedules") == "https://hub/me/schedules"
    assert hub.calls == [("create_repo", "me/schedules"), ("upload_folder", "Upload scheduler")]
    assert hub.files("me/schedules") == {"scheduler_config.json", "README.md"}
    text = (hub.root / "me/schedules/scheduler_config.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["_class_name"] == "SearchedScheduler"
    back = SearchedScheduler.from_pretrained(hub.root / "me/schedules")
    assert dict(back.schedules) == dict(scheduler.schedules)
    assert back.config.noise_schedule == scheduler.config.noise_schedule


def test_a_scheduler_is_pushed_into_the_folder_of_a_pipeline(hub: FakeHub, tmp_path: Path) -> None:
    searched(build("ddpm", tmp_path).scheduler).push_to_hub("me/pipe", subfolder="scheduler")
    assert hub.files("me/pipe") == {"scheduler/scheduler_config.json"}


def test_a_pushed_pipeline_names_our_class_and_draws_the_same(hub: FakeHub, tmp_path: Path) -> None:
    pipe = build("ddpm", tmp_path)
    pipe.scheduler = searched(pipe.scheduler)
    images = pipe(**inputs("ddpm"), num_inference_steps=STEPS).images
    pipe.push_to_hub("me/pipe")
    assert hub.files("me/pipe") == {
        "model_index.json",
        "README.md",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    index = json.loads((hub.root / "me/pipe/model_index.json").read_text())
    assert index["scheduler"] == ["thalweg.diffusion.solvers.scheduler", "SearchedScheduler"]
    loaded = DDPMPipeline.from_pretrained(hub.root / "me/pipe")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(loaded(**inputs("ddpm"), num_inference_steps=STEPS).images, images)
