"""The tree of common beginnings: by hand, and against what every token must see."""

import pytest
import torch

from srpo.prefix.tree import Layout, Tree


def rows(*texts: str, left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for b, text in enumerate(texts):
        at = slice(width - len(text), width) if left else slice(0, len(text))
        ids[b, at] = torch.tensor([ord(c) for c in text], dtype=torch.long)
        mask[b, at] = 1
    return ids, mask


def one_row(tree: Tree) -> Layout:
    return tree.lay_out([range(len(tree.order))])


def text(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.tolist()))


@pytest.mark.parametrize("left", [True, False])
def test_by_hand(left: bool) -> None:
    # A system part "ss", two prompts "aa" and "b", completions; in the order in which siblings never lie together.
    tree = Tree(*rows("ssbz", "ssaaxx", "ssaay", "ssaaxx", left=left))
    assert tree.order == [1, 3, 2, 0] and tree.lengths == [6, 6, 5, 4] and tree.common == [0, 6, 4, 2]
    layout = one_row(tree)
    assert text(layout.ids[0]) == "ssaaxxybz"
    assert layout.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 2, 3]
    assert layout.last[0].tolist() == [8, 8, 6, 6, 5, 5, 6, 8, 8]
    found = {b: layout.columns[b][layout.real[b]].tolist() for b in range(4)}
    siblings = [0, 1, 2, 3]
    assert found == {0: [0, 1, 7, 8], 1: [*siblings, 4, 5], 2: [*siblings, 6], 3: [*siblings, 4, 5]}
    sees = layout.sees()[0, 0]
    assert [text(layout.ids[0][sees[q]]) for q in (5, 6, 8)] == ["ssaaxx", "ssaay", "ssbz"]
    assert sees.diagonal().all()
    narrow = layout.sees(window=3)[0, 0]
    assert [text(layout.ids[0][narrow[q]]) for q in (0, 5, 6, 8)] == ["s", "axx", "aay", "sbz"]


def assert_right(layout: Layout, ids: torch.Tensor, mask: torch.Tensor, window: int | None = None) -> None:
    """Every token sees itself and those before it in its own row, at the right places, and nothing else."""
    sees = layout.sees(window)
    width = layout.ids.size(1)
    for b in range(len(ids)):
        own = layout.columns[b][mask[b].bool()]
        if not len(own):
            continue
        (row,) = (own // width).unique().tolist()
        column = own % width
        assert torch.equal(layout.ids[row, column], ids[b][mask[b].bool()])
        assert layout.positions[row, column].tolist() == list(range(len(own)))
        for n, q in enumerate(column.tolist()):
            first = 0 if window is None else max(0, n + 1 - window)
            assert sees[row, 0, q].nonzero().flatten().tolist() == sorted(column[first : n + 1].tolist())


@pytest.mark.parametrize("seed", range(8))
def test_any_rows(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 3, (9, 8), generator=draw)  # two letters: much is shared, also between completions
    lengths = torch.randint(0, 9, (9, 2), generator=draw)
    column = torch.arange(8)
    mask = ((column >= 8 - lengths[:, :1]) | (column < lengths[:, 1:] - 5)).long()  # holes too
    tree = Tree(ids, mask)
    kept = {tuple(row[m.bool()][:n].tolist()) for row, m in zip(ids, mask, strict=True) for n in range(1, 9)}
    distinct = {some for some in kept if some}
    assert one_row(tree).ids.numel() == len(distinct), "not the smallest tree"
    for width in range(max(tree.lengths), len(distinct) + 1):
        runs = tree._filled(width)
        assert [k for run in runs for k in run] == list(range(9)) and tree.width(runs) <= width
        assert_right(tree.lay_out(runs), ids, mask)
        assert_right(tree.lay_out(runs), ids, mask, window=3)


def test_cuts_where_the_mask_costs_more_than_it_saves() -> None:
    groups = [f"{g}{'p' * 10}{c}" for g in "abcd" for c in "uvwx"]
    tree = Tree(*rows(*groups))
    together, apart = tree.cut(lambda r, n: r * n), tree.cut(lambda r, n: r * n * (1 + n))
    assert [len(run) for run in together] == [16] and tree.width(together) == 4 * 15
    assert [len(run) for run in apart] == [4, 4, 4, 4] and tree.width(apart) == 15
    assert all(len({groups[tree.order[k]][0] for k in run}) == 1 for run in apart)


def test_values_go_to_the_columns_and_back() -> None:
    ids, mask = rows("ssbz", "ssaaxx", "ssaay")
    layout = Tree(ids, mask).lay_out([range(2), range(2, 3)])
    values = torch.stack([ids, 2 * ids], dim=-1)
    packed = layout.pack(values)
    assert packed.shape == (*layout.ids.shape, 2) and torch.equal(packed[..., 0], layout.ids)
    assert torch.equal(layout.unpack(packed)[mask.bool()], values[mask.bool()])


def test_tokens_that_differ_in_more_than_their_ids_are_not_shared() -> None:
    ids, mask = rows("ssx", "ssy")
    keys = ids.clone()
    keys[1, 1] += 1000
    layout = one_row(Tree(ids, mask, keys))
    assert text(layout.ids[0]) == "ssxsy"


def test_nothing_but_padding() -> None:
    ids, mask = rows("ab", "cd")
    layout = one_row(Tree(ids, torch.zeros_like(mask)))
    assert layout.ids.shape == (1, 0) and not layout.real.any()
