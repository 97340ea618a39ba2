"""QLoRA fine-tuning of ChatGLM-6B, from rows of text to an adapter in use.

hub/ downloads models, data/ turns rows into batches, layers/ has the 4-bit layers, training/ one training run,
inference/ answers, evaluation/ scores, export/ model folders for other programs, benchmark/ measurements. The modules
here serve all of them.
"""

import logging
import warnings

# Messages between libraries that a user can do nothing about: bitsandbytes, when it is imported, advises on an
# optional CPU package; peft and the Trainer call a transformers method by its former name.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
