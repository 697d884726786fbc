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
