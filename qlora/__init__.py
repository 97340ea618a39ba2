"""QLoRA fine-tuning of ChatGLM-6B: arguments, data, batch layout, 4-bit loading, training, generation."""

import logging
import warnings

# What the libraries say to each other rather than to the user: a CPU kernel package that bitsandbytes advises on
# import, and a method that peft and the Trainer still call by the name it had before.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
