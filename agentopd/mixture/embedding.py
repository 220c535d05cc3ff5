"""Sentence embeddings, where replay chooses its tasks by them or rewordings are looked for. D is their width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from agentopd.errors import ConfigError

Floats = npt.NDArray[np.float32]
Embed = Callable[[Sequence[str]], Floats]
"""Texts to unit vectors (texts, D)."""


def load_embedder(model: str, key: str) -> Embed:
    """An embedder from the sentence-transformers model that the config names at ``key``.

    Raises ``ConfigError`` where the library or the model is missing.
    """
    try:
        from sentence_transformers import SentenceTransformer  # heavy, and optional
    except ImportError:
        raise ConfigError(
            f"{key} {model!r} needs sentence-transformers: `pip install agentopd[embeddings]`, or do without it"
        ) from None
    try:
        loaded = SentenceTransformer(model, device="cpu")
    except Exception as exc:  # whatever the library raises for a path or id that is no model
        raise ConfigError(f"{key} {model!r} cannot be loaded: {exc}") from None

    def embed(texts: Sequence[str]) -> Floats:
        vectors = loaded.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    return embed
