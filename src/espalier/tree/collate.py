"""Pack -> tensors on the device that computes it, and the tables that attention over the tree reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from espalier.tree.plan import Ints, Pack
from espalier.tree.products import ProductPlan, product_plan


class TreeLayout:
    """Where each token of a pack stands in the tree: all that attention needs to know.

    start, length, parent: the segments as in Pack, as Python ints. end[s] is the first token after segment s,
    subtree_end[s] the first token after all that descends from s (depth first, so descendants are consecutive).
    positions: int64 [T] on the device.
    """

    def __init__(self, pack: Pack, device: torch.device):
        self.start: list[int] = pack.segment_start.tolist()
        self.length: list[int] = pack.segment_length.tolist()
        self.parent: list[int] = pack.segment_parent.tolist()
        self.end = [begin + count for begin, count in zip(self.start, self.length, strict=True)]
        self.subtree_end = list(self.end)
        for segment in reversed(range(len(self.start))):
            if (parent := self.parent[segment]) >= 0:
                self.subtree_end[parent] = max(self.subtree_end[parent], self.subtree_end[segment])
        self.num_tokens = pack.num_tokens
        self.num_pairs = pack.num_pairs
        self.max_position = int(pack.position_ids.max())
        self.device = device
        self.positions = torch.from_numpy(pack.position_ids.astype(np.int64)).to(device)

    def segments(self) -> Iterator[tuple[int, int, int, int]]:
        """(start, end, end of its subtree, parent) of each segment, parents first."""
        return zip(self.start, self.end, self.subtree_end, self.parent, strict=True)

    @cached_property
    def ancestry(self) -> torch.Tensor:
        """bool [T, T]: True where the key's token is the query's own or one of its ancestors."""
        count = len(self.start)
        above = np.zeros((count, count), bool)  # [segment, segment on its path]
        for segment, parent in enumerate(self.parent):
            if parent >= 0:
                above[segment] = above[parent]
            above[segment, segment] = True
        segment_of = torch.repeat_interleave(torch.arange(count), torch.tensor(self.length)).to(self.device)
        on_path = torch.from_numpy(above).to(self.device)[segment_of][:, segment_of]
        return on_path & (self.positions[:, None] >= self.positions[None, :])

    @cached_property
    def products(self) -> ProductPlan:
        """What the backward multiplies in 16 bits."""
        return product_plan([segment[:3] for segment in self.segments()], self.num_tokens)

    @cached_property
    def causal_mask(self) -> torch.Tensor:
        """bool [1, 1, T, T]: who sees whom where a layer sees its whole past."""
        return self.ancestry[None, None]


@dataclass(frozen=True, slots=True)
class PackTensors:
    """A Pack on its device.

    input_ids, position_ids: int64 [1, T]. logit_positions, target_ids: int64 [M]. target_weights: float32 [M].
    target_counts: int64 [M]. The counts are Python numbers, so that nothing waits for the device.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logit_positions: torch.Tensor
    target_ids: torch.Tensor
    target_weights: torch.Tensor
    target_counts: torch.Tensor
    layout: TreeLayout
    num_supervised: int
    weight_sum: float


def to_tensors(pack: Pack, device: torch.device | str = "cpu") -> PackTensors:
    """The pack's arrays as tensors on `device`, with its layout."""
    where = torch.device(device)

    def indices(array: Ints) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(where)

    return PackTensors(
        input_ids=indices(pack.input_ids)[None],
        position_ids=indices(pack.position_ids)[None],
        logit_positions=indices(pack.logit_positions),
        target_ids=indices(pack.target_ids),
        target_weights=torch.from_numpy(pack.target_weights).to(where),
        target_counts=indices(pack.target_counts),
        layout=TreeLayout(pack, where),
        num_supervised=pack.num_supervised,
        weight_sum=float(pack.target_weights.sum(dtype=np.float64)),
    )
