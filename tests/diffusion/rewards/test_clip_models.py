"""Rewards of CLIP-like models with tiny models of the real classes, and the conversion from open_clip."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.checkpoints.tensors import save
from thalweg.diffusion.rewards.aesthetic import Head
from thalweg.diffusion.rewards.base import RewardError, evaluate
from thalweg.diffusion.rewards.clip import clip_score, cosine, features
from thalweg.diffusion.rewards.open_clip import clip_from_open_clip
from thalweg.diffusion.rewards.registry import open_reward

WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "c</w>", "a", "b", "c"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer that knows three letters."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    order = [*WORDS[2:], *WORDS[:2]]  # the end has the largest index, as in CLIP
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(order)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    made = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Folder of a tiny CLIP model with its preprocessing; embeddings of 768 numbers, as the head needs."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**size, "vocab_size": 8, "max_position_embeddings": 77, "eos_token_id": 7},
        vision_config={**size, "image_size": 224, "patch_size": 112},
        projection_dim=768,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_clipscore_is_the_cosine_of_the_models_embeddings(clip: Path) -> None:
    from transformers import CLIPModel

    images, prompts = torch.rand(3, 3, 224, 224), ["a", "b c", ""]
    reward = open_reward("clipscore", folder=str(clip))
    found = evaluate(reward, images, prompts, [{}] * 3)
    model = CLIPModel.from_pretrained(clip).eval()
    words = reward.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=reward.pixels(images), **words)
        image = features(model.get_image_features(pixel_values=reward.pixels(images)))
    assert torch.allclose(found.scores, out.logits_per_image.diagonal().double() / 100, atol=1e-5)
    assert torch.allclose(
        found.scores, clip_score(image, out.text_embeds, model.logit_scale).double(), atol=1e-5
    )
    alone = evaluate(reward, images[1:2], prompts[1:2], [{}])
    assert torch.allclose(alone.scores, found.scores[1:2], atol=1e-6)


def test_pickscore_has_its_own_scale_and_preprocessing(clip: Path) -> None:
    images, prompts = torch.rand(2, 3, 224, 224), ["a b", "c"]
    pick = evaluate(open_reward("pickscore", folder=str(clip)), images, prompts, [{}] * 2)
    score = evaluate(open_reward("clipscore", folder=str(clip)), images, prompts, [{}] * 2)
    assert torch.allclose(pick.scores, score.scores * 100 / 26, rtol=0.02)


def test_aesthetic_scores_the_image_embedding_with_the_head(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    torch.manual_seed(1)
    head = Head().eval()
    save(head.state_dict(), tmp_path / "head.safetensors")
    reward = open_reward("aesthetic", weights=str(tmp_path / "head.safetensors"), folder=str(clip))
    images = torch.rand(2, 3, 224, 224)
    found = evaluate(reward, images, ["", ""], [{}] * 2)
    model = CLIPModel.from_pretrained(clip).eval()
    pixels = open_reward("pickscore", folder=str(clip)).pixels(images)
    with torch.no_grad():
        e = features(model.get_image_features(pixel_values=pixels))
        assert torch.allclose(found.scores.float(), head(e / e.norm(dim=-1, keepdim=True)), atol=1e-5)


class Block(nn.Module):
    """A block of open_clip: layer norms first, attention with queries, keys and values in one matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 3 * width), "c_proj": nn.Linear(3 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Blocks(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, heads: int, patch: int, patches: int = 4, out: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, heads)
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """The model of open_clip, as small as can be, from its published description."""

    def __init__(self, visual: Visual, width: int, heads: int, words: int = 8, length: int = 77) -> None:
        super().__init__()
        self.visual = visual
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.transformer = Blocks(width, heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, visual.proj.shape[1]))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def read(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ self.text_projection


def test_models_of_open_clip_give_the_same_embeddings_once_converted() -> None:
    torch.manual_seed(3)
    original = OpenClip(Visual(16, 2, patch=8), 12, 3).eval()
    model = clip_from_open_clip(original.state_dict(), vision_head=8, text_head=4).eval()
    images = torch.randn(3, 3, 16, 16)
    tokens = torch.tensor([[6, 1, 2, 7, 0, 0], [6, 3, 7, 0, 0, 0], [6, 5, 4, 3, 1, 7]])
    with torch.no_grad():
        assert torch.allclose(
            features(model.get_image_features(pixel_values=images)), original.visual(images), atol=1e-5
        )
        assert torch.allclose(
            features(model.get_text_features(input_ids=tokens)), original.read(tokens), atol=1e-5
        )
    assert model.logit_scale.item() == 2.0


def test_hpsv2_is_the_cosine_of_a_converted_model(tokenizer: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    original = OpenClip(Visual(160, 2, patch=112), 128, 2).eval()  # heads as wide as in ViT-H-14
    torch.save({"state_dict": original.state_dict()}, tmp_path / "hps.pt")
    reward = open_reward("hpsv2", weights=str(tmp_path / "hps.pt"), tokenizer=str(tokenizer))
    images, prompts = torch.rand(2, 3, 224, 224), ["a b", "c"]
    found = evaluate(reward, images, prompts, [{}] * 2)
    words = reward.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = cosine(original.visual(reward.pixels(images)), original.read(words))
    assert torch.allclose(found.scores.float(), expected, atol=1e-5)


def test_weights_that_are_no_clip_are_named(tmp_path: Path) -> None:
    state = OpenClip(Visual(16, 2, patch=8), 12, 3).state_dict()
    del state["ln_final.weight"]
    with pytest.raises(RewardError, match=r"text_model.final_layer_norm.weight.*unknown: \['strange'\]"):
        clip_from_open_clip({**state, "strange": torch.zeros(1)}, vision_head=8, text_head=4)
    with pytest.raises(RewardError, match=r"no tensor 'visual\.conv1\.weight'"):
        clip_from_open_clip({})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RewardError, match="holds no whole CLIPModel"):
        open_reward("clipscore", folder=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "clipscore",
            {"folder": "/no/such"},
            "'/no/such' is no folder of a model; `hf download openai/clip-vit",
        ),
        ("pickscore", {"folder": "/no/such"}, "hf download yuvalkirstain/PickScore_v1"),
        (
            "hpsv2",
            {"weights": "/no/such.pt"},
            "'/no/such.pt' is no file; needed: HPS_v2.1_compressed.pt of https",
        ),
        ("aesthetic", {"weights": "/no/such.pth"}, "is no file; needed: sac"),
        ("imagereward", {"weights": "/no/such.pt"}, "needed: ImageReward.pt of https"),
    ],
)
def test_missing_weights_are_one_error_with_their_source(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        open_reward(name, **options)
