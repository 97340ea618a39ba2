"""What the models of this project share; each model has a package of its own, and none imports another.

chat.py              what a tokenizer says of prompts and replies, and the official chat interface
description.py       what training, inference and export need to know of a model
registration.py      makes models known to the Auto classes
modeling.py          blocks, forward pass and loss of a causal language model
packed_attention.py  attention over samples concatenated in one row
loss.py              cross-entropy in slices, without holding all logits
"""
