"""QLoRA fine-tuning of ChatGLM-6B: arguments, data, batch layout, 4-bit loading."""

import logging

# On import it may advise to install a package that only speeds up inference on a CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
