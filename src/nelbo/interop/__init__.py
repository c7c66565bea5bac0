"""Checkpoints of other code bases: read strictly, measured like our own, and written for them.

`diffusers` reads the directories of that library without importing it, `openai` the files of
improved- and guided-diffusion with their flags, `callables` takes any
Python function, `export` writes what `DDPMPipeline.from_pretrained` loads. Each gives a `Foreign`.
"""
