"""Names and layouts that older versions of fairseq wrote, brought up to date."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_FINAL_NORM_SINCE = {"encoder": 2, "decoder": 3}
_NUMBERED_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
# Sinusoidal tables are computed, not stored; older files hold a placeholder or the table itself.
_DROPPED = re.compile(r"\.embed_positions\.(_float_tensor|weights)$")
_PACKED = re.compile(r"(.*\.(?:self_attn|encoder_attn)\.)in_proj_(weight|bias)$")
_NORM = re.compile(r"(encoder|decoder)\.(layers\.\d+\.)layer_norms\.(\d)\.(weight|bias)$")
_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.*)$")


def upgrade_names(
    state: Mapping[str, Tensor], *, tied_output: bool, keep: Mapping[str, tuple[int, ...] | None]
) -> dict[str, Tensor]:
    """A copy of `state` with today's names; the tensors are shared.

    - packed `in_proj_*` become q, k and v projections; numbered `layer_norms` get their names;
    - `embed_out`, or the embeddings when tied, become `output_projection.weight`;
    - `keep` (side -> layers) picks layers of a deeper checkpoint and numbers them anew.
    """
    new: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new.update(_renamed(name, tensor))
    for side, layers in keep.items():
        if layers:
            new = _keep_layers(new, side, layers)
    old_projection = new.pop("decoder.embed_out", None)
    if "decoder.output_projection.weight" not in new:
        source = new.get("decoder.embed_tokens.weight") if tied_output else old_projection
        if source is not None:
            new["decoder.output_projection.weight"] = source
    return new


def drop_old_final_norm(state: dict[str, Tensor], side: str) -> bool:
    """Whether `state` is from before stacks had a final normalisation; if so it is taken out."""
    version = state.get(f"{side}.version")
    if version is not None and float(version[0]) >= _FINAL_NORM_SINCE[side]:
        return False
    state[f"{side}.version"] = torch.ones(1)
    for part in ("weight", "bias"):
        state.pop(f"{side}.layer_norm.{part}", None)
    return True


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if _DROPPED.search(name):
        return {}
    if match := _PACKED.match(name):
        prefix, kind = match.groups()
        parts = zip("qkv", tensor.chunk(3, dim=0), strict=True)
        return {f"{prefix}{which}_proj.{kind}": part for which, part in parts}
    if match := _NORM.match(name):
        side, layer, number, kind = match.groups()
        return {f"{side}.{layer}{_NUMBERED_NORMS[side][int(number)]}.{kind}": tensor}
    return {name: tensor}


def _keep_layers(
    state: Mapping[str, Tensor], side: str, keep: tuple[int, ...]
) -> dict[str, Tensor]:
    matches = {name: _LAYER.match(name) for name in state}
    depth = len({m[2] for m in matches.values() if m and m[1] == side})
    if depth <= len(keep):  # pruned already: a later checkpoint of the pruned model
        return dict(state)
    new_number = {str(old): new for new, old in enumerate(sorted(keep))}
    new: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = matches[name]
        if match is None or match[1] != side:
            new[name] = tensor
        elif match[2] in new_number:
            new[f"{side}.layers.{new_number[match[2]]}.{match[3]}"] = tensor
    return new
