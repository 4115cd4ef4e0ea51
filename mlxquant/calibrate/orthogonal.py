"""Orthogonal matrices that spread what stands in one column over all of them: Hadamard's, where one is known.

A matrix is kept as the factors of a Kronecker product, so that multiplying takes width x (sum of their orders) steps
instead of width squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Of the powers of two: a larger one is split, which is the same matrix in fewer steps.
_LARGEST_POWER = 64


def spreading(width: int, seed: int) -> tuple[Array, ...]:
    """Orthogonal float64 factors whose Kronecker product has order `width`: Hadamard's, or, where no such orders make
    the width, Hadamard's for its power of two and a random one for the odd rest. (QuaRot, arXiv 2404.00456, section 4.)
    """
    if (orders := _orders(width)) is not None:
        return tuple(hadamard(order) / np.sqrt(order) for order in orders)
    power = width & -width
    return (*(hadamard(order) / np.sqrt(order) for order in _orders(power) or ()), _random(width // power, seed))


def times(x: Array, factors: Sequence[Array]) -> Array:
    """float64 x @ Q over the last axis, Q being the Kronecker product of the factors."""
    made = x.astype(np.float64).reshape(-1, x.shape[-1])
    for factor in factors:  # the axis in front is multiplied and goes to the end: after all of them, the order is back
        made = made.reshape(-1, len(factor), x.shape[-1] // len(factor)).swapaxes(1, 2) @ factor
        made = made.reshape(-1, x.shape[-1])
    return made.reshape(x.shape)


def hadamard(order: int) -> Array:
    """Entries of 1 and -1, rows orthogonal. By Sylvester's doubling, or by Paley's two constructions (1933, Journal of
    Mathematics and Physics 12) from the squares modulo a prime. ValueError for an order that neither gives.
    """
    if order & (order - 1) == 0:
        made = np.ones((1, 1))
        while len(made) < order:
            made = np.block([[made, made], [made, -made]])
        return made
    if not _has_paley(order):
        raise ValueError(f"no Hadamard matrix of order {order} is made here")
    if _is_prime(order - 1):
        return _conference(order - 1, -1.0) + np.eye(order)
    one, other = np.array([[1.0, 1], [1, -1]]), np.array([[1.0, -1], [-1, -1]])
    return np.kron(_conference(order // 2 - 1, 1.0), one) + np.kron(np.eye(order // 2), other)


def _conference(prime: int, below: float) -> Array:
    """0 on the diagonal, 1 and -1 elsewhere, rows orthogonal: whether differences are squares modulo the prime."""
    squares = {i * i % prime for i in range(1, prime)}
    character = np.array([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)])
    made = np.zeros((prime + 1, prime + 1))
    made[0, 1:], made[1:, 0] = 1, below
    made[1:, 1:] = character[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    return made


def _orders(width: int) -> tuple[int, ...] | None:
    """Orders of Hadamard matrices whose product is the width."""
    if width & (width - 1) == 0:
        split = []
        while width > 1:
            split.append(min(width, _LARGEST_POWER))
            width //= split[-1]
        return tuple(split)
    for order in range(12, width + 1, 4):
        if width % order == 0 and _has_paley(order) and (rest := _orders(width // order)) is not None:
            return (order, *rest)
    return None


def _has_paley(order: int) -> bool:
    return order % 4 == 0 and (_is_prime(order - 1) or (order % 8 == 4 and _is_prime(order // 2 - 1)))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))


def _random(order: int, seed: int) -> Array:
    """Uniform over all orthogonal matrices (Mezzadri, arXiv math-ph/0609050)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(order, order)))
    return np.asarray(q * np.sign(np.diag(r)))
