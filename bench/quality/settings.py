"""How everything learns in the published table; docs/quality.md says how it was found."""

from __future__ import annotations

import fastprompt as fp
from bench.quality.learning import FullRecipe, Recipe

CLINC150 = Recipe(fp.PTuningV2(num_virtual_tokens=16), 1e-2, steps=376, evaluations=4)
CLINC150_FULL = FullRecipe(learning_rate=2e-4, steps=282)
SNIPS_WORDS = (  # what a prompt starts from: words of the questions' kind
    "add another song by this artist to my playlist ; book a table for four people at a restaurant tonight ; "
    "what will the weather be in the park next week ; play music from the nineties ; "
    "rate this novel five out of six stars ; find the movie schedule in the neighborhood"
)
SNIPS = Recipe(
    fp.PTuningV2(num_virtual_tokens=32, init="activations", init_text=SNIPS_WORDS),
    learning_rate=3e-2,
    steps=5600,
    batch_size=8,
    head_learning_rate=3e-3,
    evaluations=16,
    cuts=1,
)
SNIPS_FULL = FullRecipe(learning_rate=2e-4, steps=700)
SNIPS_PER_INTENT = 400  # questions to train on
SNIPS_HELD = 100  # questions of each intent for validation: the published validation split is the test
FACTS = Recipe(fp.PTuning(num_virtual_tokens=6, in_place=True), 5e-3, steps=160, evaluations=8, cuts=1)
FACTS_TEMPLATE = "{3} {subject} {3}"
