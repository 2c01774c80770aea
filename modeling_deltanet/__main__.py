"""`python -m modeling_deltanet serve FOLDER` (or `chat`, ...): Transformers' command line, with this family known to
it.

`transformers serve` itself looks a checkpoint's class up by its name in `transformers` (in 5.23), where ours is not.
"""

import transformers
from transformers.cli.transformers import main

from .modeling_deltanet import DeltaNetForCausalLM


transformers.DeltaNetForCausalLM = DeltaNetForCausalLM
main()
