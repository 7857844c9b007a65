"""By how much a matrix stretches directions, and by which angles it turns them: against rotations that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.linalg.turns import stretches_and_angles


def _orthogonal(k: int, generator: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(generator.standard_normal((k, k)))[0]


def _turn(angles: list[float], k: int, generator: np.random.Generator) -> np.ndarray:
    """The rotation by these angles, in degrees, each in a plane of its own; the planes lie anywhere."""
    turn = np.eye(k)
    for i, angle in enumerate(np.deg2rad(angles)):
        turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    basis = _orthogonal(k, generator)
    return basis @ turn @ basis.T


@pytest.mark.parametrize(
    ("k", "angles"),
    [(1, []), (2, [1e-5]), (2, [90]), (3, [30]), (4, [170, 3]), (5, [45, 45]), (7, [12.5, 1e-3, 0]), (16, [80, 60, 7, 2, 0.5])],
)
def test_a_known_turn_of_a_known_stretch(k: int, angles: list[float]) -> None:
    """C = turn times stretch, the stretch symmetric and positive: so these are its polar factors, and no others."""
    generator = np.random.default_rng(k)
    stretches = np.sort(generator.uniform(0.2, 3, k))[::-1].copy()
    axes = _orthogonal(k, generator)
    turn = _turn(angles, k, generator)
    one = turn @ axes @ np.diag(stretches) @ axes.T
    values, found = stretches_and_angles(torch.from_numpy(np.stack([one, np.eye(k), one.T])))
    expected = sorted(angles + [0.0] * ((k + 1) // 2 - len(angles)), reverse=True)
    for i in (0, 2):
        assert np.allclose(values[i].numpy(), stretches, rtol=1e-12)
        assert np.allclose(found[i].numpy(), expected, rtol=0, atol=1e-7)
    assert found[1].tolist() == [0] * ((k + 1) // 2)
    assert values[1].tolist() == [1] * k


def test_mirrors() -> None:
    """A scale below 0 mirrors its direction: 180 degrees, once, whatever else turns."""
    turned = np.zeros((3, 3))
    turned[0, 0] = -2
    turned[1:, 1:] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    values, angles = stretches_and_angles(torch.from_numpy(np.stack([np.diag([1.0, -2, 0.5]), turned])))
    assert values[0].tolist() == [2, 1, 0.5]
    assert angles[0].tolist() == [180, 0]
    assert np.allclose(angles[1].numpy(), [180, np.rad2deg(0.1)])


def test_of_what_is_mapped_to_0_no_turn_is_made_up() -> None:
    """A scale of 0 takes a direction out and turns nothing; what is left turns by what it turns."""
    small = np.deg2rad(5)
    plane = np.zeros((4, 4))
    plane[:2, :2] = [[np.cos(small), -np.sin(small)], [np.sin(small), np.cos(small)]]
    several = np.stack([np.diag([1.0, 0, 2, 0]), np.zeros((4, 4)), plane, plane[::-1, ::-1]])
    values, angles = stretches_and_angles(torch.from_numpy(several.copy()))
    assert values.tolist()[:2] == [[2, 1, 0, 0], [0, 0, 0, 0]]
    assert np.allclose(angles.numpy(), [[0, 0], [0, 0], [5, 0], [5, 0]], atol=1e-9)
