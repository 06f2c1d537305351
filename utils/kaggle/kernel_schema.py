"""What kernel-metadata.json and a notebook have to hold before either may travel: names, types, nothing left to a default."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictBool

_Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f]+$")]


class KernelMetadata(BaseModel):
    """kernel-metadata.json as it has to be written out."""

    is_private: StrictBool
    enable_gpu: StrictBool
    enable_tpu: StrictBool
    enable_internet: StrictBool
    id: Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")]
    title: _Text
    machine_shape: _Text
    language: _Text
    kernel_type: _Text
    dataset_sources: list[_Text]
    kernel_sources: list[_Text]
    competition_sources: list[_Text]
    model_sources: list[_Text]
    keywords: list[_Text] = []


class _CellMetadata(BaseModel):
    tags: list[str] = []


class _Cell(BaseModel):
    cell_type: str
    source: str | list[str]
    metadata: _CellMetadata


class Notebook(BaseModel):
    """Of a notebook only what is looked at here; nbformat has the whole of it."""

    cells: list[_Cell]
    metadata: dict[str, Any]
