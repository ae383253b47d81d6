from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hqlt.ops.tiles import Tiles, make_tiles
from tests.helpers import borders_of


def split(tiles: Tiles, x: Tensor) -> Tensor:
    """All tiles, [tiles, H, C, …], loaded in segments over memory that is not clean."""
    out = torch.full((tiles.total, x.shape[2], tiles.grid.tile, *x.shape[3:]), torch.nan)
    for steps in tiles.segments(3):
        places = tiles.places(steps)
        tiles.load(x, steps, out[places[0].start : places[-1].stop])
    return out


def merge(tiles: Tiles, cut: Tensor, like: Tensor) -> Tensor:
    out = torch.empty_like(like)
    for steps in tiles.segments(2):
        places = tiles.places(steps)
        tiles.store(cut[places[0].start : places[-1].stop], steps, out)
    return out


LAYOUTS = [(1, [1]), (2, None), (1, [5, 1, 40, 17]), (1, [130]), (1, [64, 65, 1, 1, 3])]


@pytest.mark.parametrize("period", [None, 1, 3, 16, 40, 67, 200])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64])
@pytest.mark.parametrize(("batch", "lengths"), LAYOUTS)
def test_tiles_hold_every_token_once_and_do_not_straddle_documents_or_periods(batch, lengths, chunk_size, period):
    length = sum(lengths) if lengths else 50
    borders = None if lengths is None else borders_of(lengths).tolist()
    # Each token carries its document, its period and its place, counted from 1 because 0 marks an empty slot.
    place = torch.arange(1, batch * length + 1).view(batch, length)
    document, block = torch.zeros(batch, length), torch.zeros(batch, length)
    for row in range(batch):
        for n, (a, b) in enumerate(pairwise(borders or [0, length])):
            document[row, a:b] = row + n + 1
            block[row, a:b] = torch.arange(b - a) // period + 1 if period else 1
    x = torch.stack([place, document, block], -1).unsqueeze(2).float()

    tiles = make_tiles(x, borders, chunk_size, period)
    cut = split(tiles, x)[:, 0]
    assert cut.shape[1] <= max(chunk_size, 1)
    assert cut[..., 0][cut[..., 0] > 0].sort().values.tolist() == list(range(1, batch * length + 1))
    for tile in cut:
        tile = tile[tile[:, 0] > 0]
        assert tile[:, 1].unique().numel() == 1
        if period and period > chunk_size:
            assert tile[:, 2].unique().numel() == 1
    assert torch.equal(merge(tiles, split(tiles, x), x), x)


def test_scan_order_puts_the_longest_document_first():
    x = torch.zeros(1, 63, 1, 1)
    tiles = make_tiles(x, [0, 5, 6, 46, 63], 16)
    assert tiles.alive == sorted(tiles.alive, reverse=True)
    assert tiles.segments(1) == [slice(n, n + 1) for n in range(len(tiles.alive))]
    ranks = tiles.sort_documents(torch.arange(4))
    assert ranks.tolist()[:2] == [2, 3]
    assert tiles.unsort_documents(ranks).tolist() == [0, 1, 2, 3]
