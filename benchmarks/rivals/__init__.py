"""Rivals of mixed decoding, each a module that runs one case in a process of its own.

``benchmarks/mixed_decode.py`` starts them; see there for what is measured. A rival's only argument is a JSON object:
``what`` (``base``, or as ``8 loras``), ``folder`` (the backbone in Hugging Face's layout), ``dtype``, ``prompts`` (lists
of token ids), ``new`` (tokens to generate for each), ``repeat``, ``threads``, and what it needs besides. It prints a line
``RESULT`` and a JSON object: ``seconds``, the best of the repeats for all prompts, and ``peak_mb``.
"""
