"""What a pipeline's folder says to us beside what diffusers reads of it.

Parts may be classes of this package: diffusers takes them from modules that are imported already, and imports
none because a folder names it. Modules of this package, and of no other, are imported for it here.

``_max_sequence_length`` in ``model_index.json`` is how the pipeline is to be called; diffusers ignores
entries that start with an underscore.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LENGTH_KEY = "_max_sequence_length"
"""Entry of ``model_index.json``."""
_ADVISERS = ("diffusers.pipelines.pipeline_utils", "transformers.utils.import_utils")
_OURS = re.compile(r"thalweg(\.[A-Za-z_]\w*)+")


def import_parts(index: Mapping[str, Any]) -> None:
    """Import the modules of this package that an index takes parts from.

    Raises:
        ValueError: If there is no such module.
    """
    for name, value in index.items():
        module = value[0] if isinstance(value, list | tuple) and len(value) == 2 else None
        if not isinstance(module, str) or not _OURS.fullmatch(module):
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"the pipeline's {name} is of {module}, which is missing: {error}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Load and save without progress bars, and without advice that is of no use.

    Our own classes are not those that diffusers expects, and its pipelines import image processors that they
    do not need here and that would rather have torchvision. That parts are left out is known.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    bars = [
        library
        for library in (diffusers.utils.logging, transformers.utils.logging)
        if library.is_progress_bar_enabled()
    ]
    loggers = [logging.getLogger(name) for name in _ADVISERS]
    for logger in loggers:
        logger.addFilter(_is_useful)
    for library in bars:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in bars:
            library.enable_progress_bar()
        for logger in loggers:
            logger.removeFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    ours = said.startswith("Expected types for") and "<class 'thalweg." in said
    absent = said.endswith("of type <class 'NoneType'> cannot be saved.")
    return not (ours or absent or "requires torchvision" in said)


def keep_call(pipe: DiffusionPipeline, index: Mapping[str, Any]) -> None:
    """Put what an index says about calls into the configuration of its pipeline."""
    if LENGTH_KEY in index:
        pipe.register_to_config(**{LENGTH_KEY: int(index[LENGTH_KEY])})


def call_options(pipe: DiffusionPipeline) -> dict[str, int]:
    """Arguments that a pipeline is to be called with, where others are not asked for."""
    config = getattr(pipe, "config", {})
    return {"max_sequence_length": int(config[LENGTH_KEY])} if LENGTH_KEY in config else {}
