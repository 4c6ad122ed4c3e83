"""A sample plugin: `--user-dir examples/plugin` adds a criterion, an architecture and a task."""

from . import attentive_gru, focal_loss, noisy_translation  # noqa: F401
