"""Runs in the environment of the other tools (antspyx, itk-elastix), never in regtool's: warps one image with one transform.

python foreign.py ants FIXED MOVING OUT TRANSFORM...         python foreign.py transformix MOVING OUT PARAMETERS
python foreign.py points PARAMETERS IMAGE POINTS OUT         (transformix on a point file)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def ants(fixed: str, moving: str, out: str, *transforms: str) -> None:
    import ants as antspyx

    images = [antspyx.image_read(p) for p in (fixed, moving)]
    warped = antspyx.apply_transforms(*images, transformlist=list(transforms), interpolator="linear", defaultvalue=0)
    antspyx.image_write(warped, out)


def transformix(moving: str, out: str, parameters: str) -> None:
    import itk

    image = itk.imread(moving, itk.F)
    parameter_object = itk.ParameterObject.New()
    parameter_object.ReadParameterFile(parameters)
    itk.imwrite(itk.transformix_filter(image, parameter_object), out)


def points(parameters: str, image: str, point_file: str, out: str) -> None:
    import itk

    parameter_object = itk.ParameterObject.New()
    parameter_object.ReadParameterFile(parameters)
    with tempfile.TemporaryDirectory() as folder:
        itk.transformix_filter(
            itk.imread(image, itk.F), parameter_object, fixed_point_set_file_name=point_file, output_directory=folder, log_to_console=False
        )
        Path(out).write_text((Path(folder) / "outputpoints.txt").read_text())


if __name__ == "__main__":
    {"ants": ants, "transformix": transformix, "points": points}[sys.argv[1]](*sys.argv[2:])
