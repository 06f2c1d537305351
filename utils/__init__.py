"""Shared plumbing of the notebook series: measure a model, fine-tune it with LoRA, measure it again, export it.

`utils` is a common name, so the notebooks' first cell asserts that the imported package carries `SERIES`.
"""

SERIES = "deepseek-r1-medical-lora"
