"""Open a generated flow with xarray and check what the equation promises.

    python examples/look_at_data.py data/NS-Sines.nc

Prints, over time, the kinetic energy averaged over trajectories, which must not grow, and the root mean
square of div(u) over that of curl(u), which must vanish. Values are read when they are used: a published file
of 80 GB works as well, with ``chunks={"sample": 16}`` and dask.
"""

from __future__ import annotations

import argparse

import numpy as np
import xarray as xr

from thalweg.pde.data.xarray_io import open_trajectories


def derivative(field: xr.DataArray, axis: str) -> xr.DataArray:
    """Spectral derivative along an axis of the periodic unit square; the Nyquist mode is dropped."""
    points = field.sizes[axis]
    k = np.fft.fftfreq(points, 1 / points)
    k[points // 2] = 0

    def apply(values: np.ndarray) -> np.ndarray:
        return np.fft.ifft(2j * np.pi * k * np.fft.fft(values, axis=-1), axis=-1).real

    result = xr.apply_ufunc(apply, field, input_core_dims=[[axis]], output_core_dims=[[axis]])
    return result.transpose(*field.dims)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="file with the velocity components u and v")
    flow = open_trajectories(parser.parse_args(argv).file)
    space = ["sample", "x", "y"]
    print(f"{flow.attrs['problem']}: {flow.attrs['equation']}, {flow.sizes['sample']} trajectories")
    for frame in range(0, flow.sizes["time"], 4):
        u, v = (flow[name].isel(time=frame).astype("float64") for name in ("u", "v"))
        energy = 0.5 * (u**2 + v**2).mean()
        divergence = derivative(u, "x") + derivative(v, "y")
        curl = derivative(v, "x") - derivative(u, "y")
        ratio = float(np.sqrt((divergence**2).mean(space) / (curl**2).mean(space)))
        print(f"t = {float(flow.time[frame]):.2f}: energy {float(energy):.6f}, div/curl {ratio:.1e}")


if __name__ == "__main__":
    main()
