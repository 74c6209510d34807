"""Procedural anatomy with known truth: a body with two organs and a vessel, different in every case, from a seed.

Every case is the same anatomy under a smooth random deformation, seen by another scanner: bias field, Rician noise,
spacing, oblique direction and field of view differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from .image_io import write_volume
from .volume import Geometry, Volume

#: Label values of the phantoms and their names.
LABELS = {1: "large organ", 2: "small organ", 3: "vessel"}

#: Grey values: air, body, large organ, small organ, vessel.
_GREY = (20.0, 180.0, 320.0, 100.0, 450.0)


@dataclass(frozen=True)
class PhantomSettings:
    """How the cases of a cohort differ.

    Attributes:
        extent_mm: mean field of view (x, y, z).
        spacing_mm: mean voxel size (z, y, x).
        spacing_variation: share by which spacings differ between cases.
        oblique_degrees: largest rotation of the scanner's axes.
        deformation_mm: typical displacement of the anatomy.
        size_variation: share by which the anatomy is larger or smaller.
        noise: Rician noise, grey values.
        bias: share of the bias field.
        shift_mm: how far the field of view is off the body's centre.
    """

    extent_mm: tuple[float, float, float] = (84.0, 84.0, 72.0)
    spacing_mm: tuple[float, float, float] = (2.4, 2.0, 2.0)
    spacing_variation: float = 0.1
    oblique_degrees: float = 8.0
    deformation_mm: float = 3.0
    size_variation: float = 0.1
    noise: float = 12.0
    bias: float = 0.2
    shift_mm: float = 4.0


@dataclass(frozen=True)
class Phantom:
    """A scan and its true labels (uint8, values of LABELS) on one grid."""

    name: str
    image: Volume
    label: Volume


def make_phantom(number: int, seed: int = 0, settings: PhantomSettings | None = None) -> Phantom:
    """Case `number` of the cohort `seed`; the same arguments always give the same case."""
    settings = settings or PhantomSettings()
    generator = np.random.default_rng([seed, number])
    geometry = _geometry(settings, generator)
    points = _points(geometry)
    anatomy = _deformed(points, settings, generator)
    distances = _signed_distances(anatomy)
    label = np.zeros(geometry.shape, np.uint8)
    for value in LABELS:
        label[(distances[value] < 0) & (distances[0] < 0)] = value
    image = _scanned(anatomy, distances, points, settings, generator)
    return Phantom(f"phantom_{number:03d}", Volume(image, geometry), Volume(label, geometry))


def write_cohort(folder: Path, count: int, seed: int = 0, settings: PhantomSettings | None = None) -> list[str]:
    """Write `images/<name>.nrrd` and `labels/<name>.nrrd` for a cohort; returns the names."""
    names = []
    for number in range(count):
        phantom = make_phantom(number, seed, settings)
        write_volume(Path(folder) / "images" / f"{phantom.name}.nrrd", phantom.image)
        write_volume(Path(folder) / "labels" / f"{phantom.name}.nrrd", phantom.label)
        names.append(phantom.name)
    return names


def _geometry(settings: PhantomSettings, generator: np.random.Generator) -> Geometry:
    spacing = np.array(settings.spacing_mm) * (1 + settings.spacing_variation * generator.uniform(-1, 1, 3))
    extent = np.array(settings.extent_mm[::-1]) * (1 + 0.08 * generator.uniform(-1, 1, 3))
    shape = np.maximum(8, np.round(extent / spacing)).astype(int)
    turn = Rotation.from_euler("zyx", generator.uniform(-1, 1, 3) * settings.oblique_degrees, degrees=True).as_matrix()
    middle = turn @ ((shape[::-1] - 1) / 2 * spacing[::-1])
    origin = generator.uniform(-1, 1, 3) * settings.shift_mm - middle
    z, y, x = (int(n) for n in shape)
    dz, dy, dx = (float(v) for v in spacing)
    a, b, c = (float(v) for v in origin)
    return Geometry((z, y, x), (dz, dy, dx), (a, b, c), tuple(map(float, turn.ravel())))


def _points(geometry: Geometry) -> NDArray[np.float64]:
    """Places of the voxels, (3, z, y, x), components (x, y, z) in mm."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in geometry.shape), indexing="ij")
    index = np.stack([x, y, z]).reshape(3, -1)
    matrix = geometry.index_to_space
    return np.asarray((matrix[:3, :3] @ index + matrix[:3, 3:]).reshape(3, *geometry.shape))


def _deformed(
    points: NDArray[np.float64], settings: PhantomSettings, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Where in the one anatomy each place of this case comes from: scaled, and bent by a few smooth waves."""
    scale = 1 + settings.size_variation * generator.uniform(-1, 1, 3).reshape(3, 1, 1, 1)
    anatomy = points * scale
    for _ in range(6):
        wave = generator.normal(0, 1, 3)
        wave *= 2 * np.pi / generator.uniform(45, 110) / np.linalg.norm(wave)
        phase = generator.uniform(0, 2 * np.pi)
        amount = generator.normal(0, settings.deformation_mm / np.sqrt(3), 3).reshape(3, 1, 1, 1)
        anatomy = anatomy + amount * np.sin(np.tensordot(wave, points, 1) + phase)
    return np.asarray(anatomy)


def _signed_distances(p: NDArray[np.float64]) -> dict[int, NDArray[np.float64]]:
    """Roughly the distance in mm to each structure, negative inside; 0 is the body."""
    x, y, z = p

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> NDArray[np.float64]:
        terms = zip((x, y, z), centre, radii, strict=True)
        return np.asarray((np.sqrt(sum(((q - c) / r) ** 2 for q, c, r in terms)) - 1) * min(radii))

    large = np.minimum(ellipsoid((12, 4, 2), (13, 15, 14)), ellipsoid((16, -8, 8), (8, 9, 10)))
    small = ellipsoid((-16, 6, -6), (8, 9, 11))
    along = z + 4
    vessel = np.hypot(x + 4 + 5 * np.sin(along / 14), y + 12 + 3 * np.cos(along / 10)) - 4.2
    small = np.maximum(small, -(vessel - 1))
    large = np.maximum(large, -np.minimum(vessel - 1, small - 1))
    return {0: ellipsoid((0, 0, 0), (36, 32, 40)), 1: large, 2: small, 3: vessel}


def _scanned(
    anatomy: NDArray[np.float64],
    distances: dict[int, NDArray[np.float64]],
    points: NDArray[np.float64],
    settings: PhantomSettings,
    generator: np.random.Generator,
) -> NDArray[np.float32]:
    """Grey values: tissues with soft borders and texture of their own, bias field, Rician noise."""

    def inside(distance: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(1 / (1 + np.exp(np.clip(distance / 0.7, -40, 40))))

    x, y, z = anatomy
    texture = np.sin(x / 3.1) * np.sin(y / 3.7) * np.sin(z / 3.3) + 0.6 * np.sin((x + 2 * y) / 7.3) * np.cos(z / 5.9)
    grey = _GREY[0] + (_GREY[1] + 25 * texture - _GREY[0]) * inside(distances[0])
    for value in LABELS:
        share = inside(np.maximum(distances[value], distances[0]))
        grey = grey * (1 - share) + (_GREY[1 + value] + 12 * texture) * share
    direction = generator.normal(0, 1, 3)
    along = np.tensordot(direction / np.linalg.norm(direction), points, 1) / 40
    grey = grey * (1 + settings.bias * along) * generator.uniform(0.85, 1.15)
    real = grey + generator.normal(0, settings.noise, grey.shape)
    imaginary = generator.normal(0, settings.noise, grey.shape)
    return np.hypot(real, imaginary).astype(np.float32)
