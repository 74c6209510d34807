"""Scans in which a label's surroundings lie somewhere, turned, in another body; for tests of registration near it."""

import numpy as np
import torch
from engine_helpers import smooth_noise
from scipy import ndimage
from scipy.spatial.transform import Rotation

from SemiSAMO1Lib.engine.data.grids import space_points, transform_points
from SemiSAMO1Lib.engine.propagation.descriptors import describe
from SemiSAMO1Lib.volume import Geometry, Volume

CPU = torch.device("cpu")
SPACING = 2.0
GRID = Geometry((56, 60, 64), (SPACING,) * 3, (-40.0, 25.0, 10.0))
CENTRE = (GRID.index_to_space @ np.array([20.0, 22.0, 24.0, 1.0]))[:3]
RADIUS, AROUND = 12.0, 24.0


def ball(radius, grid=GRID, centre=CENTRE):
    points = space_points(grid).numpy()
    return np.linalg.norm(points - centre.reshape(3, 1, 1, 1), axis=0) <= radius


def template_scan():
    """A body of smooth noise, and a ball in it that is labelled."""
    image = Volume(100 * smooth_noise(GRID.shape, 1, 2.0), GRID)
    return image, Volume(ball(RADIUS).astype(np.uint8), GRID)


def planted(image, label, matrix, seed=7):
    """Another body in which the label's surroundings lie elsewhere: case(x) = template(matrix x) near the label."""
    there = transform_points(space_points(GRID).double(), matrix).numpy()
    index = np.tensordot(np.linalg.inv(GRID.index_to_space)[:3, :3], there, 1)
    index += np.linalg.inv(GRID.index_to_space)[:3, 3].reshape(3, 1, 1, 1)
    near = np.linalg.norm(there - CENTRE.reshape(3, 1, 1, 1), axis=0) <= AROUND
    carried = ndimage.map_coordinates(image.array, index[::-1], order=1, mode="nearest")
    other = 100 * smooth_noise(GRID.shape, seed, 2.0)
    truth = ndimage.map_coordinates(label.array, index[::-1], order=0, mode="constant")
    return Volume(np.where(near, carried, other).astype(np.float32), GRID), Volume(truth, GRID)


def moved(shift, rotation=(0, 0, 0), scale=1.0):
    """From the case to the template: a turn (vector, degrees) and a scale about the label, after a shift in mm."""
    matrix, back = np.eye(4), np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(rotation)).as_matrix() * scale
    matrix[:3, 3] = CENTRE - matrix[:3, :3] @ CENTRE
    back[:3, 3] = shift
    return matrix @ back


def described(volume):
    return describe(volume, SPACING, CPU, finest=False)
