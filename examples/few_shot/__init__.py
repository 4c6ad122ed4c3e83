"""Few-shot prompting evaluation of language models: `python -m examples.few_shot.gpt3_eval`."""
