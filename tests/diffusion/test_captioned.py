"""A denoiser with text encoders answers as the pipeline that it is exported as, and trains like any other."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from thalweg.core_optim.config import OptimConfig
from thalweg.diffusion.captioned import MAX_SEQUENCE_LENGTH, CaptionedTransformer
from thalweg.diffusion.draw import draw, open_pipeline
from thalweg.diffusion.export_captioned import captioned_pipeline
from thalweg.diffusion.module import DiffusionModule
from thalweg.diffusion.networks import check_captions, no_content, null_label, predict
from thalweg.diffusion.order import generator
from thalweg.diffusion.schedules import Flow
from thalweg.diffusion.shapes.captions import WORDS
from thalweg.diffusion.shapes.codec import standard_codec
from thalweg.diffusion.suites.drawing import drawer
from thalweg.diffusion.suites.known import Item
from thalweg.diffusion.suites.pictures import Picture
from thalweg.diffusion.vocabulary import UNKNOWN, Vocabulary

SHAPES = Vocabulary(words=WORDS[1:])
CAPTIONS = ["a red circle and a blue square", "", "two crosses"]


def network(**options: int) -> CaptionedTransformer:
    torch.manual_seed(0)
    given = {"layers": 1, "heads": 2, "head_dim": 8, "text_width": 8} | options
    made = CaptionedTransformer(len(SHAPES), SHAPES.length, **given)
    torch.nn.init.normal_(made.transformer.proj_out.weight, std=0.3)  # a new one answers zero
    return made.eval()


def pipeline(made: CaptionedTransformer) -> StableDiffusion3Pipeline:
    return captioned_pipeline(made, Flow(), "flow", vocabulary=SHAPES, codec=standard_codec(64))


def tokens(captions: list[str]) -> torch.Tensor:
    return torch.tensor([SHAPES.ids(caption) for caption in captions])


def noisy(count: int) -> torch.Tensor:
    return torch.randn(count, 12, 4, 4, generator=generator(1))


@torch.no_grad()
def test_the_answer_is_that_of_the_pipeline_on_its_embeddings_of_prompts() -> None:
    made = network()
    pipe = pipeline(made)
    words, _, pooled, _ = pipe.encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    x, t = noisy(3), torch.tensor([1000.0, 400.0, 3.0])
    theirs = pipe.transformer(
        x, timestep=t, encoder_hidden_states=words, pooled_projections=pooled, return_dict=False
    )[0]
    ours = predict(made, x, t, tokens(CAPTIONS))
    assert (ours - theirs).abs().max() < 1e-5
    assert ours.std() > 0.1
    others = predict(made, x, t, tokens(["a circle", "a cross", "two squares"]))
    assert (ours - others).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_an_unknown_word_adds_nothing_of_its_own() -> None:
    made = network()
    for encoder in (made.text_encoder, made.text_encoder_2):
        assert (encoder.get_input_embeddings().weight[UNKNOWN] == 0).all()


def test_guidance_compares_with_the_empty_caption() -> None:
    made = network()
    assert null_label(made) is None
    assert torch.equal(no_content(made), tokens([""])[0])
    seen: list[torch.Tensor] = []
    made.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    trained = DiffusionModule(made, {"kind": "flow"}, OptimConfig(), prediction="flow")
    batch = {"images": noisy(64), "labels": tokens(["a circle"] * 64)}
    trained.losses(batch, generator(0), label_dropout=0.5)
    empty = (seen[-1] == tokens([""])).all(dim=1)
    kept = (seen[-1] == tokens(["a circle"])).all(dim=1)
    assert (empty | kept).all()
    assert 16 < empty.sum() < 48  # four standard deviations


def test_text_encoders_are_trained() -> None:
    made = network()
    trained = DiffusionModule(made, {"kind": "flow"}, OptimConfig(), prediction="flow")
    batch = {"images": noisy(3), "labels": tokens(CAPTIONS)}
    trained.losses(batch, generator(0), label_dropout=0.0).mean().backward()
    without = [name for name, value in made.named_parameters() if value.grad is None]
    assert without == []
    assert made.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_images_and_captions_have_to_fit() -> None:
    made = network()
    given = {"size": 4, "channels": 12, "words": len(SHAPES), "length": SHAPES.length}
    check_captions(made, **given)
    for name, wrong, said in (
        ("size", 8, "sample_size is 4, but the images have 8"),
        ("words", 5, "vocab_size is 28, but the captions have 5"),
        ("length", 9, "length is 12, but the captions have 9"),
    ):
        with pytest.raises(ValueError, match=said):
            check_captions(made, **{**given, name: wrong})
    with pytest.raises(ValueError, match="Linear takes none"):
        check_captions(torch.nn.Linear(1, 1), **given)
    with pytest.raises(ValueError, match="text_layers is 1, allowed: 2 and more"):
        network(text_layers=1)


def test_a_folder_loads_with_its_autoencoder_and_is_called_as_it_was_trained(tmp_path: Path) -> None:
    pipe = pipeline(network())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    again = open_pipeline(str(tmp_path))
    assert again.config["_max_sequence_length"] == 0
    given = {"nfe": 2, "guidance_scale": 2.0}
    first, second = (next(draw(one, CAPTIONS[:2], **given)) for one in (pipe, again))
    assert first[0].size == (32, 32)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]
    longer = next(draw(again, CAPTIONS[:2], **given, max_sequence_length=16))
    assert longer[0].tobytes() != first[0].tobytes()


def test_modules_of_others_are_not_imported(tmp_path: Path) -> None:
    pipeline(network()).save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("thalweg.diffusion.shapes.vae", "thalweg.diffusion.no_such"))
    with pytest.raises(ValueError, match=r"vae is of thalweg.diffusion.no_such, which is missing"):
        open_pipeline(str(tmp_path))
    index.write_text(index.read_text().replace("thalweg.diffusion.no_such", "antigravity"))
    with pytest.raises(ValueError, match="antigravity is not one of the libraries"):
        open_pipeline(str(tmp_path))


def test_suites_call_it_as_it_was_trained() -> None:
    pipe = pipeline(network())
    pipe.set_progress_bar_config(disable=True)
    wanted = [Picture(item=Item(index=0, text=CAPTIONS[0]), copy=0)]
    default, zero, longer = (
        drawer(pipe, steps=1, seed=0, options={"max_sequence_length": length})(wanted)[0].tobytes()
        for length in (None, 0, 16)
    )
    assert default == zero
    assert default != longer
