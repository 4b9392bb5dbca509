"""What is known of visual tokens: the images and videos they come from, and where they stand in the prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...grids import lattice

KINDS = ("image", "video")


@dataclass(frozen=True)
class Item:
    """One image or video as the encoder delivers it to the LLM."""

    kind: str
    positions: Tensor  # int32 [n, 3], the (t, y, x) of each token; t is the frame, tile or scale
    planes: tuple[tuple[int, int], ...]  # (h, w) of each t; a newline token stands at x = w
    scores: Tensor | None = None  # [n], importance from the encoder's attention
    embeds: Tensor | None = None  # [n, C], in a space shared with text, from a CLIP tower

    def __len__(self) -> int:
        return self.positions.shape[0]

    @classmethod
    def of_planes(cls, kind: str, planes: Sequence[tuple[int, int]], newlines: Sequence[int] = ()) -> Item:
        """Planes one after another; those in `newlines` end each row with a token more."""
        blocks = []
        for t, (h, w) in enumerate(planes):
            cells = lattice((1, h, w + (t in newlines)), torch.device("cpu"))
            cells[:, 0] = t
            blocks.append(cells)
        return cls(kind, torch.cat(blocks), tuple(planes))

    def with_last_newline(self) -> Item:
        """The item with one newline token more, after everything."""
        t = len(self.planes) - 1
        h, w = self.planes[-1]
        last = torch.tensor([[t, h - 1, w]], dtype=torch.int32)
        return replace(self, positions=torch.cat([self.positions, last]))

    def part(self, mask: Tensor) -> Item:
        """The tokens where bool `[n]` is true, each where it was."""
        scores, embeds = (None if one is None else one[mask.to(one.device)] for one in (self.scores, self.embeds))
        return replace(self, positions=self.positions[mask.to(self.positions.device)], scores=scores, embeds=embeds)

    def joined(self, other: Item) -> Item:
        """Both as one item, the other's planes after this one's."""
        shifted = other.positions.clone()
        shifted[:, 0] += len(self.planes)
        scores, embeds = (
            None if one is None or another is None else torch.cat([one, another])
            for one, another in ((self.scores, other.scores), (self.embeds, other.embeds))
        )
        return Item(self.kind, torch.cat([self.positions, shifted]), self.planes + other.planes, scores, embeds)


@dataclass(frozen=True)
class Placed:
    """An item, and where in which prompt its tokens stand."""

    item: Item
    row: int
    columns: Tensor  # int64 [n], ascending


@dataclass(frozen=True)
class Segment:
    """The tokens that are pruned together: an image or video, or all those of a prompt."""

    row: int
    items: tuple[Item, ...]

    def __len__(self) -> int:
        return sum(map(len, self.items))


@dataclass
class VisualTokens:
    """The visual tokens of one prefill, packed: what a selection, and an importance of your own, works on.

    `features`: `[T, D]`, what enters the LLM, or the hidden states where it is pruned inside; `segments`: the images,
    videos or prompts that they belong to, one after another; `input_ids`: `[B, L]`, or None where the model was given
    embeddings; `attention`: `[T]`, what the last token of each prompt pays them, where the pruning is inside the LLM;
    `hidden`: `[B, L, D]`, all tokens of this pass where it is pruned; `text`: bool `[B, L]` on the CPU, which of them
    are text, neither padding nor a placeholder.
    """

    features: Tensor
    segments: list[Segment]
    input_ids: Tensor | None = None
    attention: Tensor | None = None
    hidden: Tensor | None = None
    text: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [len(segment) for segment in self.segments]

    @property
    def items(self) -> list[Item]:
        """Every image and video, in the order of the tokens."""
        return [item for segment in self.segments for item in segment.items]

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 `[segments + 1]`, on the features' device."""
        ends = [0, *itertools.accumulate(self.lengths)]
        return torch.tensor(ends, dtype=torch.int32, device=self.features.device)

    @property
    def positions(self) -> Tensor:
        """int32 `[T, 3]`, each token's (t, y, x), where no two items of a segment share a t."""
        blocks = []
        for segment in self.segments:
            first = 0
            for item in segment.items:
                shifted = item.positions.clone()
                shifted[:, 0] += first
                first += len(item.planes)
                blocks.append(shifted)
        return torch.cat(blocks).to(self.features.device)

    @property
    def scores(self) -> Tensor | None:
        """`[T]`, the importance that came from the encoder, if it was asked for."""
        scores = [item.scores for item in self.items]
        if any(one is None for one in scores):
            return None
        return torch.cat([one.to(self.features.device) for one in scores if one is not None])


def place(kinds: Tensor, encoded: Mapping[str, Sequence[Item]], join_adjacent: bool = False) -> list[Placed]:
    """Where each item's tokens stand, in the order of the prompts and their placeholders.

    `kinds`: `[B, L]` on the CPU, -1 for text and else an index of `KINDS`. Beams and returned sequences repeat each
    prompt with its items, which the encoder saw once. `join_adjacent`: items without text between them are one, as
    the tiles of an image are.
    """
    placed = []
    for kind, items in encoded.items():
        is_kind = kinds == KINDS.index(kind)
        counts = is_kind.sum(1).tolist()
        placeholders, delivered = sum(counts), sum(map(len, items))
        if delivered == 0 or placeholders % delivered or len(counts) % (placeholders // delivered):
            raise ValueError(
                f"{placeholders} {kind} placeholders in the prompts do not fit the {delivered} {kind} tokens delivered"
            )
        repeats = placeholders // delivered
        queue = iter(items)
        for sample in range(0, len(counts), repeats):
            group, missing = [], counts[sample]
            while missing > 0:
                group.append(next(queue))
                missing -= len(group[-1])
            for row in range(sample, sample + repeats):
                columns = is_kind[row].nonzero().flatten()
                if missing or len(columns) != counts[sample]:
                    raise ValueError(f"prompt {row}: its {len(columns)} {kind} placeholders do not end with an {kind}")
                spans = columns.split([len(item) for item in group])
                placed += [Placed(item, row, span) for item, span in zip(group, spans, strict=True)]
    placed.sort(key=lambda one: (one.row, int(one.columns[0])))
    return _joined(placed) if join_adjacent else placed


def segments(placed: Sequence[Placed], scope: str) -> list[Segment]:
    """The placed items as segments: one each (`image`), or one for those of each prompt (`request`)."""
    if scope == "image":
        return [Segment(one.row, (one.item,)) for one in placed]
    rows = itertools.groupby(placed, key=lambda one: one.row)
    return [Segment(row, tuple(one.item for one in group)) for row, group in rows]


def _joined(placed: Sequence[Placed]) -> list[Placed]:
    result: list[Placed] = []
    for one in placed:
        last = result[-1] if result else None
        if last is not None and last.row == one.row and one.columns[0] == last.columns[-1] + 1:
            result[-1] = Placed(last.item.joined(one.item), one.row, torch.cat([last.columns, one.columns]))
        else:
            result.append(one)
    return result
