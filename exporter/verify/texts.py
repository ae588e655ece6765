"""Texts of our own that models are run on where an export has no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pmpd.exporter.arch import DecoderShape

__all__ = ["HELD_OUT_TEXT", "text_ids"]

# Prose, a dialogue, code and a list: what activations have in common in all of them is the model's, not the text's.
_TEXT = """Rivers shape the land they cross. Over thousands of years the water carries sand and stones from the hills \
to the sea, and where it slows down it leaves them behind. In 1869 the engineers measured 42 kilometres of dikes.

User: Can you explain why the sky is blue?
Assistant: Sunlight is scattered by the air. Short waves, which we see as blue, are scattered far more than long ones.

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)

1. Wash the apples and cut them into small pieces.
2. Heat the oven to 180 degrees.
"""
_RANDOM = 128  # tokens, for a model without tokenizer

# Written for this project, so that no model has it by heart.
HELD_OUT_TEXT = """The ferry left the harbour at half past six, when the fog had not yet lifted from the water. Only a \
dozen people had come aboard: two fishermen with a crate of ropes, a teacher on her way to the \
island school, and a family whose children ran from one rail to the other. The captain, who had made \
this crossing for nineteen years, kept the engine slow until the last buoy was behind them. Then the \
sun broke through, and everybody went out on deck to look at the cliffs.

Bread needs only flour, water, salt and time. Most of the taste comes from the time: a dough that rests in a cool \
place overnight has a deeper flavour than one that rises in an hour next to the stove. Enzymes in the flour turn part \
of the starch into sugar, the yeast eats the sugar, and the gas that it makes is held by a web of gluten. If the \
dough is too warm, the web tears before it is strong, and the loaf comes out flat.

The first bridges of iron were built like bridges of wood, with joints and wedges, because their builders were \
carpenters. It took two generations until engineers began to calculate what a beam can bear. In 1847 a bridge over \
the river Dee in England failed under a train, and five people died. The inquiry that followed changed how iron was \
tested, and within ten years rolled plates had taken the place of cast ones in nearly every large span.

"You said that it would be finished by Friday," Martin said.
"I said that I would try," answered Ruth. She put the lamp on the table and opened the case of the clock. "Look here. \
The spring is not the problem. Somebody has filed this wheel down by hand, and now two of its teeth slip."
"Can you make a new one?"
"I can, but not from what is in this drawer. Ask your brother whether he still has the lathe."

Question: A train travels 180 kilometres in two hours, and then 60 kilometres in one hour. What is its average speed?
Answer: It travels 180 + 60 = 240 kilometres in 2 + 1 = 3 hours. The average speed is 240 / 3 = 80 kilometres an \
hour.

def count_words(lines):
    counts = {}
    for line in lines:
        for word in line.lower().split():
            counts[word] = counts.get(word, 0) + 1
    return counts

Sleep is not a pause of the brain. While we sleep, cells that were busy during the day are active again in the same \
order, as if the day were played back at a higher speed. People who learn a list of words in the evening remember \
more of them in the morning than people who learn it in the morning and are asked in the evening, although the same \
number of hours has passed. Why this is so is still an open question. One idea is that new memories are moved from a \
small, fast store to a large and slow one.

The committee met on the second Tuesday of March. It agreed to keep the library open on Saturdays, to repair the roof \
of the sports hall before the winter, and to ask the county for money for a bus line to the new station. Three \
members voted against the bus line. They argued that few people would use it, since the station has a large car park \
and the road to it is good. A decision about the swimming pool was put off until the costs are known."""


def text_ids(folder: Path, shape: DecoderShape) -> list[int]:
    """Return the text in the tokens of the model whose ``tokenizer.json`` lies in a folder; without one, random ids."""
    ids: list[int] = []
    file = folder / "tokenizer.json"
    if file.exists():
        import tokenizers

        encoded = tokenizers.Tokenizer.from_file(str(file)).encode(_TEXT).ids
        ids = [token_id for token_id in encoded if token_id < shape.vocab_size]
    ids = ids or [int(number) for number in np.random.default_rng(0).integers(0, shape.vocab_size, _RANDOM)]
    return ids[: shape.context_length]
