"""DeepSpeed's mixture of experts for translation: `--user-dir user_dir`.

Adds the architectures `transformer_ds_moe*`, the task `translation_deepspeed` and the criterion
`model_and_base`. The folder needs nothing around it: copy it anywhere.
"""

from . import criterion, model, task  # noqa: F401
