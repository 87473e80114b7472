"""Losses as plain loops over numbers: slow, and easy to check against their formulas."""

import math
from collections.abc import Sequence

Row = Sequence[float]
Table = Sequence[Row]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def focal(logits: Row, targets: Row, alpha: float, gamma: float) -> float:
    total = 0.0
    for p, t in zip(map(sigmoid, logits), targets, strict=True):
        total -= alpha * t * (1 - p) ** gamma * math.log(p)
        total -= (1 - alpha) * (1 - t) * p**gamma * math.log(1 - p)
    return total / len(logits)


def touches(box: Row, x: int, y: int, width: int, height: int) -> bool:
    """Whether a box, a point too, shares more than a border with cell (x, y)."""
    _, left, top, right, bottom = box
    if left == right:
        return (x, y) == (int(left * width), int(top * height))
    across = left * width < x + 1 and right * width > x
    return across and top * height < y + 1 and bottom * height > y


def localisation(cams: Sequence[Sequence[Table]], boxes: Sequence[Table], kind: str) -> list[float]:
    """Loss of each image and concept with boxes."""
    groups = []
    for image, drawn in enumerate(boxes):
        for concept in sorted({box[0] for box in drawn}):
            own = [box for box in drawn if box[0] == concept]
            inside, outside, height = [], [], len(cams[image][int(concept)])
            for y, row in enumerate(cams[image][int(concept)]):
                for x, value in enumerate(row):
                    high = (sigmoid(value) - 1) ** 2 if kind == "mse" else max(-value, 0)
                    low = sigmoid(value) ** 2 if kind == "mse" else max(value, 0)
                    if any(touches(box, x, y, len(row), height) for box in own):
                        inside.append(high)
                    else:
                        outside.append(low)
            mean = sum(inside) / len(inside)
            groups.append(mean + (sum(outside) / len(outside) if outside else 0))
    return groups


def cosines(vector: Row, prototypes: Sequence[Table]) -> list[list[float]]:
    def cosine(a: Row, b: Row) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    return [[cosine(vector, row) for row in concept] for concept in prototypes]


def soft_triple(
    vectors: Table,
    concepts: Sequence[int],
    prototypes: Sequence[Table],
    scale: float,
    gamma: float,
    margin: float,
    mode: str,
) -> float:
    total = 0.0
    for vector, own in zip(vectors, concepts, strict=True):
        similar = []
        for near in cosines(vector, prototypes):
            parts = [math.exp(gamma * (c - max(near))) for c in near]
            similar.append(sum(q * c for q, c in zip(parts, near, strict=True)) / sum(parts))
        bonus = {"subtract": -margin, "add": margin, "numerator": margin, "none": 0.0}[mode]
        top = math.exp(scale * (similar[own] + bonus))
        true = math.exp(scale * similar[own]) if mode == "numerator" else top
        rest = sum(math.exp(scale * s) for k, s in enumerate(similar) if k != own)
        total -= math.log(top / (true + rest))
    return total / len(vectors)


def info_nce(
    vectors: Table, concepts: Sequence[int], prototypes: Sequence[Table], temperature: float
) -> float:
    total = 0.0
    for vector, own in zip(vectors, concepts, strict=True):
        table = cosines(vector, prototypes)
        below = math.log(sum(math.exp(c / temperature) for near in table for c in near))
        total += sum(below - c / temperature for c in table[own]) / len(table[own])
    return total / len(vectors)


def diversity(prototypes: Sequence[Table], threshold: float) -> float:
    excess = []
    for rows in prototypes:
        table = [near[0] for near in (cosines(row, [rows]) for row in rows)]
        for i, near in enumerate(table):
            excess += [max(c - threshold, 0.0) for j, c in enumerate(near) if i != j]
    return sum(excess) / len(excess)
