"""Spans through `torch.distributed.checkpoint`: its planners, and storage that is our part files.

For the planners every tensor is one row of numbers and a span a chunk of it, so that what torch
works out for resharding (which numbers of which chunk go where) serves rows, whole tensors and
pieces of flat parameters alike. Nothing here speaks to another rank.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from fairseq_lite.errors import FliteError
from fairseq_lite.parallel.shards.spans import Span
from fairseq_lite.parallel.shards.stored import Stored


def collect(spans: Mapping[str, Span]) -> dict[str, Span]:
    """The spans this rank writes, through `torch.distributed.checkpoint.save`."""
    writer = _Collector(spans)
    with _alone():
        dcp.save(dict(spans), storage_writer=writer, planner=_PlanToSave(), no_dist=True)
    return writer.collected


def read(stored: Mapping[str, Stored], into: Mapping[str, Span]) -> int:
    """Fill spans from stored tensors through `torch.distributed.checkpoint.load`.

    Returns:
        How many numbers were read: those of the spans and no others.
    """
    reader = _Slices(stored)
    try:
        with _alone():
            dcp.load(dict(into), storage_reader=reader, planner=_PlanToLoad(), no_dist=True)
    except CheckpointException as e:
        for cause, _ in e.failures.values():
            if isinstance(cause, FliteError):
                raise cause from None
        raise
    return reader.numbers_read


@contextmanager
def _alone() -> Iterator[None]:
    """Without torch's warning that no other rank takes part, which is what is wanted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _chunk(span: Span) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([span.start]), torch.Size([span.values.numel()]))


class _PlanToSave(SavePlanner):
    """A rank writes all it holds; what others hold does not matter."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self._spans: dict[str, Span] = state_dict

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(key, span) for key, span in self._spans.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._spans[write_item.index.fqn].values


def _write_item(key: str, span: Span) -> WriteItem:
    properties = TensorProperties(span.values.dtype)
    data = TensorWriteData(_chunk(span), properties, torch.Size([span.total]))
    return WriteItem(MetadataIndex(key, [span.start]), WriteItemType.SHARD, tensor_data=data)


class _Collector(StorageWriter):
    """Keeps what is to be written: it becomes a part, which goes to the disk as any part does."""

    def __init__(self, spans: Mapping[str, Span]) -> None:
        self._spans = spans
        self.collected: dict[str, Span] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.collected = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        for item in plan.items:
            values = planner.resolve_data(item)
            assert isinstance(values, Tensor)
            key = item.index.fqn
            self.collected[key] = replace(self._spans[key], values=values.detach())
        return _done([])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _PlanToLoad(LoadPlanner):
    """A rank reads the numbers of its spans, from wherever they are."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert metadata is not None
        self._spans: dict[str, Span] = state_dict
        self._stored: Mapping[str, Any] = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key, span in self._spans.items():
            if span.values.numel():
                items += create_read_items_for_chunk_list(key, self._stored[key], [_chunk(span)])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("plain values are not read through the planner")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        values = self._spans[read_item.dest_index.fqn].values
        return values.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class _Slices(StorageReader):
    """Reads stretches of tensors whose files are mapped into memory: only those pages are read."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored
        self.numbers_read = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.numbers_read = 0

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({key: _described(stored) for key, stored in self._stored.items()})

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            index = item.storage_index.index
            assert index is not None
            values = self._stored[item.storage_index.fqn].spans[index].values
            piece = values.narrow(0, item.storage_offsets[0], item.lengths[0])
            target = planner.resolve_tensor(item)
            target.copy_(piece)
            planner.commit_tensor(item, target)
            self.numbers_read += piece.numel()
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _described(stored: Stored) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(stored.dtype),
        torch.Size([stored.total]),
        [_chunk(span) for span in stored.spans],
    )


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
