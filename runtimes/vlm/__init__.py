"""Vision-language models under a budget of visual tokens.

import edgekit

pruned = edgekit.vlm.token_budget(model, 0.2)  # a LLaVA of transformers, as it was loaded
pruned.generate(**processor(images=image, text=prompt, return_tensors="pt"), max_new_tokens=50)
"""

from __future__ import annotations

from runtimes.vlm.budget import Pruned as Pruned
from runtimes.vlm.budget import token_budget as token_budget
