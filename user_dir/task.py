"""The task of DeepSpeed's recipe: translation by another name."""

from __future__ import annotations

from fairseq_lite.tasks.api import TASKS
from fairseq_lite.tasks.translation import TranslationConfig, TranslationTask


@TASKS.register("translation_deepspeed", config=TranslationConfig)
class TranslationDeepSpeedTask(TranslationTask):
    """As `translation`: experts are the model's concern, and their losses the criterion's."""
