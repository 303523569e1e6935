"""One prompt, G answers: each sees the prompt and itself, and the prompt is computed once.

A group's prompt is P rows and its answers n_1 ... n_G, so a forward pass has P + sum n rows instead
of G P + sum n. Positions go on from the prompt's end in every answer, and Baichuan-M1's token
before an answer's first is the prompt's last: what comes out, gradients too, is what G separate
sequences give. No mask is larger than [n, P + n].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.model.architecture import LayerSpec
from attending.model.attend import visible


class _Group(NamedTuple):
    """Where a group lies in the flat row."""

    start: int
    prompt: int
    """Its rows."""
    longest: int
    """Rows of its longest answer, n."""
    padded: Tensor
    """[answers, n]: the row of each answer's tokens; what is behind its end is the last row."""
    is_real: Tensor
    """[answers, n]."""


class Shared:
    """Who sees whom, see `decoder.Attend`; nothing is kept."""

    def __init__(self, groups: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        """`groups`: of each, the prompt's rows, at least 1, then each answer's; together all T."""
        self._groups: list[_Group] = []
        self._masks: dict[tuple[int, int, int], Tensor] = {}
        positions, before, start = [], [], 0
        for prompt, *answers in groups:
            last = start + prompt - 1
            positions.append(torch.arange(prompt))
            before.append(torch.arange(start - 1, last))
            begins, places = last + 1, torch.arange(max(answers, default=0))
            rows = []
            for size in filter(None, answers):
                rows.append((begins + places).clamp(max=begins + size - 1))
                positions.append(prompt + places[:size])
                before.append(torch.cat((torch.tensor([last]), begins + places[: size - 1])))
                begins += size
            padded = torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.int64)
            sizes = torch.tensor([*filter(None, answers)], dtype=torch.int64)
            is_real = places < sizes[:, None]
            place = start, prompt, len(places)
            self._groups.append(_Group(*place, padded.to(device), is_real.to(device)))
            start = begins
        self.positions = torch.cat(positions).to(device)
        self._before = torch.cat(before).clamp(min=0).to(device)
        self._is_first = (self.positions == 0)[:, None, None]

    def previous(self, spec: LayerSpec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the token before each; zero at every prompt's start."""
        return (
            k[self._before].masked_fill(self._is_first, 0),
            v[self._before].masked_fill(self._is_first, 0),
        )

    def __call__(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention group by group; on a CPU in at least float32, as `Packed` has it."""
        if q.dtype in (torch.bfloat16, torch.float16) and not q.is_cuda:
            return self(spec, q.float(), k.float(), v.float()).to(q.dtype)
        return torch.cat([part for one in self._groups for part in self._group(spec, one, q, k, v)])

    def _group(
        self, spec: LayerSpec, group: _Group, q: Tensor, k: Tensor, v: Tensor
    ) -> list[Tensor]:
        end = group.start + group.prompt
        own = slice(group.start, end)
        found = [self._attend(spec, 0, q[own][None], k[own][None], v[own][None])[0]]
        if len(group.padded):
            # The first answer token's window reaches back furthest; what lies before is not read.
            seen = group.prompt if spec.window is None else min(group.prompt, spec.window - 1)
            keys, values = (
                torch.cat(
                    (x[end - seen : end].expand(len(group.padded), -1, -1, -1), x[group.padded]), 1
                )
                for x in (k, v)
            )
            found.append(self._attend(spec, seen, q[group.padded], keys, values)[group.is_real])
        return found

    def _attend(self, spec: LayerSpec, past: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, n, N, H] over [B, past + n, K, H]."""
        count, window = q.shape[1], spec.window
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        is_causal = not past and (window is None or window >= count)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if is_causal else self._mask(past, count, window),
            is_causal=is_causal,
            enable_gqa=spec.num_heads != spec.num_kv_heads,
        )
        return out.transpose(1, 2)

    def _mask(self, past: int, count: int, window: int | None) -> Tensor:
        """[count, past + count] bool; made once for all layers."""
        key = past, count, window or 0
        if key not in self._masks:
            at = torch.arange(past + count, device=self.positions.device)
            self._masks[key] = visible(at[past:], at, window)
        return self._masks[key]
