"""Import this before PEFT: it silences what other packages say at every start, about which nobody can do anything."""

import logging
import warnings


# Where bitsandbytes is installed, importing PEFT makes it look on the Hub for a kernel that no example uses.
for name in ("bitsandbytes.backends.cpu.ops", "kernels.hf_hub"):
    logging.getLogger(name).setLevel(logging.ERROR)
# PEFT up to 0.21 and TRL up to 1.16 ask the model by the name that Transformers gave up in 5.23.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
