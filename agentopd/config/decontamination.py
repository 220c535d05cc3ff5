"""How training tasks are held against the tasks that a run is measured on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from agentopd.config.base import Section


class DecontaminationConfig(Section):
    """Which overlaps between training and held-out tasks count, and what is done about them."""

    action: Literal["drop", "list", "off"] = "drop"
    """``drop`` trains on none of them, ``list`` only writes them down."""
    ngram: int = Field(13, ge=2)
    """Words and signs in a row that are compared; shorter texts overlap when they are equal."""
    overlap: float = Field(0.8, gt=0, le=1)
    """Share of the shorter text's n-grams found in the other from which the two overlap."""
    embedding_model: str | None = None
    """A sentence-transformers model (directory or hub id) that finds rewordings; needs ``agentopd[embeddings]``."""
    similarity: float = Field(0.95, gt=0, le=1)
    """Cosine from which two texts with the same numbers are one reworded."""

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> DecontaminationConfig:
        if "similarity" in self.model_fields_set and self.embedding_model is None and self.similarity != 0.95:
            raise ValueError("similarity has no effect without embedding_model")
        return self
