"""Independent oracle of region sampling: Python loops over single tokens, no shared code."""

from __future__ import annotations

import numpy as np


def rows_and_owner(choice, splits, height, width, extra):
    """Rows (b, y, x, step), lengths and owner [B, N] of a choice given as nested lists."""
    side = max(splits)
    rows, lengths, owner = [], [], []
    for b, image in enumerate(choice):
        before = len(rows)
        cover = [-1] * (extra + height * width)
        for t in range(extra):
            cover[t] = len(rows)
            rows.append((b, -1 - t, 0, 1))
        for big_y in range(-(-height // side)):
            for big_x in range(-(-width // side)):
                split = splits[image[big_y][big_x]]
                step = side // split
                for i in range(split):
                    for j in range(split):
                        y, x = big_y * side + i * step, big_x * side + j * step
                        if y >= height or x >= width:
                            continue
                        for yy in range(y, min(y + step, height)):
                            for xx in range(x, min(x + step, width)):
                                cover[extra + yy * width + xx] = len(rows)
                        rows.append((b, y, x, step))
        lengths.append(len(rows) - before)
        owner.append(cover)
    return rows, lengths, owner


def dense_rows(batch, splits, height, width, extra):
    """Rows of the dense variant."""
    side = max(splits)
    rows = []
    for b in range(batch):
        rows += [(b, -1 - t, 0, 1) for t in range(extra)]
        for split in splits:
            step = side // split
            rows += [(b, y, x, step) for y in range(0, height, step) for x in range(0, width, step)]
    return rows


def covered(row, height, width, extra):
    """Token numbers that a row covers."""
    _, y, x, step = row
    if y < 0:
        return [-1 - y]
    return [
        extra + yy * width + xx
        for yy in range(y, min(y + step, height))
        for xx in range(x, min(x + step, width))
    ]


def compress(x, rows, height, width, extra):
    """Mean of the covered tokens, x [B, N, C] float64 numpy."""
    out = np.zeros((len(rows), x.shape[2]))
    for i, row in enumerate(rows):
        out[i] = x[row[0], covered(row, height, width, extra)].mean(axis=0)
    return out


def decompress(update, rows, batch, height, width, extra):
    """Update of the covering row for every token."""
    out = np.full((batch, extra + height * width, update.shape[1]), np.nan)
    for i, row in enumerate(rows):
        out[row[0], covered(row, height, width, extra)] = update[i]
    return out


def decompress_dense(update, gate, splits, height, width, extra):
    """Gated sum over granularities; update [B * Nd, C], gate [B, Hr, Wr, S]."""
    batch, side = gate.shape[0], max(splits)
    out = np.zeros((batch, extra + height * width, update.shape[1]))
    for i, row in enumerate(dense_rows(batch, splits, height, width, extra)):
        b, y, x, step = row
        weight = 1.0 if y < 0 else gate[b, y // side, x // side, splits.index(side // step)]
        out[b, covered(row, height, width, extra)] += weight * update[i]
    return out
